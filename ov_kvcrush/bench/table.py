"""The tables that the bench prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from ov_kvcrush.bench.report import COMPARED, Row

MIB = 1 << 20
_COSTS = ("KV\nMiB", "peak\nMiB", "overhead\nms/step")


def rows_table(rows: Sequence[Row]) -> Table:
    """One line per engine and cell."""
    table = _table("medians", "engine", "context", "batch", "TTFT\ns", "TPOT\nms", "tokens\n/s", *_COSTS)
    for row in rows:
        table.add_row(
            row.engine,
            str(row.context),
            str(row.batch),
            f"{row.ttft_s:.3f}",
            f"{row.tpot_ms:.2f}",
            f"{row.tokens_per_s:.1f}",
            _number(row.kv_bytes / MIB, 1),
            _number(None if row.peak_rss_bytes is None else row.peak_rss_bytes / MIB, 0),
            _number(row.overhead_ms_per_step, 3),
        )
    return table


def ratios_table(ratios: Sequence[dict[str, Any]]) -> Table:
    """Three lines per cell: of the medians, of the best runs, the middle of the pairs of runs."""
    title = f"{ratios[0]['engine']} / {ratios[0]['against']}"
    table = _table(title, "quotient", "context", "batch", "TTFT", "TPOT", "tokens/s", "KV", "peak")
    names = {"of_medians": "of medians", "of_best": "of best runs", "pairs_median": "median of pairs"}
    for entry in ratios:
        for field, label in names.items():
            numbers = [_number(entry[name] and entry[name][field], 3) for name in COMPARED]
            table.add_row(
                label, str(entry["context"]), str(entry["batch"]), *numbers, end_section=field == "pairs_median"
            )
    return table


def _table(title: str, first: str, *names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title)
    table.add_column(first, no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
