"""The layout that a tokenizer's chat template gives a conversation: everything but the conversation's own texts.

The template is rendered with stand-ins once per conversation shape, which shows which characters the template
wrote. It is also rendered with the real texts, and a row whose text it rewrites is refused. A document has no
template.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mmpack.errors import RowError
from mmpack.types import IGNORE, Media, Message, VideoRef
from mmpack.vision_spec import VisionSpec

_END_OF_DOCUMENT = "<|endoftext|>"  # as in Qwen's base models; the instruct models' eos ends a turn
_STAND_IN = "\ue000{}\ue001"  # private use characters: no template tests for them


@dataclass(frozen=True, slots=True)
class Fixed:
    """Template text without row text: the same for every conversation of a shape."""

    text: str
    ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """The template's text around one text of the row, between two special tokens."""

    before: str
    after: str
    is_answer: bool = False
    before_ids: tuple[int, ...] = ()  # for an answer: the ids of `before` alone
    ends_early: bool = False  # for an answer: `after` is not part of it


class Clip(NamedTuple):
    """A video's marker, for families that repeat it for each temporal patch."""

    text: str


Layout = tuple[Fixed | Slot | Clip, ...]  # a rendered conversation with its texts left out


class _Piece(NamedTuple):
    """The text between two special tokens of a rendered template."""

    before: str = ""
    slot: int | None = None  # index of the conversation's text; None: template text only
    after: str = ""


