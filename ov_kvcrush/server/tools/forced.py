"""Answers that must be a call, by structured output."""

from __future__ import annotations

import json
from collections.abc import Sequence

import openvino_genai as ov_genai

from ov_kvcrush.server.errors import ApiError
from ov_kvcrush.server.sampling import enforced
from ov_kvcrush.server.schemas.chat import ChatRequest, NamedTool, Tool
from ov_kvcrush.server.tools.formats import ToolFormat

_Config = ov_genai.StructuredOutputConfig


def offered(body: ChatRequest) -> list[Tool]:
    """The tools that the model is told of. Raises ApiError for a choice among none, and for one that is not there."""
    tools, choice = body.tools or [], body.tool_choice
    if choice in ("required",) or isinstance(choice, NamedTool):
        if not tools:
            raise ApiError(400, "tool_choice must be left out without tools", "tool_choice")
        if isinstance(choice, NamedTool) and choice.function.name not in {tool.function.name for tool in tools}:
            raise ApiError(400, f"tool_choice must name one of tools, got {choice.function.name!r}", "tool_choice")
        if body.response_format is not None and body.response_format.type != "text":
            raise ApiError(400, "response_format must be left out where a tool must be called", "response_format")
    return [] if choice == "none" else list(tools)


def must_call(body: ChatRequest) -> list[Tool]:
    """Those of which one must be called; none if the model may do as it likes."""
    choice, tools = body.tool_choice, body.tools or []
    if isinstance(choice, NamedTool):
        return [tool for tool in tools if tool.function.name == choice.function.name]
    return list(tools) if choice == "required" else []


def call_grammar(tools: Sequence[Tool], form: ToolFormat) -> ov_genai.StructuredOutputConfig:
    """One call of one of them, as the model writes it."""
    calls = [_call(tool, form) for tool in tools]
    grammar = calls[0]
    for call in calls[1:]:
        grammar = grammar | call
    return _Config(compound_grammar=grammar)


def _call(tool: Tool, form: ToolFormat) -> ov_genai.StructuredOutputConfig.Concat:
    function = tool.function
    before, behind = form.call_text(function.name)
    schema = {"type": "object", **(function.parameters or {})}
    arguments = _Config.JSONSchema(json.dumps(enforced(schema, is_strict=bool(function.strict))))
    return _Config.ConstString(before) + arguments + _Config.ConstString(behind)
