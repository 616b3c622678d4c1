"""Errors for rows that a chat template does not write as they are: which turn, and what differs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmpack.data.rendering import kind_of, texts_of
from mmpack.data.thoughts import filled
from mmpack.errors import RowError
from mmpack.types import Message

_GENERATION = re.compile(r"{%[-+]?\s*(end)?generation\s*[-+]?%}")  # transformers' own tags
_GIVEN = frozenset(("messages", "namespace", "raise_exception", "strftime_now"))
_SHOWN = 40  # characters of a difference


def check_arguments(arguments: Mapping[str, Any], tokenizer: Any, stage: str) -> None:
    """Check that a template's arguments act.

    Raises:
        ValueError: the template does not have one of them, it is set by mmpack, or documents have no template.
    """
    if stage == "pretrain":
        raise ValueError(
            "documents have no chat template; leave out --template-arg (template_args)"
        )
    from jinja2 import Environment, meta  # transformers needs it for templates, not for documents

    templates = getattr(tokenizer, "chat_template", None) or ""
    templates = list(templates.values()) if isinstance(templates, dict) else [templates]
    source = _GENERATION.sub("", "".join(templates))
    read = meta.find_undeclared_variables(
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    )
    for name in arguments:
        if (
            name not in read
            or name in _GIVEN
            or name in inspect.signature(tokenizer.apply_chat_template).parameters
        ):
            raise ValueError(
                f"the chat template has no argument {name!r} to set; leave it out of --template-arg "
                f"(template_args)"
            )


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
        wanted: str | int = number if kind in ("text", "thought") else kind
        number += kind in ("text", "thought")
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
    messages: Sequence[Message], texts: Sequence[str], around: Sequence[str], rendered: str
) -> RowError:
    """The template changes a text.

    Args:
        texts: n texts and thoughts that the template writes, in the form in which it does as far as there is one.
        around: n + 1 strings of the template, before each text and after the last.
        rendered: what the template writes.
    """
    ours = filled(texts, around)
    at = next((n for n, (a, b) in enumerate(zip(ours, rendered)) if a != b), None)
    at = min(len(ours), len(rendered)) if at is None else at
    turns = [turn for turn, message in enumerate(messages) for _ in texts_of([message])]
    end = len(around[0])
    turn, text = turns[-1], texts[-1]
    for number, one in enumerate(texts):
        if end + len(one) >= at:
            turn, text = turns[number], one
            break
        end += len(one) + len(around[number + 1])
    role = messages[turn].role
    if role == "assistant" and ("<think>" in text or "</think>" in text):
        return RowError(
            f"the chat template rewrites this row's text: it moves or removes the thought in turn {turn} ({role})",
            "begin the text with the thought, once, as <think>...</think>, or write it as the turn's "
            "'reasoning_content'",
        )
    begin = max(at - _SHOWN // 2, 0)
    shown, theirs = (s[begin : begin + _SHOWN] for s in (ours, rendered))
    return RowError(
        f"the chat template rewrites this row's text: it changes the text of turn {turn} ({role})",
        f"change the row or use another template; the row has {shown!a}, and the template writes {theirs!a}",
    )


def no_thoughts(messages: Sequence[Message]) -> RowError:
    """The template ignores thoughts."""
    turn = next(n for n, m in enumerate(messages) if "thought" in map(kind_of, m.content))
    return RowError(
        f"the chat template does not write the thought of turn {turn} (reasoning_content, thinking)",
        "use the template of a model that thinks, or begin the turn's text with <think>...</think>",
    )


def thought_twice(turn: int) -> RowError:
    """The template writes an empty thought before the one in the text."""
    return RowError(
        f"the chat template writes an empty thought before the one in the text of turn {turn}",
        "move the thought from the text to the turn's 'reasoning_content'",
    )


def shares_tokens(turn: int) -> RowError:
    """The template writes no special token between a turn with a weight and another."""
    return RowError(
        f"turn {turn} has a weight, but the chat template writes no special token between it and another turn",
        "remove the weight, or use a template that does",
    )
