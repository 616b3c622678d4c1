"""Rows in ShareGPT, OpenAI or Alpaca shape, prompts with completions, and pairs -> turns.

Fields have the meaning LLaMA-Factory gives them (`data/converter.py` there), `prompt` and `completion` TRL's,
`query` and `response` ms-swift's, and `texts` FineVision's. Which roles may follow each other, and how tools and
calls are written, is up to the chat template (`mmpack.data.chat_template`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmpack.data.content_parts import MediaPart, Part, parts_of
from mmpack.data.row_fields import Fields, detect_fields
from mmpack.data.row_keys import (
    LOSS_KEYS,
    PAIR_KEYS,
    THOUGHT_KEYS,
    is_absent,
    part_keys,
    refuse_placeholders,
    thought_of,
    turn_keys,
)
from mmpack.data.row_values import short, structured, text_of
from mmpack.data.row_weights import turn_weight
from mmpack.data.thoughts import Thought
from mmpack.data.tool_calls import calls_of, spoken_calls
from mmpack.errors import RowError, names
from mmpack.types import Loss

_PAIR = frozenset(("user", "assistant"))


@dataclass(slots=True)
class Turn:
    """A turn before its media are placed. Role: system, developer, user, assistant or tool; "document" for a
    document."""

    role: str
    parts: list[Part]
    tool_calls: tuple[dict[str, Any], ...] = ()
    loss: Loss = "default"
    thought: tuple[Thought, ...] = ()  # of a field of its own
    weight: float = 1.0


def turns_of(
    row: dict[str, Any], fields: Fields, unread: set[str], *, is_prompt: bool = False
) -> list[Turn]:
    """The turns of a row, in its order, which the chat template accepts or not. The last turn is the assistant's,
    or in a prompt the user's or a tool's.

    Args:
        unread: keys of turns and parts that are not read are added to it (`mmpack.data.row_keys`).

    Raises:
        RowError: a field is missing or not text, a role is unknown, an answer is empty, the last turn is another,
            or a key means something that is not supported.
    """
    columns = fields.columns
    turns = _SHAPES.get(fields.formatting, _chat_turns)(row, fields, unread)
    system = row.get(columns["system"])
    if not _is_left_out(system):
        if turns[0].role == "system":  # a system turn takes precedence over the column
            unread.add(columns["system"])
        else:
            turns.insert(0, Turn("system", _parts(system, "the system prompt", unread)))
    _check_roles(turns, is_prompt)
    for number, turn in enumerate(turns):
        if turn.role == "assistant" and not turn.tool_calls and not _has_content(turn):
            raise RowError(
                f"the assistant's text in turn {number} is empty", "add an answer or drop the row"
            )
        for part in turn.parts:
            if isinstance(part, str) and ("<bbox>" in part or "<ref-object>" in part):
                refuse_placeholders(part, f"turn {number}")
    return turns


def chat_turns(row: dict[str, Any], fields: Fields | None, unread: set[str]) -> list[Turn]:
    """The turns of a conversation in the row's order, which is not checked."""
    return _chat_turns(row, fields or detect_fields(row), unread)


def _parts(content: Any, where: str, unread: set[str]) -> list[Part]:
    if not isinstance(content, str):
        part_keys(content, where, unread)
    return parts_of(content, where)


def _chat_turns(row: dict[str, Any], fields: Fields, unread: set[str]) -> list[Turn]:
    column = fields.columns["messages"]
    messages = structured(row.get(column))
    if messages is None:
        raise RowError(
            f"no field {column!r}; the row has {names(row)}",
            "rename the field, or map it in a dataset_info.json",
        )
    if not isinstance(messages, list) or not messages:
        raise RowError(f"{column!r} must be a list of turns, got {short(messages)}", "fix the row")
    return _message_turns(messages, fields.tags, unread)


