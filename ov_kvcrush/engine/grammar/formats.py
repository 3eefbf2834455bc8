"""From openvino_genai's StructuredOutputConfig to one nested format, the JSON of xgrammar's structural tags.

https://xgrammar.mlc.ai/docs/tutorials/structural_tag.html describes it; a text that stands in the place of a tag holds
it as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openvino_genai as ov_genai

from ov_kvcrush.errors import RequestError

Format = dict[str, Any]

KINDS = ("json_schema", "regex", "grammar", "structural_tags_config", "compound_grammar")

_Config = ov_genai.StructuredOutputConfig


def format_of(config: ov_genai.StructuredOutputConfig) -> tuple[str, Format]:
    """The kind that is set in `config`, and its format. Raises RequestError for none, for several, and for no JSON."""
    given = [kind for kind in KINDS if getattr(config, kind) is not None]
    if len(given) != 1:
        raise RequestError(
            f"structured_output_config must have exactly one of {', '.join(KINDS)}, got {' and '.join(given) or 'none'}"
        )
    kind = given[0]
    value = getattr(config, kind)
    if kind in ("json_schema", "regex", "grammar"):
        plain = {"json_schema": _Config.JSONSchema, "regex": _Config.Regex, "grammar": _Config.EBNF}
        value = plain[kind](value)
    return kind, _format(kind, value)


def _format(field: str, value: Any) -> Format:
    if isinstance(value, str):
        return _of_text(field, value)
    if isinstance(value, ov_genai.StructuralTagsConfig):
        tags = [_tag(t.begin, _schema(field, t.schema), t.end) for t in value.structural_tags]
        return {"type": "triggered_tags", "triggers": list(value.triggers), "tags": tags}
    if isinstance(value, _Config.Tag):
        return _tag(value.begin, _format(field, value.content), value.end)
    make = _OF_TYPE.get(type(value))
    if make is None:
        raise RequestError(f"{field} must be made of what StructuredOutputConfig has, got {type(value).__name__}")
    return make(field, value)


def _of_text(field: str, text: str) -> Format:
    """A structural tag in JSON; the whole of one may be in an envelope."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RequestError(f"{field} must be structural tags in JSON where it is a text, got {error}") from None
    if isinstance(value, dict) and value.get("type") == "structural_tag":
        value = value.get("format")
    if not isinstance(value, dict):
        raise RequestError(f"{field} must be an object with a type where it is a text, got {text[:80]!r}")
    return value


def _schema(field: str, text: str) -> Format:
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise RequestError(f"{field} must have a JSON schema, got no JSON: {error}") from None
    return {"type": "json_schema", "json_schema": schema}


def _tag(begin: str, content: Format, end: str) -> Format:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def _elements(name: str) -> Callable[[str, Any], Format]:
    return lambda field, value: {"type": name, "elements": [_format(field, element) for element in value.elements]}


def _tags(name: str, *names: str) -> Callable[[str, Any], Format]:
    def make(field: str, value: Any) -> Format:
        return {
            "type": name,
            "tags": [_format(field, tag) for tag in value.tags],
            **{attribute: getattr(value, attribute) for attribute in names},
        }

    return make


_OF_TYPE: dict[type, Callable[[str, Any], Format]] = {
    _Config.JSONSchema: lambda field, value: _schema(field, value.value),
    _Config.Regex: lambda field, value: {"type": "regex", "pattern": value.value},
    _Config.EBNF: lambda field, value: {"type": "grammar", "grammar": value.value},
    _Config.ConstString: lambda field, value: {"type": "const_string", "value": value.value},
    _Config.AnyText: lambda field, value: {"type": "any_text"},
    _Config.QwenXMLParametersFormat: lambda field, value: {
        **_schema(field, value.json_schema),
        "type": "qwen_xml_parameter",
    },
    _Config.Concat: _elements("sequence"),
    _Config.Union: _elements("or"),
    _Config.TriggeredTags: _tags("triggered_tags", "triggers", "at_least_one", "stop_after_first"),
    _Config.TagsWithSeparator: _tags("tags_with_separator", "separator", "at_least_one", "stop_after_first"),
}
