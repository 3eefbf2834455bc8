"""From EBNF as xgrammar and llama.cpp (GBNF) write it to Lark as llguidance reads it."""

from __future__ import annotations

import re

from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

# What a line break or an escape may be in: texts, classes of characters, comments.
_PARTS = re.compile(r'"(?:\\.|[^"\\\n])*"|\[(?:\\.|[^\]\\\n])*\]|#[^\n]*|\s*\n\s*')
_RULE = re.compile(r"[A-Za-z_][\w-]*\s*::=")
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)


def ebnf_to_lark(text: str) -> str:
    """The same grammar in Lark; one that is in Lark already stays as it is. Raises ValueError for what has no Lark.

    llguidance converts GBNF. It knows neither rules of several lines nor \\u escapes, which xgrammar takes: both are
    rewritten first. Lookahead, TagDispatch and Token have no form in Lark, and rules whose names differ in nothing but
    case, - and _ have the same name there.
    """
    if is_lark_syntax(text):
        return text
    try:
        return gbnf_to_lark(_PARTS.sub(lambda part: _plain(part, text), text.strip()))
    except Exception as error:  # it raises Exception itself, too
        raise ValueError(str(error)) from None


def _plain(part: re.Match[str], text: str) -> str:
    """One text, class, comment or line break in the form that the converter reads."""
    first = part[0][0]
    if first == "#":
        return ""
    if first in '"[':
        return _ESCAPE.sub(_character, part[0])
    return "\n" if _RULE.match(text, part.end()) else " "


def _character(escape: re.Match[str]) -> str:
    if escape[3]:
        return escape[0]
    code = int(escape[1] or escape[2], 16)
    return f"\\x{code:02x}" if code < 0x80 else chr(code)