class Template:
    """The special tokens, and a cached layout per conversation shape. Options are those of `mmpack.Encoder`;
    with `is_prompt` the layout ends where the assistant's turn begins."""

    def __init__(
        self,
        tokenizer: Any,
        vision: VisionSpec,
        *,
        train_on_prompt: bool = False,
        mask_history: bool = False,
        is_prompt: bool = False,
    ) -> None:
        self._vision = vision
        self._media_of = {vision.image_token_id: "image", vision.video_token_id: "video"}
        self._vision_ids = {
            *self._media_of,
            vision.vision_start_token_id,
            vision.vision_end_token_id,
        }
        self._train_on_prompt = train_on_prompt
        self._mask_history = mask_history
        self.is_prompt = is_prompt
        self._render: Callable[..., str] = functools.partial(
            tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=is_prompt
        )
        self._tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self._special_tokens = {
            token_id: token.content
            for token_id, token in self._tokenizer.added_tokens_decoder.items()
            if token.special
        }
        self._special_ids = {token: token_id for token_id, token in self._special_tokens.items()}
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._pieces = re.compile(
            "|".join([_STAND_IN.format(r"(\d+)"), *map(re.escape, longest_first)])
        )
        self._layouts: dict[tuple[tuple[str, ...], ...], Layout] = {}

    def layout(self, messages: tuple[Message, ...]) -> Layout:
        """The layout of the conversation's shape, checked against the template's rendering of its texts.

        Raises:
            RowError: the template rewrites, drops or reorders the texts.
        """
        if messages[0].role == "document":
            return self._document_layout(messages[0])
        shape = tuple(
            (
                message.role,
                message.loss,
                *map(_kind, message.content),
            )
            for message in messages
        )
        if shape not in self._layouts:
            self._layouts[shape] = self._make_layout(messages)
        layout = self._layouts[shape]
        texts = texts_of(messages)
        remaining = iter(texts)
        filled = [
            item.before + next(remaining) + item.after if isinstance(item, Slot) else item.text
            for item in layout
        ]
        if "".join(filled) != self._render(_chat(messages, texts)):
            raise RowError(
                "the chat template rewrites this row's text (trims it, or strips reasoning), so its "
                "answer cannot be located",
                "clean the row or use another template",
            )
        return layout

    def _document_layout(self, document: Message) -> Layout:
        """Texts, images and the token that ends a document, without a template. All text is supervised."""
        run = (
            self._vision.vision_start_token_id,
            self._vision.image_token_id,
            self._vision.vision_end_token_id,
        )
        image = Fixed("", run, (IGNORE,) * len(run))
        text = Slot("", "", is_answer=True)
        parts = [text if isinstance(part, str) else image for part in document.content]
        end = self._special_ids.get(_END_OF_DOCUMENT, self._tokenizer.eos_token_id)
        if end is None:
            raise ValueError(f"the tokenizer has neither {_END_OF_DOCUMENT} nor an eos_token")
        return (*parts, Fixed("", (end,), (end,)))

    def _make_layout(self, messages: tuple[Message, ...]) -> Layout:
        stand_ins = [_STAND_IN.format(n) for n in range(len(texts_of(messages)))]
        items = self._split(self._render(_chat(messages, stand_ins)))

        # The slots and images must be those of the conversation, in its order.
        slots = iter(range(len(stand_ins)))
        parts = [
            next(slots) if isinstance(p, str) else _kind(p) for m in messages for p in m.content
        ]
        held = [
            item.slot if isinstance(item, _Piece) else self._media_of.get(item) for item in items
        ]
        if [part for part in held if part is not None] != parts:
            raise RowError(
                "the chat template does not write every text, image and video of the row once and in order",
                "is it the template of a Qwen-VL model?",
            )

        answers = [n for n, message in enumerate(messages) if message.role == "assistant"]
        supervised = answers[-1:] if self._mask_history else answers
        supervised = [n for n in supervised if messages[n].loss == "default"]
        message_of = iter([n for n, message in enumerate(messages) for _ in message.content])
        parts_left = [len(message.content) for message in messages]
        layout: list[Fixed | Slot | Clip] = []
        message, ends = 0, False
        for item, part in zip(items, held):
            is_answer = is_silent = False
            if part is not None:
                message = next(message_of)
                parts_left[message] -= 1
                is_answer = message in supervised and isinstance(item, _Piece)
                is_silent = messages[message].loss == "none"
                ends = parts_left[message] == 0
            elif ends and not isinstance(item, _Piece) and item not in self._vision_ids:
                is_answer, ends = message in supervised, False
                is_silent = messages[message].loss == "none"
            layout.append(self._item(item, is_answer, self._train_on_prompt and not is_silent))
        return tuple(layout)

    def _item(self, item: _Piece | int, is_answer: bool, with_prompt: bool) -> Fixed | Slot | Clip:
        """The layout of an item, supervised if it is part of an answer or `with_prompt`."""
        if isinstance(item, int):
            if self._media_of.get(item) == "video" and self._vision.video_spec.has_timestamps:
                return Clip(self._special_tokens[item])
            is_answer |= with_prompt and item not in self._vision_ids
            return Fixed(self._special_tokens[item], (item,), (item if is_answer else IGNORE,))
        if item.slot is None:
            (ids,) = map(tuple, self.tokenize([item.before]))
            return Fixed(item.before, ids, ids if with_prompt else (IGNORE,) * len(ids))
        if not is_answer or with_prompt:
            return Slot(item.before, item.after, with_prompt)
        (before_ids,) = map(tuple, self.tokenize([item.before]))
        return Slot(item.before, item.after, True, before_ids, ends_early=bool(item.after))

    def _split(self, rendered: str) -> list[_Piece | int]:
        """Split a rendering of stand-ins into ids of special tokens and the pieces between them."""
        items: list[_Piece | int] = []
        piece = _Piece()
        position = 0
        for match in [*self._pieces.finditer(rendered), None]:
            plain = rendered[position : match.start() if match else len(rendered)]
            piece = (
                piece._replace(before=plain) if piece.slot is None else piece._replace(after=plain)
            )
            if match and match[1] is not None:
                if piece.slot is not None:
                    raise ValueError("the chat template writes no special token between two texts")
                piece = piece._replace(slot=int(match[1]))
            else:
                if piece != _Piece():
                    items.append(piece)
                piece = _Piece()
                if match:
                    items.append(self._special_ids[match[0]])
            position = match.end() if match else position
        return items

    def tokenize(self, strings: list[str]) -> list[list[int]]:
        """The ids of each string; special tokens in a string are text.

        Calls the backend's `encode_batch_fast` with the settings of the tokenizer's `__call__`, which takes 1.5x
        the time here because it builds a dict per string. No string is truncated to the model's maximum.
        """
        backend = self._tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        return [e.ids for e in backend.encode_batch_fast(strings, add_special_tokens=False)]


def strings(layout: Layout, texts: Iterable[str]) -> Iterator[str]:
    """The strings to tokenize: each slot whole, then without `after` if that text follows an answer."""
    remaining = iter(texts)
    for item in layout:
        if isinstance(item, Slot):
            text = item.before + next(remaining)
            yield text + item.after
            if item.ends_early:
                yield text


def _kind(part: str | Media) -> str:
    if isinstance(part, str):
        return "text"
    return "video" if isinstance(part, VideoRef) else "image"


def texts_of(messages: Iterable[Message]) -> list[str]:
    return [part for message in messages for part in message.content if isinstance(part, str)]


def _chat(messages: Iterable[Message], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Messages in the form chat templates take, with their texts replaced by `texts`."""
    replacement = iter(texts)
    chat = []
    for message in messages:
        if any(not isinstance(part, str) for part in message.content):
            content: Any = [
                {"type": "text", "text": next(replacement)}
                if isinstance(part, str)
                else {"type": _kind(part)}
                for part in message.content
            ]
        else:
            content = "".join(next(replacement) for _ in message.content)
        chat.append({"role": message.role, "content": content})
    return chat
