"""Rows in ShareGPT, OpenAI or Alpaca shape -> turns of (role, parts).

Fields have the meaning LLaMA-Factory gives them (`data/converter.py` there). Tool use becomes text in the form of
Qwen2.5's and Qwen3's chat templates, because Qwen2-VL's template has no tools.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmpack.data.file_formats import parse_json
from mmpack.errors import RowError, names

MARKERS = {"image": "<image>", "video": "<video>"}
_SPLIT = re.compile(f"({'|'.join(MARKERS.values())})")
DEFAULT_SYSTEM = "You are a helpful assistant."  # Qwen-VL's templates write it if there is none


@dataclass(frozen=True, slots=True)
class MediaPart:
    """An image or a video at its position in a turn; `value` None: the next one in the row's list."""

    value: Any = None
    kind: str = "image"


Part = str | MediaPart
Turn = tuple[str, list[Part]]  # role: system, user or assistant

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


@dataclass(frozen=True)
class Fields:
    """The names of columns and tags. `kept` lists the tags, and `unnamed` the columns, that a mapping left out;
    they have LLaMA-Factory's defaults."""

    formatting: str
    columns: dict[str, str]
    tags: dict[str, str]
    kept: tuple[str, ...] = ()
    unnamed: tuple[str, ...] = ()


_SHAREGPT = Fields("sharegpt", _COLUMNS, _SHAREGPT_TAGS)
_OPENAI = Fields("openai", {**_COLUMNS, "messages": "messages"}, _OPENAI_TAGS)
_SHAREGPT_MESSAGES = Fields("sharegpt", {**_COLUMNS, "messages": "messages"}, _SHAREGPT_TAGS)
_ALPACA = Fields("alpaca", _COLUMNS, {})


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
            f"formatting {_short(formatting)} is not supported; use sharegpt, openai or alpaca"
        )
    for option in ("ranking", "num_samples", "subset", "kto_tag"):
        if mapping.get(option) or columns.get(option):
            raise ValueError(
                f"a dataset_info.json entry with {option!r} is not supported; remove it"
            )
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
                f"{name!r} of a dataset_info.json entry is {_short(value)}; "
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
    raise RowError(
        f"no field 'conversations', 'messages' or 'instruction'; the row has {names(row)}",
        "rename the field, or map it in a dataset_info.json"
        if row
        else "a Trainer removes fields from rows unless TrainingArguments has remove_unused_columns=False",
    )


def turns_of(row: dict[str, Any], fields: Fields, *, is_prompt: bool = False) -> list[Turn]:
    """The turns of a row: an optional system turn, then user and assistant alternating. The last turn is the
    assistant's, or in a prompt the user's.

    Raises:
        RowError: a field is missing or not text, a role is unknown, or turns are out of order.
    """
    columns = fields.columns
    turns = (
        _alpaca_turns(row, columns) if fields.formatting == "alpaca" else _chat_turns(row, fields)
    )
    system = row.get(columns["system"])
    if system and turns[0][0] != "system":  # a system turn takes precedence over the column
        turns.insert(0, ("system", parts_of(system, "the system prompt")))
    tools = row.get(columns["tools"])
    if tools:
        if turns[0][0] != "system":
            turns.insert(0, ("system", [DEFAULT_SYSTEM]))
        turns[0][1].append(_tools_text(tools))
    _check_order([role for role, _ in turns], "user" if is_prompt else "assistant")
    for number, (role, parts) in enumerate(turns):
        if role == "assistant" and not any(isinstance(p, MediaPart) or p.strip() for p in parts):
            raise RowError(
                f"the assistant's text in turn {number} is empty", "add an answer or drop the row"
            )
    return turns


def chat_turns(row: dict[str, Any], fields: Fields | None) -> list[Turn]:
    """The turns of a conversation in the row's order, which is not checked."""
    return _chat_turns(row, fields or detect_fields(row))


