"""Rows in ShareGPT, OpenAI or Alpaca shape -> turns.

Fields have the meaning LLaMA-Factory gives them (`data/converter.py` there). Which roles may follow each other,
and how tools and calls are written, is up to the chat template (`mmpack.data.chat_template`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmpack.data.content_parts import MediaPart, Part, parts_of
from mmpack.data.row_fields import Fields, detect_fields
from mmpack.data.row_values import short, structured, text_of
from mmpack.data.tool_calls import calls_of, spoken_calls
from mmpack.errors import RowError, names


@dataclass(slots=True)
class Turn:
    """A turn before its media are placed. Role: system, developer, user, assistant or tool; "document" for a
    document."""

    role: str
    parts: list[Part]
    tool_calls: tuple[dict[str, Any], ...] = ()


def turns_of(row: dict[str, Any], fields: Fields, *, is_prompt: bool = False) -> list[Turn]:
    """The turns of a row, in its order, which the chat template accepts or not. The last turn is the assistant's,
    or in a prompt the user's or a tool's.

    Raises:
        RowError: a field is missing or not text, a role is unknown, an answer is empty, or the last turn is another.
    """
    columns = fields.columns
    turns = (
        _alpaca_turns(row, columns) if fields.formatting == "alpaca" else _chat_turns(row, fields)
    )
    system = row.get(columns["system"])
    if system and turns[0].role != "system":  # a system turn takes precedence over the column
        turns.insert(0, Turn("system", parts_of(system, "the system prompt")))
    _check_roles(turns, is_prompt)
    for number, turn in enumerate(turns):
        if turn.role == "assistant" and not turn.tool_calls and not _has_content(turn):
            raise RowError(
                f"the assistant's text in turn {number} is empty", "add an answer or drop the row"
            )
    return turns


def chat_turns(row: dict[str, Any], fields: Fields | None) -> list[Turn]:
    """The turns of a conversation in the row's order, which is not checked."""
    return _chat_turns(row, fields or detect_fields(row))


def _chat_turns(row: dict[str, Any], fields: Fields) -> list[Turn]:
    tags, column = fields.tags, fields.columns["messages"]
    messages = structured(row.get(column))
    if messages is None:
        raise RowError(
            f"no field {column!r}; the row has {names(row)}",
            "rename the field, or map it in a dataset_info.json",
        )
    if not isinstance(messages, list) or not messages:
        raise RowError(f"{column!r} must be a list of turns, got {short(messages)}", "fix the row")
    roles = {
        "developer": "developer",
        tags["user_tag"]: "user",
        tags["assistant_tag"]: "assistant",
        tags["system_tag"]: "system",
        tags["observation_tag"]: "tool",
        tags["function_tag"]: "function_call",
    }
    turns: list[Turn] = []
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
                f"{where} has the unknown role {short(name)}",
                f"use one of {sorted(roles)}, or map it in a dataset_info.json",
            )
        content, calls = message.get(tags["content_tag"]), message.get("tool_calls")
        if role == "function_call":
            turns.append(Turn("assistant", [], spoken_calls(content, where)))
            continue
        if calls and role != "assistant":
            raise RowError(f"{where} has 'tool_calls', but its role is {name!r}", "fix the row")
        parts = [] if calls and content is None else parts_of(content, where)
        if calls and parts == [""] and not isinstance(content, str):
            raise RowError(
                f"{where} has an empty text part beside its tool calls", "remove the part"
            )
        turns.append(Turn(role, parts, calls_of(calls, where) if calls else ()))
    return turns


def _alpaca_turns(row: dict[str, Any], columns: dict[str, str]) -> list[Turn]:
    history = structured(row.get(columns["history"])) or []
    if not isinstance(history, list) or not all(
        isinstance(p, list) and len(p) == 2 for p in history
    ):
        raise RowError(
            f"{columns['history']!r} must be a list of pairs, got {short(history)}", "fix the row"
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
        turns.append(Turn("user", parts_of(question, f"history {number}")))
        turns.append(Turn("assistant", parts_of(answer, f"history {number}")))
    texts = [text_of(text, "the instruction") for text in (prompt, query) if text]
    turns.append(Turn("user", parts_of("\n".join(texts), "the instruction")))
    turns.append(Turn("assistant", parts_of(row[columns["response"]], "the output")))
    return turns


def _has_content(turn: Turn) -> bool:
    return any(isinstance(part, MediaPart) or part.strip() for part in turn.parts)


def _check_roles(turns: Sequence[Turn], is_prompt: bool) -> None:
    roles = " ".join(turn.role for turn in turns)
    if turns[-1].role not in (("user", "tool") if is_prompt else ("assistant",)):
        last = "user's or a tool's" if is_prompt else "assistant's"
        raise RowError(
            f"the last turn must be the {last} (roles: {roles[-80:]})", "remove the turns after it"
        )
    if not is_prompt and all(turn.role == "assistant" for turn in turns):
        raise RowError(
            f"all turns are the assistant's (roles: {roles[:80]})",
            "add what it answers; a document is read with --stage pretrain (stage='pretrain')",
        )
