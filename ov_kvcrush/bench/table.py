"""The tables that the bench prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from ov_kvcrush.bench.report import Row

MIB = 1 << 20


def rows_table(rows: Sequence[Row]) -> Table:
    """One line per engine and cell."""
    table = Table(box=box.SIMPLE_HEAD, title="medians")
    table.add_column("engine")
    for name in ("context", "batch", "TTFT s", "TPOT ms", "tokens/s", "KV MiB", "peak MiB", "overhead ms/step"):
        table.add_column(name, justify="right", no_wrap=True)
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
    """Per cell: medians, then best runs, then the middle of the pairs, as one cell for each of the times and rates."""
    against = ratios[0]["against"]
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{ratios[0]['engine']} / {against}",
        caption="of the medians (of the best runs, median of the pairs of runs)",
    )
    timed = {"TTFT": "ttft_s", "TPOT": "tpot_ms", "tokens/s": "tokens_per_s"}
    for name in ("context", "batch", *timed, "KV", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in ratios:
        numbers = [entry[field] for field in timed.values()]
        table.add_row(
            str(entry["context"]),
            str(entry["batch"]),
            *(f"{q['of_medians']:.3f} ({q['of_best']:.3f}, {q['pairs_median']:.3f})" for q in numbers),
            *(_number(entry[f] and entry[f]["of_medians"], 2) for f in ("kv_bytes", "peak_rss_bytes")),
        )
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
