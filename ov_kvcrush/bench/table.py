"""The tables that the bench prints."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import Any

from rich import box
from rich.table import Table

from ov_kvcrush import __version__
from ov_kvcrush.bench.attention.measure import AttentionRow
from ov_kvcrush.bench.peers import LLAMA_CPP, peer_versions
from ov_kvcrush.bench.report import COMPARED, BenchRow
from ov_kvcrush.bench.settings import OURS
from ov_kvcrush.bench.traffic import TrafficRow

MIB = 1 << 20
_COSTS = ("KV\nMiB", "KV bytes\n/token", "peak\nMiB", "growth\nMiB", "overhead\nms/step", "policy\n%")


def rows_table(rows: Sequence[BenchRow]) -> Table:
    """One line per engine and cell."""
    names = ("keys\n/values", "context", "batch", "kept\ntokens", "TTFT\ns", "TPOT\nms", "tokens\n/s", *_COSTS)
    table = _table("medians", "engine", *names)
    table.caption = "\n".join(_remarks(rows))
    table.caption_justify = "left"
    for row in rows:
        table.add_row(
            row.engine,
            f"{row.key_precision}/{row.value_precision}{'' if row.is_as_asked else ' *'}",
            str(row.context),
            str(row.batch),
            f"{row.kept_tokens:.0f}",
            f"{row.ttft_s:.3f}",
            f"{row.tpot_ms:.2f}",
            f"{row.tokens_per_s:.1f}",
            _number(row.kv_bytes / MIB, 1),
            _number(row.kv_bytes_per_token, 0),
            _number(row.peak_rss_bytes, 0, MIB),
            _number(row.peak_growth_bytes, 0, MIB),
            _number(row.overhead_ms_per_step, 3),
            "-" if row.policy == "none" else _number(row.policy_share, 2, 0.01),
        )
    return table


def traffic_table(rows: Sequence[TrafficRow]) -> Table:
    """One line per engine and cell: what others wait while a prompt is read."""
    gaps = ("gap p50\nms", "p95\nms", "p99\nms", "max\nms", "longest\nstep ms")
    firsts = ("short\nalone ms", "short\nbehind ms", "long\nms")
    table = _table("waiting", "engine", "context", "answers", "max step\nms", *gaps, *firsts)
    for row in rows:
        times = (row.gap_p50, row.gap_p95, row.gap_p99, row.gap_max, row.chunk, row.alone, row.behind, row.long)
        table.add_row(
            row.engine, str(row.context), str(row.batch), _number(row.max_step_ms, 0), *(f"{x:.1f}" for x in times)
        )
    return table


def attention_table(rows: Sequence[AttentionRow]) -> Table:
    """One line per cell of attention alone."""
    names = ("context", "batch", "threads", "stock\nms", "ours\nms", "times\nfaster", "MiB\nread", "ours\nGB/s")
    table = _table(
        "attention of one step, medians", "keys\n/values", *names, "memory\nGB/s", "bound\nms", "ours\n/bound"
    )
    for row in rows:
        table.add_row(
            f"{row.key_precision}/{row.value_precision}",
            *(str(n) for n in (row.context, row.batch, row.threads)),
            *(f"{ms:.3f}" for ms in (row.stock_ms, row.crush_ms)),
            f"{row.speedup:.2f}",
            f"{row.crush_bytes / MIB:.1f}",
            *(f"{speed:.1f}" for speed in (row.crush_gb_s, row.memory_gb_s)),
            f"{row.bound_ms:.3f}",
            f"{row.over_bound:.2f}",
        )
    return table


def _remarks(rows: Sequence[BenchRow]) -> list[str]:
    """What a reader must know lest the table misleads."""
    remarks = []
    if not all(row.is_as_asked for row in rows):
        remarks.append("* cannot store the types that were asked for, and keeps its default")
    if any(row.engine == OURS and row.attention == "PagedAttention" for row in rows):
        remarks.append(f"{OURS} runs on PagedAttention, uncompressed: the native library is missing")
    for package, version in peer_versions([row.engine for row in rows]).items():
        ours = f"ov_kvcrush {__version__} on openvino {metadata.version('openvino')}"
        remarks.append(f"{OURS}: {ours}; {LLAMA_CPP}: {package} {version}")
    return remarks


def ratios_tables(ratios: Sequence[dict[str, Any]]) -> list[Table]:
    """One for each engine that ours was compared with."""
    return [
        _ratios_table([entry for entry in ratios if entry["against"] == name])
        for name in dict.fromkeys(entry["against"] for entry in ratios)
    ]


def _ratios_table(ratios: Sequence[dict[str, Any]]) -> Table:
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


def _number(value: float | None, digits: int, unit: float = 1) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"