def _message_turns(
    messages: list[Any], tags: dict[str, str], unread: set[str], num_prompt: int = 0
) -> list[Turn]:
    """The turns of messages; the answers of the first `num_prompt` are part of the prompt."""
    plain = frozenset((tags["role_tag"], tags["content_tag"], "tool_calls"))
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
        loss: Loss = "prompt" if number < num_prompt else "default"
        thought: tuple[Thought, ...] = ()
        weight = 1.0
        if not message.keys() <= plain:
            speaker = "assistant" if role == "function_call" else role
            read = plain | LOSS_KEYS
            if speaker == "assistant":
                read |= THOUGHT_KEYS
                text = thought_of(message, content, where)
                thought = (Thought(text),) if text else ()
            turn_keys(message, read, where, unread)
            weight = turn_weight(message, loss if loss == "prompt" else speaker, where)
            if not weight:
                loss, weight = "none", 1.0
        calls = None if is_absent(calls) else calls
        if calls and role != "assistant":
            raise RowError(f"{where} is the {role}'s and has 'tool_calls'", "remove them")
        if role == "function_call":
            turns.append(Turn("assistant", [], spoken_calls(content, where), loss, thought, weight))
            continue
        parts = [] if calls and content is None else _parts(content, where, unread)
        if calls and parts == [""] and not isinstance(content, str):
            raise RowError(
                f"{where} has an empty text part beside its tool calls", "remove the part"
            )
        calls = calls_of(calls, where) if calls else ()
        turns.append(Turn(role, parts, calls, loss, thought, weight))
    return turns


def _completion_turns(row: dict[str, Any], fields: Fields, unread: set[str]) -> list[Turn]:
    """A prompt and its completion: two texts, or two lists of messages."""
    messages: list[Any] = []
    lengths = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = structured(row.get(name))
        if isinstance(value, str):
            value = [{"role": role, "content": value}]
        if not isinstance(value, list) or not value:
            raise RowError(
                f"{name!r} must be a text or a list of turns, got {short(value)}", "fix the row"
            )
        messages += value
        lengths.append(len(value))
    return _message_turns(messages, fields.tags, unread, num_prompt=lengths[0])


def _pair_turns(row: dict[str, Any], fields: Fields, unread: set[str]) -> list[Turn]:
    column = fields.columns["messages"]
    pairs = structured(row.get(column))
    if not isinstance(pairs, list) or not pairs:
        raise RowError(f"{column!r} must be a list of turns, got {short(pairs)}", "fix the row")
    turns: list[Turn] = []
    for number, pair in enumerate(pairs):
        where = f"pair {number} of {column!r}"
        if not isinstance(pair, dict) or not pair.keys() >= _PAIR:
            has = names(pair) if isinstance(pair, dict) else type(pair).__name__
            raise RowError(f"{where} needs 'user' and 'assistant', got {has}", "rename its fields")
        turn_keys(pair, _PAIR, where, unread, PAIR_KEYS)
        for role in ("user", "assistant"):
            turns.append(Turn(role, parts_of(text_of(pair[role], where), where)))
    return turns


def _is_left_out(value: Any) -> bool:
    return is_absent(value) and value == value  # NaN is an error


def _alpaca_turns(row: dict[str, Any], fields: Fields, unread: set[str]) -> list[Turn]:
    columns = fields.columns
    history = structured(row.get(columns["history"]))
    history = [] if _is_left_out(history) else history
    if not isinstance(history, list) or not all(
        isinstance(p, list) and len(p) == 2 for p in history
    ):
        raise RowError(
            f"{columns['history']!r} must be a list of pairs, got {short(history)}", "fix the row"
        )
    prompt, query = row.get(columns["prompt"]), row.get(columns.get("query", ""))
    for name in ("prompt", "response"):
        if row.get(columns[name]) is None:
            raise RowError(
                f"no field {columns[name]!r}; the row has {names(row)}",
                "add it, or map it in a dataset_info.json",
            )
    turns: list[Turn] = []
    for number, (question, answer) in enumerate(history):
        for role, text in (("user", question), ("assistant", answer)):
            where = f"history {number}"
            turns.append(Turn(role, parts_of(text_of(text, where), where)))
    texts = [text_of(text, "the instruction") for text in (prompt, query) if not _is_left_out(text)]
    turns.append(Turn("user", parts_of("\n".join(texts), "the instruction")))
    answer = text_of(row[columns["response"]], "the output")
    turns.append(Turn("assistant", parts_of(answer, "the output")))
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


_SHAPES = {"alpaca": _alpaca_turns, "completion": _completion_turns, "pairs": _pair_turns}
