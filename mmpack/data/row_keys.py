"""Keys of rows, turns and content parts: those that mean something in other tools, and those that are not read.

A key that is present but null or empty is absent (Arrow adds such keys). Of the others, a key is either

- read: a column or tag of the row's `Fields`, a key of `READ_PART_KEYS`, or one of `LOSS_KEYS` and
  `ROW_WEIGHT_KEYS` (`mmpack.data.row_weights`);
- in one of the tables below: other tools act on it and mmpack does not, so the row is refused. A value in
  `Meaning.neutral` asks for nothing, and passes. Code that begins to honour a key removes its line here;
- unknown: the row is used, and the key is counted and named once per file (`unread_line`).

Keys of image and video parts are in `mmpack.data.media_keys`; it also refuses those that do not apply.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mmpack.data.media_keys import RATE_KEYS, media_keys
from mmpack.data.path_forms import PICTURE_SUFFIXES, VIDEO_SUFFIXES
from mmpack.data.path_patterns import without_number
from mmpack.data.row_values import text_of
from mmpack.errors import RowError, counted
from mmpack.media_options import VIDEO_KEYS

_log = logging.getLogger("mmpack")
# Of a turn: ms-swift's, OpenAI's, LLaMA-Factory v1's
LOSS_KEYS = frozenset(("loss", "weight", "loss_weight"))
ROW_WEIGHT_KEYS = frozenset(("weight", "loss_weight", "sample_weight"))
THOUGHT_KEYS = frozenset(("reasoning_content", "thinking"))  # of an assistant's turn
GROUNDING = "docs/grounding.md"
_counting = threading.Lock()  # several threads read rows of one file (`mmpack.data.row_outcomes`)
_MOST_KEYS = 1000  # different unread keys that are counted per file
_LONGEST_KEY = 60  # characters of a key that are shown
_LONGEST_PATH = 1000  # characters of a text that can be a path


class Meaning(NamedTuple):
    """What other tools do with a key."""

    tools: str
    use: str
    advice: str
    neutral: tuple[Any, ...] = ()  # values that ask for nothing


_PREFERENCE = Meaning(
    "TRL, ms-swift and LLaMA-Factory",
    "preference data",
    "remove it to train on the answer alone",
)
_LABEL = Meaning(
    "TRL and ms-swift",
    "a label of KTO or classification",
    "remove it to train on the answer alone",
)
_BOXES = Meaning(
    "ms-swift", "boxes for <ref-object> and <bbox>", f"write boxes as text, see {GROUNDING}"
)
_AUDIO = Meaning("LLaMA-Factory, ms-swift and OpenAI", "audio", "remove it; audio is not supported")
_THOUGHT = Meaning(
    "chat templates of reasoning models",
    "the thought before an answer",
    "write it as 'reasoning_content' of the assistant's turn",
)
_WEIGHT = Meaning(
    "ms-swift and other trainers",
    "a weight of the loss",
    "remove it; a turn's weight is a number in its 'weight', a row's in the row's 'weight'",
    (True,),  # equal to 1
)
_FLAG = Meaning(
    "axolotl", "the mark of a turn with loss", 'rename it to "loss", with true or false', (True,)
)
_MASK = _FLAG._replace(tools="NeMo and others", neutral=())
_CHANNEL = Meaning("TRL and ms-swift", "a channel of the answer or the loss", "remove it")
_PREFIX = Meaning("Mistral", "an answer to continue", "remove it", (False,))
_TEMPLATE = Meaning(
    "TRL",
    "variables for the chat template",
    "remove it; --template-arg (template_args) sets them for all rows",
)
_ON_PART = Meaning(
    "qwen-vl-utils",
    "the size or sampling of an image or a video",
    "set it on the content part of the image or video",
)
_MEDIA_OF_TURN = Meaning(
    "Ollama and Unsloth",
    "images and videos of a turn",
    "move them to the row's 'images' or 'videos'",
)
_MEDIA = (*VIDEO_KEYS, *RATE_KEYS)
_EVERYWHERE = {
    "objects": _BOXES,
    "bbox": _BOXES,
    "ref": _BOXES,
    "label": _LABEL,
    "chosen": _PREFERENCE,
    "rejected": _PREFERENCE,
    "rejected_response": _PREFERENCE,
    "rejected_messages": _PREFERENCE,
    "margin": _PREFERENCE,
    "kto_tag": _LABEL,
    "audio": _AUDIO,
    "audios": _AUDIO,
    "input_audio": _AUDIO,
    "reasoning_content": _THOUGHT,
    "thinking": _THOUGHT,
    "thought": _THOUGHT,
    "loss_scale": _WEIGHT,
    "channel": _CHANNEL,
    "chat_template_kwargs": _TEMPLATE,
    "enable_thinking": _TEMPLATE,
}
_OF_TURN = {
    "reasoning": _THOUGHT,
    "loss_mask": _MASK,
    "mask": _MASK,
    "train": _FLAG,
    "training": _FLAG,
    "prefix": _PREFIX,
}
ROW_KEYS = {
    **_EVERYWHERE,
    **dict.fromkeys(_MEDIA, _ON_PART),
    "loss": _WEIGHT,
    "labels": _LABEL,
    "completions": _PREFERENCE,
    "score_chosen": _PREFERENCE,
    "score_rejected": _PREFERENCE,
    "positive_messages": _PREFERENCE,
    "negative_messages": _PREFERENCE,
}
TURN_KEYS = {
    **_EVERYWHERE,
    **_OF_TURN,
    **dict.fromkeys(_MEDIA, _ON_PART),
    **dict.fromkeys(("image", "images", "video", "videos"), _MEDIA_OF_TURN),
    "train_detail": _FLAG._replace(use="the mark of parts with loss", advice="remove it"),
    "training_detail": _FLAG._replace(use="the mark of parts with loss", advice="remove it"),
    "function_call": Meaning("OpenAI", "a function call", "write it as 'tool_calls'"),
    "tools": Meaning("Mistral and SmolLM", "the tools", "move it to the row's 'tools'"),
    "system": Meaning("other formats", "a system prompt", "move it to the row's 'system'"),
}
_CONTENT = frozenset(  # keys of a part that hold its content; it has one of them
    ("image", "image_url", "video", "video_url", "path", "url", "base64", "text", "value")
)
PAIR_KEYS = {**TURN_KEYS, **dict.fromkeys(LOSS_KEYS, _WEIGHT)}  # of a question with its answer
PART_KEYS = {
    **_EVERYWHERE,
    **_OF_TURN,
    **dict.fromkeys(LOSS_KEYS, _WEIGHT),
    **dict.fromkeys((*_MEDIA, "detail"), _ON_PART),
    **dict.fromkeys(
        _CONTENT,
        Meaning(
            "transformers and OpenAI",
            "the content of another type of part",
            "give each text, image and video a part of its own",
        ),
    ),
}
READ_PART_KEYS = {
    "text": frozenset(("type", "text", "value")),
    **dict.fromkeys(("image", "image_url"), frozenset(("type", *media_keys("image")))),
    **dict.fromkeys(("video", "video_url"), frozenset(("type", *media_keys("video")))),
}


def is_absent(value: Any) -> bool:
    """Whether a value is null, NaN or empty, or holds only nulls, as structs and lists of Arrow do."""
    if isinstance(value, str):
        return not value
    if isinstance(value, dict):
        return all(map(is_absent, value.values()))
    if isinstance(value, (list, tuple)):
        return all(one is None for one in value)
    return value is None or (isinstance(value, float) and value != value)


def unread_keys(
    holder: Mapping[Any, Any],
    read: frozenset[str],
    table: Mapping[str, Meaning],
    where: str,
) -> list[Any]:
    """The keys of a row, turn or part that are not read and mean nothing elsewhere.

    Args:
        holder: the row, turn or part.
        read: the keys that are read.
        table: the keys that other tools act on, and that are refused.
        where: the holder's name for errors.

    Raises:
        RowError: other tools act on one of its keys.
    """
    if holder.keys() <= read:
        return []
    unread = []
    for key, value in holder.items():
        if key in read or is_absent(value):
            continue
        meaning = table.get(key)
        if meaning is None and str(key).startswith(("rejected_", "chosen_")):
            meaning = _PREFERENCE
        if meaning is None:
            unread.append(key)
        elif not (isinstance(value, (bool, int, float, str)) and value in meaning.neutral):
            raise RowError(
                f"{where} has {str(key)[:40]!r}, {meaning.use} in {meaning.tools}, which mmpack does not support",
                meaning.advice,
            )
    return unread


def turn_keys(
    turn: Mapping[Any, Any],
    read: frozenset[str],
    where: str,
    unread: set[str],
    table: Mapping[str, Meaning] = TURN_KEYS,
) -> None:
    """Refuse or note the keys of a turn that are not read; notes are added to `unread`.

    Raises:
        RowError: other tools act on one of them, or one holds what looks like an image.
    """
    keys = unread_keys(turn, read, table, where)
    refuse_pictures(turn, keys, where)
    unread.update(f"{str(key)[:_LONGEST_KEY]} of a turn" for key in keys)


def part_keys(content: Any, where: str, unread: set[str]) -> None:
    """Refuse or note the keys of content parts that are not read; other content has none.

    Raises:
        RowError: other tools act on one of them, or one holds what looks like an image.
    """
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict):
            continue
        kind = part.get("type")
        read = READ_PART_KEYS.get(kind) if isinstance(kind, str) else None
        if read is None:
            continue  # parts of other types are refused where they are read
        if len(part) <= 2 and part.keys() <= read:
            continue
        name = f"the {kind} part of {where}"
        given = [key for key in part if key in read & _CONTENT and not is_absent(part[key])]
        if len(given) > 1:
            raise RowError(f"{name} has {' and '.join(map(repr, given))}", "keep one of them")
        keys = unread_keys(part, read, PART_KEYS, name)
        refuse_pictures(part, keys, name)
        unread.update(f"{str(key)[:_LONGEST_KEY]} of a part" for key in keys)


def thought_of(turn: Mapping[str, Any], content: Any, where: str) -> str:
    """The thought in a field of an assistant's turn; "" for none.

    Raises:
        RowError: it is not text, or the turn has another, in a field or its content.
    """
    given = [key for key in sorted(THOUGHT_KEYS) if not is_absent(turn.get(key))]
    if not given:
        return ""
    if len(given) > 1:
        raise RowError(f"{where} has {' and '.join(map(repr, given))}", "keep one of them")
    thought = text_of(turn[given[0]], f"{given[0]!r} of {where}")
    texts = content if isinstance(content, list) else [content]
    texts = [one.get("text") if isinstance(one, dict) else one for one in texts]
    if any(isinstance(text, str) and "<think>" in text for text in texts):
        raise RowError(f"{where} has {given[0]!r} and <think> in its text", "keep one thought")
    return thought


def refuse_pictures(holder: Mapping[Any, Any], keys: Iterable[Any], where: str) -> None:
    """
    Args:
        keys: keys of the holder that are not read.

    Raises:
        RowError: one of them holds what looks like images or videos.
    """
    for key in keys:
        if looks_like_media(holder[key]):
            raise RowError(
                f"{where} has what looks like images or videos in {str(key)[:40]!r}, which is not read",
                "rename it to 'images' or 'videos', or map it in a dataset_info.json, and add markers; or remove "
                "it",
            )


def looks_like_media(value: Any) -> bool:
    """Whether a value is the path of a picture or a video, bytes with a path, a PIL image, or a list of these."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(looks_like_media(item) for item in value)
    if isinstance(value, str):
        one_line = len(value) <= _LONGEST_PATH and "\n" not in value
        return value.startswith(("data:image/", "data:video/")) or (
            one_line and value.lower().endswith(PICTURE_SUFFIXES + VIDEO_SUFFIXES)
        )
    if isinstance(value, dict):
        return value.keys() <= {"bytes", "path"} and not all(map(is_absent, value.values()))
    return hasattr(value, "getbands")


