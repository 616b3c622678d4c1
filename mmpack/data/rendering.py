"""A chat template's rendering of a conversation with stand-ins, split at special tokens.

Stand-ins for the row's texts, and marks around strings of its tools and tool calls, show which characters of the
rendering the template wrote. They are noncharacters of Unicode: no template tests for them, and a tool or tool
call that has one is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmpack.data.special_tokens import restored
from mmpack.data.thoughts import Thought
from mmpack.errors import RowError
from mmpack.types import Media, Message, VideoRef

_STAND_IN = "\ufdd0{}\ufdd1"  # for the text of this number
_MARK, _END_OF_MARK = (
    "\ufdd2{}\ufdd3",
    "\ufdd4",
)  # around a string of the tool or call of this number
MARKS = re.compile(_MARK.format(r"(\d+)"))


@dataclass(slots=True)
class Piece:
    """The text between two special tokens of a rendering.

    Attributes:
        around: the text before each stand-in, and after the last one; without stand-ins, all of it.
        slots: numbers of the stand-ins.
        marks: for each marked string, the number of its tool or call.
        is_marked_first: whether a marked string comes before the first stand-in.
    """

    around: list[str] = field(default_factory=lambda: [""])
    slots: list[int] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    is_marked_first: bool = False


class Renderer:
    """Renders conversations with a tokenizer's chat template.

    Args:
        render: `apply_chat_template`, with all options but the conversation and `tools`.
        special_ids: the tokenizer's special tokens and their ids.
    """

    def __init__(self, render: Callable[..., str], special_ids: Mapping[str, int]) -> None:
        self._render, self.special_ids = render, special_ids
        longest_first = sorted(special_ids, key=len, reverse=True)
        patterns = (_STAND_IN.format(r"(\d+)"), MARKS.pattern, _END_OF_MARK)
        self._separators = re.compile("|".join([*patterns, *map(re.escape, longest_first)]))

    def render(
        self,
        messages: Iterable[Message],
        texts: Iterable[str],
        calls: Iterable[Sequence[Any]],
        tools: Sequence[Any],
    ) -> str:
        """The conversation with `texts`, `calls` (per message) and `tools` in place of its own.

        Raises:
            RowError: the template refuses the conversation.
        """
        try:
            return self._render(_chat(messages, texts, calls), tools=list(tools) or None)
        except Exception as error:  # of any kind: a template is a program
            own = type(error).__module__.startswith("jinja2")  # raised by the template on purpose
            reason = str(error) if own else f"{type(error).__name__}: {error}"
            raise RowError(
                f"the chat template refuses this row: {reason:.200}",
                "change the row as the template needs it, or use another template",
            ) from None

    def stand_ins(
        self,
        messages: Sequence[Message],
        calls: Iterable[Sequence[Any]] | None = None,
        tools: Sequence[Any] = (),
    ) -> list[Piece | int]:
        """Render the conversation with stand-ins for its texts; special tokens as ids, and the pieces between."""
        texts = [_STAND_IN.format(number) for number in range(len(texts_of(messages)))]
        rendered = self.render(messages, texts, calls or [()] * len(messages), tools)
        items: list[Piece | int] = []
        piece = Piece()
        position = 0
        for match in self._separators.finditer(rendered):
            piece.around[-1] += restored(rendered[position : match.start()])
            position = match.end()
            if match[1] is not None:
                piece.slots.append(int(match[1]))
                piece.around.append("")
            elif match[2] is not None:
                piece.marks.append(int(match[2]))
                piece.is_marked_first |= not piece.slots
            elif match[0] != _END_OF_MARK:
                items += [piece] if piece != Piece() else []
                items.append(self.special_ids[match[0]])
                piece = Piece()
        piece.around[-1] += restored(rendered[position:])
        return [*items, piece] if piece != Piece() else items


def marked_tool(tool: dict[str, Any], number: int) -> dict[str, Any]:
    """A tool with its name marked."""
    if isinstance(inner := tool.get("function"), dict):
        return {**tool, "function": {**inner, "name": _marked(inner.get("name"), number)}}
    return {**tool, "name": _marked(tool.get("name"), number)}


def marked_call(call: dict[str, Any], number: int) -> dict[str, Any]:
    """A call with its name and the strings of its arguments marked."""
    inner = call.get("function", call)
    marked = {name: _marked(inner[name], number) for name in ("name", "arguments")}
    return {**call, "function": {**inner, **marked}} if "function" in call else {**call, **marked}


def _marked(value: Any, number: int) -> Any:
    if isinstance(value, dict):
        return {_marked(key, number): _marked(inner, number) for key, inner in value.items()}
    if isinstance(value, list):
        return [_marked(inner, number) for inner in value]
    if isinstance(value, str) and value:  # templates test for empty strings
        return _MARK.format(number) + value + _END_OF_MARK
    return value


def kind_of(part: str | Media) -> str:
    """ "image", "video", "text", "thought", or "" for an empty text, which has no stand-in because templates test
    for it."""
    if isinstance(part, Thought):
        return "thought"
    if isinstance(part, str):
        return "text" if part else ""
    return "video" if isinstance(part, VideoRef) else "image"


def texts_of(messages: Iterable[Message]) -> list[str]:
    """The texts and thoughts of all messages that are not empty."""
    return [p for message in messages for p in message.content if isinstance(p, str) and p]


def _chat(
    messages: Iterable[Message], texts: Iterable[str], calls: Iterable[Sequence[Any]]
) -> list[dict[str, Any]]:
    """Messages in the form chat templates take, with their texts and calls replaced."""
    replacement = iter(texts)
    chat = []
    for message, message_calls in zip(messages, calls):
        turn: dict[str, Any] = {"role": message.role}
        content = message.content
        if content and isinstance(content[0], Thought):
            turn["reasoning_content"] = next(replacement)
            content = content[1:]
        if any(not isinstance(part, str) for part in content):
            turn["content"] = [
                {"type": "text", "text": next(replacement)}
                if isinstance(part, str)
                else {"type": kind_of(part)}
                for part in content
                if part != ""
            ]
        elif content or not message_calls:
            turn["content"] = "".join(next(replacement) for part in content if part)
        if message_calls:
            turn["tool_calls"] = list(message_calls)
        chat.append(turn)
    return chat
