"""Rows in ShareGPT, OpenAI or Alpaca shape, prompts with completions, and pairs -> turns.

Fields have the meaning LLaMA-Factory gives them (`data/converter.py` there), `prompt` and `completion` TRL's,
`query` and `response` ms-swift's, and `texts` FineVision's. Tool use becomes text in the form of
Qwen2.5's and Qwen3's chat templates, because Qwen2-VL's template has no tools.
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
    loss_of,
    part_keys,
    refuse_placeholders,
    turn_keys,
)
from mmpack.data.row_values import short, structured, text_of
from mmpack.data.tool_texts import calls_text, tools_text
from mmpack.errors import RowError, names
from mmpack.types import Loss

_PAIR = frozenset(("user", "assistant"))
DEFAULT_SYSTEM = "You are a helpful assistant."  # Qwen-VL's templates write it if there is none


@dataclass(slots=True)
class Turn:
    """A turn before its media are placed. Role: system, user or assistant; "document" for a document."""

    role: str
    parts: list[Part]
    loss: Loss = "default"


def turns_of(
    row: dict[str, Any], fields: Fields, unread: set[str], *, is_prompt: bool = False
) -> list[Turn]:
    """The turns of a row: an optional system turn, then user and assistant alternating. The last turn is the
    assistant's, or in a prompt the user's.

    Args:
        unread: keys of turns and parts that are not read are added to it (`mmpack.data.row_keys`).

    Raises:
        RowError: a field is missing or not text, a role is unknown, turns are out of order, or a key means
            something that is not supported.
    """
    columns = fields.columns
    turns = _SHAPES.get(fields.formatting, _chat_turns)(row, fields, unread)
    system = row.get(columns["system"])
    if system:
        if turns[0].role == "system":  # a system turn takes precedence over the column
            unread.add(columns["system"])
        else:
            turns.insert(0, Turn("system", _parts(system, "the system prompt", unread)))
    tools = row.get(columns["tools"])
    if tools:
        if turns[0].role != "system":
            turns.insert(0, Turn("system", [DEFAULT_SYSTEM]))
        turns[0].parts.append(tools_text(tools))
    _check_order([turn.role for turn in turns], "user" if is_prompt else "assistant")
    for number, turn in enumerate(turns):
        if turn.role == "assistant" and not any(
            isinstance(part, MediaPart) or part.strip() for part in turn.parts
        ):
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
                f"{where} has the unknown role {short(name)}",
                f"use one of {sorted(roles)}, or map it in a dataset_info.json",
            )
        content, calls = message.get(tags["content_tag"]), message.get("tool_calls")
        speaker = {"observation": "user", "function_call": "assistant"}.get(role, role)
        loss: Loss = "prompt" if number < num_prompt else "default"
        if not message.keys() <= plain:
            turn_keys(message, plain | LOSS_KEYS, where, unread)
            if not loss_of(message, loss if loss == "prompt" else speaker, where):
                loss = "none"
        if calls and speaker != "assistant":
            raise RowError(f"{where} is the {speaker}'s and has 'tool_calls'", "remove them")
        parts = [] if calls and not content else _parts(content, where, unread)
        if role == "function_call":
            parts = [calls_text(parts[0] if parts else "", where)]
        elif calls:
            text = calls_text(calls, where)
            parts.append("\n" + text if parts else text)
        elif role == "observation":
            parts = ["<tool_response>\n", *parts, "\n</tool_response>"]
            if was_observation:  # several tools answer in one turn
                turns[-1].parts.extend(["\n", *parts])
                turns[-1].loss = loss if loss == "none" else turns[-1].loss
                continue
        was_observation = role == "observation"
        turns.append(Turn(speaker, parts, loss))
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


def _alpaca_turns(row: dict[str, Any], fields: Fields, unread: set[str]) -> list[Turn]:
    columns = fields.columns
    history = structured(row.get(columns["history"])) or []
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
    texts = [text_of(text, "the instruction") for text in (prompt, query) if text]
    turns.append(Turn("user", parts_of("\n".join(texts), "the instruction")))
    answer = text_of(row[columns["response"]], "the output")
    turns.append(Turn("assistant", parts_of(answer, "the output")))
    return turns


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


_SHAPES = {"alpaca": _alpaca_turns, "completion": _completion_turns, "pairs": _pair_turns}
