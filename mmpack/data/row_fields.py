"""The names of a row's fields: detected from its columns, or mapped in LLaMA-Factory's `dataset_info.json`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mmpack.data.row_values import short, structured
from mmpack.errors import RowError, names

_SHAREGPT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
    "observation_tag": "observation",
    "function_tag": "function_call",
}
_OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
    "observation_tag": "tool",
    "function_tag": "function_call",
}
_COLUMNS = {
    "messages": "conversations",
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "system": "system",
    "tools": "tools",
    "images": "images",
    "videos": "videos",
    "audios": "audios",
}
_TEXTS = {  # formatting -> the columns that hold its texts
    "alpaca": ("prompt", "query", "response", "history"),
    "completion": ("prompt", "completion"),
}
_BESIDE = ("system", "tools", "images", "videos", "audios")
_ENTRY = (
    "file_name",
    "formatting",
    "columns",
    "tags",
    "media_dir",
    "split",
    "num_samples",
    "max_samples",
)
_REFUSED = (
    *("ranking", "subset", "split", "folder", "kto_tag", "chosen", "rejected"),
    "cloud_file_name",
)
_log = logging.getLogger("mmpack")


@dataclass(frozen=True)
class Fields:
    """The names of columns and tags. `kept` lists the tags, and `unnamed` the columns, that a mapping left out;
    they have LLaMA-Factory's defaults."""

    formatting: str
    columns: dict[str, str]
    tags: dict[str, str]
    kept: tuple[str, ...] = ()
    unnamed: tuple[str, ...] = ()

    @cached_property
    def read(self) -> frozenset[str]:
        """The columns that a conversation is made of, with its images and videos."""
        named = (*_TEXTS.get(self.formatting, ("messages",)), *_BESIDE)
        columns = {self.columns[name] for name in named if name in self.columns}
        singular = {kind for kind in ("image", "video") if self.columns[f"{kind}s"] == f"{kind}s"}
        return frozenset(columns | singular)


_SHAREGPT = Fields("sharegpt", _COLUMNS, _SHAREGPT_TAGS)
_OPENAI = Fields("openai", {**_COLUMNS, "messages": "messages"}, _OPENAI_TAGS)
_SHAREGPT_MESSAGES = Fields("sharegpt", {**_COLUMNS, "messages": "messages"}, _SHAREGPT_TAGS)
_ALPACA = Fields("alpaca", _COLUMNS, {})
_QUERY_COLUMNS = {name: column for name, column in _COLUMNS.items() if name != "query"}
_QUERY = Fields("alpaca", {**_QUERY_COLUMNS, "prompt": "query", "response": "response"}, {})
_COMPLETION_COLUMNS = {"prompt": "prompt", "completion": "completion"}
_COMPLETION = Fields("completion", {**_COLUMNS, **_COMPLETION_COLUMNS}, _OPENAI_TAGS)
_PAIRS = Fields("pairs", {**_COLUMNS, "messages": "texts"}, {})


def mapped_fields(mapping: dict[str, Any]) -> Fields:
    """The fields that an entry of LLaMA-Factory's `dataset_info.json` describes.

    If an entry gives `columns` or `tags` but leaves some out, LLaMA-Factory sets those to None (so `mllm_demo`
    refuses system turns). Here they keep their documented defaults; `Fields.kept` and `Fields.unnamed` list them.

    Raises:
        ValueError: an unsupported format or option.
    """
    columns, tags = _names_of(mapping, "columns"), _names_of(mapping, "tags")
    is_chat = "messages" in columns
    formatting = mapping.get("formatting", "sharegpt" if is_chat else "alpaca")
    base = {"sharegpt": _SHAREGPT, "openai": _OPENAI, "alpaca": _ALPACA}.get(str(formatting))
    if base is None:
        raise ValueError(
            f"formatting {short(formatting)} is not supported; use sharegpt, openai or alpaca"
        )
    for option, value in (*mapping.items(), *columns.items()):
        is_refused = option in _REFUSED or option.endswith("_url")
        if value and is_refused and (option, value) != ("split", "train"):
            raise ValueError(
                f"a dataset_info.json entry with {option!r} is not supported; remove it"
            )
    for part, known, given in (
        ("columns", _COLUMNS, columns),
        ("tags", _SHAREGPT_TAGS, tags),
    ):
        unknown = [name for name, value in given.items() if value and name not in known]
        if unknown:
            raise ValueError(
                f"{part!r} of a dataset_info.json entry has {names(unknown)}, which have no meaning there; "
                f"use {names(known)}"
            )
    unread = [name for name, value in mapping.items() if value and name not in _ENTRY]
    if unread:
        _log.warning("a dataset_info.json entry has keys that are not read: %s", names(unread))
    kept = [f"{name}={base.tags[name]!r}" for name in base.tags if tags and not tags.get(name)]
    unnamed = tuple(name for name in ("system", "tools") if columns and name not in columns)
    return Fields(
        formatting,
        {**base.columns, **{name: column for name, column in columns.items() if column}},
        {**base.tags, **{name: tag for name, tag in tags.items() if tag}},
        tuple(kept),
        unnamed,
    )


def _names_of(mapping: dict[str, Any], part: str) -> dict[str, str | None]:
    """The `columns` or `tags` of a mapping: our name -> the row's name."""
    named = mapping.get(part) or {}
    is_dict = isinstance(named, dict)
    for name, value in named.items() if is_dict else [(part, named)]:
        if not is_dict or not isinstance(value, (str, type(None))):
            raise ValueError(
                f"{name!r} of a dataset_info.json entry is {short(value)}; "
                f'{part!r} must be an object of names, for example {{"messages": "chat"}}'
            )
    return named


def detect_fields(row: dict[str, Any]) -> Fields:
    """Detect the fields of a row without a mapping from its column names."""
    if row.get("conversations") is not None:
        return _SHAREGPT
    if row.get("messages") is not None:
        turns = structured(row["messages"])
        first = turns[0] if isinstance(turns, list) and turns else None
        return _SHAREGPT_MESSAGES if isinstance(first, dict) and "from" in first else _OPENAI
    if row.get("instruction") is not None:
        return _ALPACA
    for columns, fields in (
        (("prompt", "completion"), _COMPLETION),
        (("query", "response"), _QUERY),
        (("texts",), _PAIRS),
    ):
        if all(row.get(column) is not None for column in columns):
            return fields
    advice = "rename the field, or map it in a dataset_info.json"
    if not row:
        advice = "a Trainer removes fields from rows unless TrainingArguments has remove_unused_columns=False"
    elif row.keys() >= {"question", "answer"}:
        advice = 'map them: {"columns": {"prompt": "question", "response": "answer"}} (mapping), or rename them'
    raise RowError(
        "no field 'conversations', 'messages' or 'instruction', no 'prompt' with 'completion', 'query' with "
        f"'response' or 'texts'; the row has {names(row)}",
        advice,
    )