def structured(value: Any) -> Any:
    """Parse a list or object that a flat file (CSV) holds as JSON text; other values are returned unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return parse_json(value)
        except ValueError:
            return value
    return value


def _chat_turns(row: dict[str, Any], fields: Fields) -> list[Turn]:
    tags, column = fields.tags, fields.columns["messages"]
    messages = structured(row.get(column))
    if messages is None:
        raise RowError(
            f"no field {column!r}; the row has {names(row)}",
            "rename the field, or map it in a dataset_info.json",
        )
    if not isinstance(messages, list) or not messages:
        raise RowError(f"{column!r} must be a list of turns, got {_short(messages)}", "fix the row")
    roles = {
        tags["user_tag"]: "user",
        tags["assistant_tag"]: "assistant",
        tags["system_tag"]: "system",
        tags["observation_tag"]: "observation",
        tags["function_tag"]: "function_call",
    }
    turns: list[Turn] = []
    was_observation = False
    for number, message in enumerate(messages):
        where = f"turn {number}"
        if not isinstance(message, dict) or tags["role_tag"] not in message:
            has = names(message) if isinstance(message, dict) else type(message).__name__
            raise RowError(
                f"{where} needs {tags['role_tag']!r} and {tags['content_tag']!r}, got {has}",
                "rename its fields, or map them in a dataset_info.json",
            )
        name = message[tags["role_tag"]]
        role = roles.get(name) if isinstance(name, str) else None
        if role is None:
            raise RowError(
                f"{where} has the unknown role {_short(name)}",
                f"use one of {sorted(roles)}, or map it in a dataset_info.json",
            )
        content, calls = message.get(tags["content_tag"]), message.get("tool_calls")
        parts = [] if calls and not content else parts_of(content, where)
        if role == "function_call":
            parts = [_calls_text(parts[0] if parts else "", where)]
        elif calls:
            text = _calls_text(calls, where)
            parts.append("\n" + text if parts else text)
        elif role == "observation":
            parts = ["<tool_response>\n", *parts, "\n</tool_response>"]
            if was_observation:  # several tools answer in one turn
                turns[-1][1].extend(["\n", *parts])
                continue
        was_observation = role == "observation"
        turns.append(({"observation": "user", "function_call": "assistant"}.get(role, role), parts))
    return turns


def _alpaca_turns(row: dict[str, Any], columns: dict[str, str]) -> list[Turn]:
    history = structured(row.get(columns["history"])) or []
    if not isinstance(history, list) or not all(
        isinstance(p, list) and len(p) == 2 for p in history
    ):
        raise RowError(
            f"{columns['history']!r} must be a list of pairs, got {_short(history)}", "fix the row"
        )
    prompt, query = row.get(columns["prompt"]), row.get(columns["query"])
    for name in ("prompt", "response"):
        if row.get(columns[name]) is None:
            raise RowError(
                f"no field {columns[name]!r}; the row has {names(row)}",
                "add it, or map it in a dataset_info.json",
            )
    turns: list[Turn] = []
    for number, (question, answer) in enumerate(history):
        turns.append(("user", parts_of(question, f"history {number}")))
        turns.append(("assistant", parts_of(answer, f"history {number}")))
    texts = [_text(text, "the instruction") for text in (prompt, query) if text]
    turns.append(("user", parts_of("\n".join(texts), "the instruction")))
    turns.append(("assistant", parts_of(row[columns["response"]], "the output")))
    return turns


def parts_of(content: Any, where: str) -> list[Part]:
    """The text, images and videos of a turn. In a string, `<image>` and `<video>` are markers. In OpenAI content
    parts, images and videos are separate parts and `<image>` in a text is literal text."""
    if isinstance(content, str):
        kinds = {marker: kind for kind, marker in MARKERS.items()}
        pieces = _SPLIT.split(_text(content, where))  # alternates text and markers
        return [MediaPart(kind=kinds[p]) if p in kinds else p for p in pieces]
    if not isinstance(content, list):
        raise RowError(
            f"the text of {where} must be a string, got {_short(content)}", "fix the row"
        )
    return [_content_part(part, where) for part in content]


def _content_part(part: Any, where: str) -> Part:
    if isinstance(part, str):
        return _text(part, where)
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        text = part.get("text")
        return _text(text if text is not None else part.get("value"), where)
    medium = next((m for m in MARKERS if kind in (m, f"{m}_url")), None)
    if medium is not None:
        names_of = (medium, f"{medium}_url", "value")
        value = next((part[k] for k in names_of if part.get(k) is not None), None)
        if isinstance(value, dict) and "url" in value:
            value = value["url"]
        if medium == "video" and isinstance(value, list):
            fps = next((part[k] for k in ("sample_fps", "fps") if part.get(k) is not None), None)
            value = {"frames": value, "fps": fps}
        return MediaPart(value, medium)
    raise RowError(
        f"{where} has a content part of type {_short(kind)}", "use text, image or video parts"
    )


def _text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise RowError(f"the text of {where} must be a string, got {_short(text)}", "fix the row")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            f"the text of {where} has half a character (a lone surrogate) at character {error.start}",
            "fix the row",
        ) from None
    return text


def _check_order(roles: Sequence[str], last: str) -> None:
    first = int(roles[0] == "system")
    for number, role in enumerate(roles[first:], first):
        expected = "assistant" if (number - first) % 2 else "user"
        if role != expected:
            raise RowError(
                f"turn {number} has role {role!r}, expected {expected!r} (roles: {' '.join(roles)[:80]})",
                "alternate user and assistant, after an optional system turn",
            )
    if len(roles) == first or roles[-1] != last:
        raise RowError(
            f"the last turn must be the {last}'s (roles: {' '.join(roles)[-80:]})",
            "remove the turns after it",
        )


def _calls_text(calls: Any, where: str) -> str:
    """Function calls as text, as Qwen's chat templates write them."""
    calls = structured(calls)
    texts = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = call.get("function", call) if isinstance(call, dict) else call
        arguments = structured(call.get("arguments")) if isinstance(call, dict) else None
        if arguments is None or not isinstance(call.get("name"), str):
            raise RowError(
                f"{where} has a function call without name and arguments: {_short(call)}",
                'write {"name": ..., "arguments": {...}}',
            )
        text = _dump({"name": call["name"], "arguments": arguments}, where)
        texts.append(f"<tool_call>\n{text}\n</tool_call>")
    return "\n".join(texts)


def _tools_text(tools: Any) -> str:
    """A row's tools as text, as Qwen's chat templates add them to the system prompt."""
    tools = structured(tools)
    tools = tools if isinstance(tools, list) else [tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"'tools' must be a list of objects, got {_short(tools)}", "fix the row")
    wrapped = [
        t if t.get("type") == "function" else {"type": "function", "function": t} for t in tools
    ]
    lines = "".join("\n" + _dump(tool, "'tools'") for tool in wrapped)
    return (
        "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n"
        f"<tools>{lines}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def _dump(value: Any, where: str) -> str:
    try:
        return _text(json.dumps(value, ensure_ascii=False), where)
    except (TypeError, RecursionError):
        raise RowError(f"{where} holds a value that JSON cannot express", "fix the row") from None


def _short(value: Any) -> str:
    """A value for an error message, shortened."""
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{value!a:.80}"
