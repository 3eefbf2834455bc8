"""Where things go: the answer to standard output, everything else to standard error."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ov_kvcrush.chat.conversation import Turn

# What could move the cursor or reprogram the terminal (C0 but tab and newline, DEL, C1), shown as a picture of itself.
_CONTROLS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
_CONTROLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def visible(text: str) -> str:
    """Replace every control character of `text` but tab and newline by a printable one."""
    return text.translate(_CONTROLS)


class AnswerWriter:
    """Writes an answer as it comes, as plain text; without control characters if it goes to a terminal.

    on_first: called before the first piece of each answer, for a spinner that has to leave.
    """

    def __init__(self, stream: TextIO, on_first: Callable[[], None] = lambda: None) -> None:
        self._stream = stream
        self._clean = visible if stream.isatty() else str
        self._on_first = on_first
        self._last = ""

    def write(self, text: str) -> None:
        """Show a piece of the answer now."""
        if not text:
            return
        if not self._last:
            self._on_first()
        self._last = text
        self._stream.write(self._clean(text))
        self._stream.flush()

    def end(self) -> None:
        """End the answer with a newline if it has none."""
        if not self._last.endswith("\n"):
            self._stream.write("\n")
        self._stream.flush()
        self._last = ""


class Messages:
    """Notes, errors and statistics on standard error."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)

    def note(self, text: str) -> None:
        """A remark."""
        self._show(text, "dim")

    def error(self, error: Exception | str) -> None:
        """One line that says what is wrong."""
        self._show("error: " + " ".join(str(error).split()), "red")

    def table(self, title: str, rows: dict[str, str]) -> None:
        """Two columns under a title."""
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
        for name, value in rows.items():
            table.add_row(Text(name), Text(value))
        self.console.print(table)

    def _show(self, text: str, style: str) -> None:
        # Names of files and words of the user are in it: no markup, and no breaks that would cut a path in two.
        self.console.print(visible(text), style=style, markup=False, emoji=False, soft_wrap=True)


def stats_rows(turn: Turn) -> dict[str, str]:
    """Numbers of one answer as text, by name."""
    metrics, per_token = turn.metrics, turn.kv_bytes_per_token
    ttft, tpot = _ms(metrics.get_ttft().mean), _ms(metrics.get_tpot().mean)
    rows = {
        "TTFT": "-" if ttft is None else f"{ttft / 1e3:.3f} s",
        "TPOT": "-" if tpot is None else f"{tpot:.1f} ms ({1e3 / tpot:.1f} tokens/s)",
        "tokens": f"{metrics.num_input_tokens} input ({metrics.num_reused_tokens} reused), "
        f"{metrics.num_generated_tokens} generated",
        "KV": f"{metrics.kv_bytes} bytes ({metrics.kv_bytes / 2**20:.2f} MiB"
        + (")" if per_token is None else f", {per_token:.0f} per token)"),
    }
    if metrics.kept_tokens is not None:
        rows["kept"] = f"{metrics.kept_tokens} of {turn.num_text_tokens} tokens a head"
    return rows


def stats_line(turn: Turn) -> str:
    """Numbers of one answer in one line."""
    return " | ".join(f"{name} {value}" for name, value in stats_rows(turn).items())


def json_line(turn: Turn, engine: str, model: str, context: dict[str, Any] | None = None) -> str:
    """One JSON object in ASCII; ttft_s (seconds) and tpot_ms (milliseconds) are null where tokens are too few.

    context: figures of what the question was about; null without one.
    """
    ttft_ms, tpot_ms = _ms(turn.metrics.get_ttft().mean), _ms(turn.metrics.get_tpot().mean)
    fields: dict[str, Any] = {
        "text": turn.text,
        "finish_reason": turn.finish_reason,
        "num_input_tokens": turn.metrics.num_input_tokens,
        "num_reused_tokens": turn.metrics.num_reused_tokens,
        "num_generated_tokens": turn.metrics.num_generated_tokens,
        "ttft_s": None if ttft_ms is None else ttft_ms / 1e3,
        "tpot_ms": tpot_ms,
        "kv_bytes": turn.metrics.kv_bytes,
        "kv_bytes_per_token": turn.kv_bytes_per_token,
        "kept_tokens": turn.metrics.kept_tokens,
        "context": context,
        "engine": engine,
        "model": model,
    }
    return json.dumps(fields)


def _ms(mean: float) -> float | None:
    """A mean duration; None for the negative one that stands for "no values"."""
    return mean if mean > 0 else None
