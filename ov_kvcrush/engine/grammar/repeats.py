"""How large a regular expression is when its repeats are written out.

llguidance has limits, but finds out only while it builds: (a{1000}){1000} took 35 s on 2 busy cores.
"""

from __future__ import annotations

import re
from typing import Any

MAX_ATOMS = 10_000
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d+)(,?)(\d*)\}|.", re.DOTALL)


def check_repeats(pattern: str) -> None:
    """Raise ValueError for a pattern of more than MAX_ATOMS characters and classes, repeats written out."""
    size = num_atoms(pattern)
    if size > MAX_ATOMS:
        raise ValueError(f"a pattern must have at most {MAX_ATOMS} characters with all repeats written out, got {size}")


def check_patterns(schema: Any) -> None:
    """The same for every pattern in a JSON schema."""
    if isinstance(schema, dict):
        for name, value in schema.items():
            if name == "pattern" and isinstance(value, str):
                check_repeats(value)
            check_patterns(value)
    elif isinstance(schema, list):
        for value in schema:
            check_patterns(value)


def num_atoms(pattern: str) -> int:
    """Characters and classes of a pattern, those in x{n,m} m times. An estimate: alternatives count all."""
    groups, last = [0], 0  # sizes of the groups that are open; of the atom or group that a repeat would be of
    for token in _TOKEN.finditer(pattern):
        text = token[0]
        if text == "(":
            groups.append(0)
            last = 0
        elif text == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif token[1] is not None:
            times = int(token[3] or token[1])
            groups[-1] += last * (times - 1)
            last *= times
        elif text not in ("*", "+", "?", "|"):
            last = 1
            groups[-1] += 1
    return sum(groups)
