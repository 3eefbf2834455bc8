"""What the user says: messages typed at a terminal, or a single prompt from an option and standard input."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ov_kvcrush.chat.options import check_unicode
from ov_kvcrush.errors import RequestError

PROMPT, MORE = "> ", ". "
FENCE = '"""'
MAX_STDIN_BYTES = 16 << 20
_PATIENCE_S = 2.0


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


def is_interactive(prompt: str | None) -> bool:
    """Whether there is nobody but a person at the terminal to ask."""
    return prompt is None and sys.stdin is not None and sys.stdin.isatty()


def one_prompt(prompt: str | None) -> str:
    """The text of --prompt, with the text of a piped standard input below it; either may be alone.

    Raises RequestError if both are empty, or if they are not UTF-8 text.
    """
    piped = "" if sys.stdin is None or sys.stdin.isatty() else _read_stdin()
    if prompt is not None:
        check_unicode("prompt", prompt)
        if not prompt.strip():
            raise RequestError(f"prompt must have some text, got {prompt!r}")
    parts = [part for part in (prompt, piped.strip("\r\n")) if part and part.strip()]
    if not parts:
        raise RequestError("standard input must have some text where --prompt is not given, got none")
    return "\n\n".join(parts)


def _read_stdin() -> str:
    hint = threading.Timer(_PATIENCE_S, _say_what_is_awaited)
    hint.daemon = True
    hint.start()
    try:
        data = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    finally:
        hint.cancel()
    if len(data) > MAX_STDIN_BYTES:
        raise RequestError(f"standard input must be at most {MAX_STDIN_BYTES} bytes, got more")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input must be UTF-8 text, got other bytes at {error.start}") from None


def _say_what_is_awaited() -> None:
    print("Reading standard input until it ends (use </dev/null if there is none)", file=sys.stderr, flush=True)
