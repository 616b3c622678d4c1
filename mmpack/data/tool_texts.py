"""Tools and function calls of a row -> text, as Qwen2.5's and Qwen3's chat templates write them."""

from __future__ import annotations

import json
from typing import Any

from mmpack.data.row_values import short, structured, text_of
from mmpack.errors import RowError


def calls_text(calls: Any, where: str) -> str:
    """Function calls as text, as Qwen's chat templates write them."""
    calls = structured(calls)
    texts = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = call.get("function", call) if isinstance(call, dict) else call
        arguments = structured(call.get("arguments")) if isinstance(call, dict) else None
        if arguments is None or not isinstance(call.get("name"), str):
            raise RowError(
                f"{where} has a function call without name and arguments: {short(call)}",
                'write {"name": ..., "arguments": {...}}',
            )
        text = _dump({"name": call["name"], "arguments": arguments}, where)
        texts.append(f"<tool_call>\n{text}\n</tool_call>")
    return "\n".join(texts)


def tools_text(tools: Any) -> str:
    """A row's tools as text, as Qwen's chat templates add them to the system prompt."""
    tools = structured(tools)
    tools = tools if isinstance(tools, list) else [tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"'tools' must be a list of objects, got {short(tools)}", "fix the row")
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
        return text_of(json.dumps(value, ensure_ascii=False), where)
    except (TypeError, RecursionError):
        raise RowError(f"{where} holds a value that JSON cannot express", "fix the row") from None
