"""An assistant's thoughts, and texts in the form in which a chat template writes them.

A thought comes from a field of its turn, or from `<think>...</think>` at the start of the turn's text. The
template gets it as `reasoning_content`, as transformers passes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count

from mmpack.types import Media, Message

_OPEN, _CLOSE = "<think>", "</think>"
_CLOSED = re.compile(r"\s*(?:</think>\s*)?")


class Thought(str):
    """The thought before an answer, first in the `content` of an assistant's `Message`."""

    __slots__ = ()


def split_thought(text: str) -> tuple[str, str] | None:
    """The thought that a text begins with, and the rest; None if there is none, or if there are other tags."""
    before, _, rest = text.partition(_OPEN)
    thought, closed, answer = rest.partition(_CLOSE)
    if not closed or before.strip() or _OPEN in rest or _CLOSE in answer:
        return None
    return thought, answer


def thought_end(text: str) -> int:
    """Where the answer begins in a text that begins with a thought; 0 without a thought."""
    parts = split_thought(text)
    return 0 if parts is None else len(text) - len(parts[1].lstrip())


def closing(text: str) -> str:
    """The end of a thought that a template writes: `</think>` with the white space around it."""
    match = _CLOSED.match(text)
    return match[0] if match else ""


def thinking_turn(messages: Sequence[Message]) -> int | None:
    """The first turn of the assistant whose text begins with a thought."""
    for turn, message in enumerate(messages):
        if message.role == "assistant" and message.content:
            text = message.content[0]
            if isinstance(text, str) and _OPEN in text and not isinstance(text, Thought):
                if split_thought(text) is not None:
                    return turn
    return None


def ways(messages: tuple[Message, ...], splits: bool) -> Iterator[tuple[Message, ...]]:
    """The messages as a template can take them apart: with the thoughts in the texts on their own if `splits`,
    then as they are; each also without texts of white space alone, for templates that test trimmed texts."""
    kinds = [tuple(map(_split, messages)), messages] if splits else [messages]
    for kind in kinds:
        yield kind
        without = tuple(map(_without_blanks, kind))
        if without != kind:
            yield without


def _split(message: Message) -> Message:
    text = message.content[0] if message.content else None
    if message.role != "assistant" or not isinstance(text, str) or isinstance(text, Thought):
        return message
    parts = split_thought(text)
    if parts is None:
        return message
    thought, answer = parts
    thoughts = (Thought(thought),) if thought.strip() else ()
    return replace(message, content=(*thoughts, answer, *message.content[1:]))


def _without_blanks(message: Message) -> Message:
    def kept(part: str | Media) -> bool:
        return not isinstance(part, str) or part == "" or bool(part.strip())

    if all(map(kept, message.content)):
        return message
    rest = tuple(part for part in message.content if kept(part))
    speaks = any(not isinstance(part, Thought) for part in rest)
    return replace(message, content=rest if speaks or message.tool_calls else (*rest, ""))


def without_thoughts(messages: Sequence[Message], dropped: frozenset[int]) -> list[Message]:
    """The messages without some thoughts, which have the numbers of texts that are not empty."""
    if not dropped:
        return list(messages)
    number = count()
    kept = []
    for message in messages:
        parts = [
            p for p in message.content if not (isinstance(p, str) and p and next(number) in dropped)
        ]
        kept.append(replace(message, content=tuple(parts)))
    return kept


def fitted(texts: Sequence[str], around: Sequence[str], rendered: str) -> list[str]:
    """Each text in the form that a template writes: as it is, or with white space or newlines trimmed at its ends.
    From the first text that has no such form, they stay as they are.

    Args:
        texts: n texts of a row.
        around: n + 1 strings of the template, before each text and after the last.
        rendered: what the template writes for the row.
    """
    written: list[str] = []
    position = len(around[0])
    for text, after in zip(texts, around[1:]):
        form = next((f for f in _forms(text) if rendered.startswith(f + after, position)), None)
        if form is None:
            break
        written.append(form)
        position += len(form) + len(after)
    return [*written, *texts[len(written) :]]


def filled(texts: Sequence[str], around: Sequence[str]) -> str:
    """The strings of a template with the texts between them."""
    return around[0] + "".join([text + after for text, after in zip(texts, around[1:])])


def _forms(text: str) -> Iterator[str]:
    yield text
    for begun in (text, text.lstrip("\n"), text.lstrip()):
        for form in (begun, begun.rstrip("\n"), begun.rstrip()):
            if form != text:
                yield form
