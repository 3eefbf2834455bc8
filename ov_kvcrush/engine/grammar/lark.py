"""From a format (see formats.py) to a grammar of llguidance.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md has the syntax. Free text that ends somewhere is a
lazy lexeme: the shortest text that ends with what must follow it. So text before a trigger has no trigger in it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence as Items
from typing import Any

from llguidance import regex_to_lark

from ov_kvcrush.engine.grammar.ebnf import ebnf_to_lark
from ov_kvcrush.engine.grammar.formats import Format
from ov_kvcrush.engine.grammar.repeats import check_patterns, check_repeats

# Between the parts of JSON: without a bound a small model may write nothing but blanks for ever.
_WHITESPACE = r" |\n[ \t]{0,32}"


def grammar_of(fmt: Format) -> str:
    """The grammar as llguidance reads it: Lark, or JSON with several. Raises ValueError naming what it cannot be."""
    writer = _Writer()
    start, _ = writer.write(fmt, None)
    rules = "\n".join([f"start: {start}", *writer.rules])
    lark = f"%llguidance {{}}\n{rules}\n"
    if not writer.others:
        return lark
    grammars = [{"name": "start", "lark_grammar": lark}, *writer.others]
    return json.dumps({"grammars": grammars})


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _head(fmt: Format) -> str | None:
    """The constant text that a format begins with; None if it has none."""
    if fmt.get("type") == "const_string":
        return fmt.get("value") or None
    if fmt.get("type") == "tag":
        return fmt.get("begin") or None
    if fmt.get("type") == "sequence" and fmt.get("elements"):
        return _head(fmt["elements"][0])
    return None


def _is_unlimited(fmt: Format) -> bool:
    """Whether it ends with free text, whose end is known by what follows only."""
    name = fmt.get("type")
    if name == "or":
        return any(_is_unlimited(element) for element in fmt.get("elements", ()))
    if name == "sequence" and fmt.get("elements"):
        return _is_unlimited(fmt["elements"][-1])
    if name == "tag" and not fmt.get("end"):
        return _is_unlimited(fmt.get("content", {}))
    return name in ("any_text", "triggered_tags")


class _Writer:
    """Writes rules.

    Formats become expressions; `write` says whether the expression holds what must follow the format, too. Only free
    text, which must know its end, does. headless: without the constant text that a format begins with (`_head`),
    because it ended the free text before.
    """

    def __init__(self) -> None:
        self.rules: list[str] = []
        self.others: list[dict[str, str]] = []  # grammars with names of their own

    def write(self, fmt: Format, follow: str | None, headless: bool = False) -> tuple[str, bool]:
        name = fmt.get("type")
        write = getattr(self, f"_write_{name}", None) if isinstance(name, str) else None
        if write is None:
            raise ValueError(f"formats must be of a type that is supported, got {name!r}")
        try:
            if name in ("const_string", "tag", "sequence"):
                return write(fmt, follow, headless)
            return write(fmt, follow)
        except KeyError as error:
            raise ValueError(f"{name} must have {error}, got {', '.join(sorted(fmt))}") from None

    def _rule(self, expression: str, *, is_lazy: bool = False) -> str:
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}{'[lazy]' if is_lazy else ''}: {expression}")
        return name

    def _text(self, follow: str | None) -> tuple[str, bool]:
        """Any text, up to and with `follow` if there is one."""
        if "TEXT: /(?s:.*)/" not in self.rules:
            self.rules.append("TEXT: /(?s:.*)/")
        return (self._rule(f"TEXT {_literal(follow)}", is_lazy=True), True) if follow else ("TEXT", False)

    # -- what has an end -----------------------------------------------------------------------------------------------

    def _write_const_string(self, fmt: Format, follow: str | None, headless: bool) -> tuple[str, bool]:
        return _literal("" if headless else fmt["value"]), False

    def _write_json_schema(self, fmt: Format, follow: str | None) -> tuple[str, bool]:
        schema = fmt["json_schema"]
        if fmt.get("style", "json") != "json":
            raise ValueError(f"style must be 'json', got {fmt['style']!r}")
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise ValueError(f"schema must be an object that has an answer, got {json.dumps(schema)[:80]}")
        check_patterns(schema)
        asked = schema.get("x-guidance", {})
        if not isinstance(asked, dict):
            raise ValueError(f"x-guidance must be an object, got {json.dumps(asked)[:80]}")
        options = {"whitespace_pattern": _WHITESPACE, **asked}
        return f"%json {json.dumps({**schema, 'x-guidance': options})}", False

    def _write_regex(self, fmt: Format, follow: str | None) -> tuple[str, bool]:
        # As in JSON schemas and in xgrammar: \d and \w are ASCII.
        check_repeats(fmt["pattern"])
        pattern = regex_to_lark(fmt["pattern"], "dw")
        return (f"/{pattern}/" if pattern else '""'), False

    def _write_grammar(self, fmt: Format, follow: str | None) -> tuple[str, bool]:
        name = f"g{len(self.others)}"
        self.others.append({"name": name, "lark_grammar": ebnf_to_lark(fmt["grammar"])})
        return f"@{name}", False

    def _write_tag(self, fmt: Format, follow: str | None, headless: bool) -> tuple[str, bool]:
        begin, end = ("" if headless else fmt["begin"]), fmt["end"]
        if not isinstance(end, str):
            raise ValueError(f"end of a tag must be one text, got {end!r}")
        content, has_end = self.write(fmt["content"], end or follow)
        if end and not has_end:
            content = f"{content} {_literal(end)}"
        return self._rule(f"{_literal(begin)} {content}"), has_end and not end

    def _write_tags_with_separator(self, fmt: Format, follow: str | None) -> tuple[str, bool]:
        tags = self._rule(" | ".join(self.write(tag, None)[0] for tag in _some(fmt, "tags")))
        more = "" if fmt.get("stop_after_first") else f" ({_literal(fmt['separator'])} {tags})*"
        return self._rule(f"({tags}{more}){'' if fmt.get('at_least_one') else '?'}"), False

    # -- what holds others ---------------------------------------------------------------------------------------------

    def _write_sequence(self, fmt: Format, follow: str | None, headless: bool) -> tuple[str, bool]:
        elements, parts = _some(fmt, "elements"), []
        has_follow = False
        for i, element in enumerate(elements):
            is_last = i == len(elements) - 1
            after = follow if is_last else _head(elements[i + 1])
            if not is_last and after is None and _is_unlimited(element):
                raise ValueError(f"free text must be last or before a constant text, got {elements[i + 1]} behind it")
            part, had_follow = self.write(element, after, headless)
            headless = has_follow = had_follow
            parts.append(part)
        return self._rule(" ".join(parts)), has_follow

    def _write_or(self, fmt: Format, follow: str | None) -> tuple[str, bool]:
        written = [self.write(element, follow) for element in _some(fmt, "elements")]
        has_follow = any(had for _, had in written)
        parts = [part if had or not has_follow else f"{part} {_literal(follow or '')}" for part, had in written]
        return self._rule(" | ".join(parts)), has_follow

    # -- free text -----------------------------------------------------------------------------------------------------

    def _write_any_text(self, fmt: Format, follow: str | None) -> tuple[str, bool]:
        _no_excludes(fmt)
        return self._text(follow)

    def _write_triggered_tags(self, fmt: Format, follow: str | None) -> tuple[str, bool]:
        """Text in which a trigger begins a tag. at_least_one: it begins with a tag, as in xgrammar."""
        _no_excludes(fmt)
        tags, triggers = _some(fmt, "tags"), fmt["triggers"]
        of_trigger: dict[str, list[str]] = {trigger: [] for trigger in triggers}
        for tag in tags:
            found = [trigger for trigger in triggers if trigger and tag["begin"].startswith(trigger)]
            if len(found) != 1:
                raise ValueError(f"begin of a tag must start with exactly one trigger, got {tag['begin']!r}")
            rest = {**tag, "begin": tag["begin"][len(found[0]) :]}
            of_trigger[found[0]].append(self.write(rest, None)[0])
        text, has_follow = self._text(follow)
        options = []
        for trigger, rests in of_trigger.items():
            if not rests:
                raise ValueError(f"triggers must each start a tag, got {trigger!r}")
            options.append(f"{self._rule(f'TEXT {_literal(trigger)}', is_lazy=True)} ({' | '.join(rests)})")
        triggered = self._rule(" | ".join(options))
        first = self._rule(" | ".join(self.write(tag, None)[0] for tag in tags))
        if fmt.get("stop_after_first"):
            after = f" {_literal(follow)}" if follow else ""
            tagged = f"{first if fmt.get('at_least_one') else triggered}{after}"
            return self._rule(tagged if fmt.get("at_least_one") else f"{tagged} | {text}"), bool(follow)
        begin = f"{first} " if fmt.get("at_least_one") else ""
        return self._rule(f"{begin}{triggered}* {text}"), has_follow


def _some(fmt: Format, name: str) -> Items[Any]:
    if not fmt[name]:
        raise ValueError(f"{name} of {fmt['type']} must not be empty")
    return fmt[name]


def _no_excludes(fmt: Format) -> None:
    if fmt.get("excludes"):
        raise ValueError(f"excludes of {fmt['type']} must be empty, got {fmt['excludes']}")
