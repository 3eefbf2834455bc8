"""Messages and tools of a request to the conversation that a chat template renders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import openvino_genai as ov_genai

from ov_kvcrush.server.errors import ApiError
from ov_kvcrush.server.schemas.chat import Message, Tool
from ov_kvcrush.server.tools.formats import ToolFormat

# What Hermes and Qwen2.5 are told, for models whose template says nothing of tools.
_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
_TAIL_HERMES = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)
_TAIL_LLAMA = (
    '\n</tools>\n\nTo call a function answer with nothing but {"name": <function-name>, "parameters": '
    "<args-json-object>}."
)


def history_of(messages: Sequence[Message], tools: Sequence[Tool] | None, form: ToolFormat) -> ov_genai.ChatHistory:
    """The conversation. Raises ApiError naming the message that cannot be one of it."""
    rows = [_row(message, f"messages.{i}", form) for i, message in enumerate(messages)]
    shown = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools or ()]
    if shown and not form.in_template:
        rows = _told(rows, shown, form)
    history = ov_genai.ChatHistory(rows)
    if shown and form.in_template:
        history.set_tools(shown)
    return history


def _row(message: Message, where: str, form: ToolFormat) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    calls = message.tool_calls or []
    if calls and role != "assistant":
        raise ApiError(400, f"{where}.tool_calls must be left out of a {role} message", f"{where}.tool_calls")
    if message.content is None and not calls:
        raise ApiError(400, f"{where}.content must be a text or parts of text, got none", f"{where}.content")
    text = _text(message)
    _check_unicode(text, f"{where}.content")
    if role == "tool":
        if message.tool_call_id is None:
            raise ApiError(400, f"{where}.tool_call_id must be given in a tool message", f"{where}.tool_call_id")
        if not form.in_template:
            return {"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"}
        return {"role": role, "content": text, "tool_call_id": message.tool_call_id}
    row: dict[str, Any] = {"role": role, "content": text}
    if message.name is not None:
        row["name"] = message.name
    if not calls:
        return row
    made = [
        _call(call.function.name, call.function.arguments, f"{where}.tool_calls.{i}") for i, call in enumerate(calls)
    ]
    if form.in_template:
        ids = [call.id for call in calls]
        row["tool_calls"] = [{"id": i, "type": "function", "function": call} for i, call in zip(ids, made, strict=True)]
        return row
    written = []
    for call in made:
        before, behind = form.call_text(call["name"])
        written.append(before + json.dumps(call["arguments"], ensure_ascii=False) + behind)
    return {"role": role, "content": "\n".join([*([text] if text else []), *written])}


def _text(message: Message) -> str:
    content = message.content
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


def _call(name: str, arguments: str, where: str) -> dict[str, Any]:
    """With the arguments as an object, as templates have them."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ApiError(400, f"{where}.function.arguments must be JSON of an object", f"{where}.function.arguments")
    return {"name": name, "arguments": value}


def _told(rows: list[dict[str, Any]], tools: list[dict[str, Any]], form: ToolFormat) -> list[dict[str, Any]]:
    """With the tools at the end of the system message."""
    tail = _TAIL_HERMES if form.name == "hermes" else _TAIL_LLAMA
    told = _HEAD + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools) + tail
    if rows[0]["role"] == "system":
        return [{**rows[0], "content": f"{rows[0]['content']}\n\n{told}"}, *rows[1:]]
    return [{"role": "system", "content": told}, *rows]


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"{where} must be valid Unicode, got lone surrogates", where) from None
