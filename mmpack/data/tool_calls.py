"""Tools and function calls of a row, as a chat template takes them: the template writes them."""

from __future__ import annotations

import json
from typing import Any

from mmpack.data.row_values import short, structured, text_of
from mmpack.errors import RowError


def calls_of(calls: Any, where: str) -> tuple[dict[str, Any], ...]:
    """`tool_calls` of a message, unchanged; arguments that are text stay text.

    Raises:
        RowError: a call has no name or no arguments, or has a value that JSON cannot express.
    """
    calls = structured(calls)
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        inner = call.get("function", call) if isinstance(call, dict) else None
        inner = inner if isinstance(inner, dict) else {}
        if (
            not (isinstance(inner.get("name"), str) and inner["name"])
            or inner.get("arguments") is None
        ):
            raise RowError(
                f"{where} has a function call without name and arguments: {short(call)}",
                'write {"name": ..., "arguments": {...}}',
            )
        _check_json(call, where)
    return tuple(calls)


def spoken_calls(content: Any, where: str) -> tuple[dict[str, Any], ...]:
    """The calls of a ShareGPT `function_call` turn, whose text is a JSON object or a list of them, in the form of
    transformers' `tool_calls`."""
    return tuple({"type": "function", "function": call} for call in calls_of(content, where))


def tools_of(tools: Any) -> tuple[dict[str, Any], ...]:
    """A row's tools, unchanged, or parsed if they are JSON text; () for none.

    Raises:
        RowError: they are not objects, or have a value that JSON cannot express.
    """
    tools = structured(tools) or []
    tools = tools if isinstance(tools, list) else [tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"'tools' must be a list of objects, got {short(tools)}", "fix the row")
    for tool in tools:
        inner = tool.get("function", tool)
        if (
            not isinstance(inner, dict)
            or not isinstance(inner.get("name"), str)
            or not inner["name"]
        ):
            raise RowError(
                f"'tools' has a function without a name: {short(tool)}",
                'write {"type": "function", "function": {"name": ...}}',
            )
    _check_json(tools, "'tools'")
    return tuple(tools)


def _check_json(value: Any, where: str) -> None:
    try:
        text_of(json.dumps(value, ensure_ascii=False), where)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, RowError):
            raise
        raise RowError(f"{where} holds a value that JSON cannot express", "fix the row") from None
