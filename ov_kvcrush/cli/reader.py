"""Messages typed at a terminal, of one line or several."""

from __future__ import annotations

import sys
from collections.abc import Callable

PROMPT, MORE = "> ", ". "
FENCE = '"""'


class MessageReader:
    """Reads one message after the other, with line editing and recall where Python has readline.

    A line that ends with a backslash goes on in the next one; lines between two lines of triple quotes are one message.
    """

    def __init__(self) -> None:
        self._typed = _enable_line_editing()
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")

    def read(self) -> str:
        """The next message. Raises EOFError at Ctrl-D and KeyboardInterrupt at Ctrl-C; what was typed is dropped."""
        line = _line(PROMPT)
        if line.strip() == FENCE:
            return _fenced()
        lines = []
        while line.endswith("\\"):
            lines.append(line[:-1])
            line = _line(MORE)
        return "\n".join([*lines, line])

    def was_typing(self) -> bool:
        """Whether there was text in the line at the last Ctrl-C."""
        return bool(self._typed())


def _fenced() -> str:
    lines = []
    try:
        while (line := _line(MORE)).strip() != FENCE:
            lines.append(line)
    except EOFError:  # Ctrl-D ends the block; at the prompt it ends the program
        print(file=sys.stderr)
    return "\n".join(lines)


def _line(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)  # input() would put it among the answers
    return input()


def _enable_line_editing() -> Callable[[], str]:
    """Importing readline is what makes input() use it. Returns what tells the text of the current line."""
    try:
        import readline
    except ImportError:  # Windows: the console edits lines by itself
        return str
    return readline.get_line_buffer
