"""Errors for rows that a chat template does not write as they are: which turn, and what differs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mmpack.data.rendering import kind_of
from mmpack.errors import RowError
from mmpack.types import Message

_SHOWN = 40  # characters of a difference


def not_written(messages: Sequence[Message], held: Sequence[str | int]) -> RowError:
    """Texts, images and videos are not all written.

    Args:
        held: what the rendering has, in its order: a text by its number, an image or video by its kind.
    """
    parts = [
        (turn, kind_of(part))
        for turn, message in enumerate(messages)
        for part in message.content
        if part != ""
    ]
    number = 0
    what = "something is written again"
    for place, (turn, kind) in enumerate(parts):
        wanted: str | int = number if kind == "text" else kind
        number += kind == "text"
        if held[place : place + 1] != [wanted]:
            is_missing = wanted not in held[place:]
            how = "missing" if is_missing else "not in its place"
            what = f"the {kind} of turn {turn} ({messages[turn].role}) is {how}"
            break
    return RowError(
        f"the chat template does not write every text, image and video of the row once and in order: {what}",
        "use a template that writes it, or remove it from the row",
    )


def check_marks(
    marks: Sequence[int], expected: Sequence[int], num_tools: int, turns: Sequence[int]
) -> None:
    """Check that every tool is written, and every string of every call once and in order.

    Args:
        marks: the numbers of the marked strings in a rendering: tools from 0, then calls.
        expected: the numbers of the marked strings of all calls.
        turns: the turn of each call.

    Raises:
        RowError: one is not written.
    """
    if not set(range(num_tools)) <= set(marks):
        raise RowError(
            "the chat template does not write the row's tools",
            "use the template of a model that was trained with tools, or remove 'tools' from the row",
        )
    written = [mark for mark in marks if mark >= num_tools]
    if written != expected:
        same = next((n for n, (a, b) in enumerate(zip(expected, written)) if a != b), len(written))
        call = expected[min(same, len(expected) - 1)]
        raise RowError(
            f"the chat template does not write the tool calls of turn {turns[call - num_tools]} once and in order",
            "use the template of a model that was trained with tools, or remove the calls from the row",
        )


def rewritten(
    messages: Sequence[Message], around: Iterable[Sequence[str]], rendered: str
) -> RowError:
    """The template changes a text.

    Args:
        around: the strings around the row's texts, per item of a layout.
        rendered: what the template writes.
    """
    texts = ((n, p) for n, m in enumerate(messages) for p in m.content if isinstance(p, str) and p)
    filled = ""
    places: list[tuple[int, int, str]] = []  # where a text begins, its turn, the text
    for strings in around:
        filled += strings[0]
        for after in strings[1:]:
            turn, text = next(texts)
            places.append((len(filled), turn, text))
            filled += text + after
    at = next((n for n, (a, b) in enumerate(zip(filled, rendered)) if a != b), None)
    at = min(len(filled), len(rendered)) if at is None else at
    start, turn, text = next((p for p in places if p[0] + len(p[2]) >= at), places[-1])
    role = messages[turn].role
    is_trimmed = at >= start and text != text.strip() and rendered.startswith(text.strip(), start)
    if not is_trimmed and role == "assistant" and ("<think>" in text or "</think>" in text):
        return RowError(
            f"the chat template rewrites this row's text: it moves or removes the thought in turn {turn} ({role})",
            "use a template that keeps thoughts as they are, such as an Instruct model's; later versions of mmpack "
            "will follow templates that move them",
        )
    how = "trims" if is_trimmed else "changes"
    begin = max(at - _SHOWN // 2, 0)
    ours, theirs = (s[begin : begin + _SHOWN] for s in (filled, rendered))
    return RowError(
        f"the chat template rewrites this row's text: it {how} the text of turn {turn} ({role})",
        f"change the row or use another template; the row has {ours!a}, and the template writes {theirs!a}",
    )