_PLACEHOLDERS = re.compile(r"<ref-object>|<bbox>")


def refuse_placeholders(text: str, where: str) -> None:
    """
    Raises:
        RowError: the text has ms-swift's placeholders of boxes. `<bbox>` that is closed by `</bbox>` is text.
    """
    found = _PLACEHOLDERS.search(text)
    if found and not (found[0] == "<bbox>" and "</bbox>" in text):
        raise RowError(
            f"{where} has the placeholder {found[0]}, which ms-swift fills in from 'objects' and mmpack does not",
            f"write the boxes as text, see {GROUNDING}",
        )


class UnreadFields(dict[str, int]):
    """Field that is not read -> number of rows with it."""

    def count(self, fields: Iterable[str], rows: int = 1) -> None:
        with _counting:
            for field in fields:
                if field in self or len(self) < _MOST_KEYS:
                    self[field] = self.get(field, 0) + rows


class UnreadByFile(dict[str, UnreadFields]):
    """File -> its fields that are not read; shards of a data set are one file."""

    def add(self, source: str, fields: Mapping[str, int]) -> None:
        for field, rows in fields.items():
            self.setdefault(without_number(source), UnreadFields()).count([field], rows)


def log_unread(source: str, unread: dict[str, int], told: set[str] | None = None) -> None:
    """Name fields that are not read in the log, except those in `told`, to which they are added."""
    if told is not None and unread.keys() <= told:
        return
    new = {field: rows for field, rows in unread.items() if field not in (told or ())}
    if new:
        _log.warning("%s", unread_line(source, new))
    if told is not None:
        told.update(new)


def unread_line(source: str, fields: Mapping[str, int]) -> str:
    """The fields of a file that are not read, most frequent first, in a line: at most 12."""
    most = sorted(fields.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{_plain(field)} ({rows:,})" for field, rows in most[:12]]
    shown[:1] = [f"{_plain(field)} ({counted(rows, 'row')})" for field, rows in most[:1]]
    more = f" and {len(most) - 12} more" if len(most) > 12 else ""
    return f"{source}: unread fields: {', '.join(shown)}{more}"


def _plain(field: str) -> str:
    return field if field.isprintable() else f"{field!a}"
