"""Messages typed at a terminal, of one line or several."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

PROMPT, MORE = "> ", ". "
FENCE = '"""'


@dataclass(frozen=True)
class Message:
    """What was typed. may_be_command: it is a plain line, not put together from several."""

    text: str
    may_be_command: bool = True


class MessageReader:
    """Reads one message after the other, with line editing and recall where Python has readline.

    A line that ends with a backslash goes on in the next one. Lines between two lines of triple quotes are one message,
    and so are lines that are pasted together.
    """

    def __init__(self) -> None:
        self._typed = _enable_line_editing()
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")

    def read(self) -> Message:
        """The next message. Raises EOFError at Ctrl-D and KeyboardInterrupt at Ctrl-C; what was typed is dropped."""
        line = _line(PROMPT)
        if line.strip() == FENCE:
            return Message(_fenced(), may_be_command=False)
        lines = []
        while line.endswith("\\"):
            lines.append(line[:-1])
            line = _line(MORE)
        text = "\n".join([*lines, line])
        return Message(text, may_be_command="\n" not in text)

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
    readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one message; Python turns this off
    return readline.get_line_buffer
