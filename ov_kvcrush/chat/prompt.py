"""The question of a run without a conversation: an argument, standard input, or both."""

from __future__ import annotations

import sys
import threading

from ov_kvcrush.chat.options import check_unicode
from ov_kvcrush.errors import RequestError

MAX_STDIN_BYTES = 16 << 20
_PATIENCE_S = 2.0


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
