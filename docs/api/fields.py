"""For the site: docstrings have `name: what it is`, one parameter a paragraph; here they become lists of Markdown."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_FIELD = re.compile(r"^(\*{0,2}[a-z_]\w*(?:, \*{0,2}[a-z_]\w*)*): (.*)")
_INDICES = re.compile(r"\](?=\[)")  # [layer][head] is no link
_PARAGRAPH = re.compile(r"^(Raises|Returns|Yields) ")


class Fields(Extension):
    """Rewrites the docstring of whatever has one, before it is rendered."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Called by griffe for each class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """`text` with its fields as items of a list, and what is raised or returned as paragraphs of their own."""
    lines: list[str] = []
    in_list = False
    for line in _INDICES.sub(r"]\\", text).splitlines():
        field = _FIELD.match(line)
        if field:
            lines += [] if in_list else [""]
            names = ", ".join(f"`{name}`" for name in field[1].split(", "))
            lines.append(f"- {names}: {field[2]}")
            in_list = True
            continue
        goes_on = in_list and line.startswith("    ")
        if (in_list and line and not goes_on) or _PARAGRAPH.match(line):
            lines.append("")
        in_list = goes_on
        lines.append(line)
    return "\n".join(lines)
