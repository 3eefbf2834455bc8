"""The order of a measurement: workers up, one warm-up each, then the engines take turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from ov_kvcrush.bench.measure import RunResult
from ov_kvcrush.bench.process import worker
from ov_kvcrush.bench.settings import BenchSettings, Cell

WARM_UP_TOKENS = 16

Report = Callable[[str], None]


@dataclass
class EngineRuns:
    """What one engine did in one cell. Peaks are those of its own process, from its start; None where nobody tells."""

    engine: str
    load_s: float
    load_peak_rss_bytes: int | None
    peak_rss_bytes: int | None
    runs: list[RunResult] = field(default_factory=list)


@dataclass(frozen=True)
class CellResult:
    """One cell; run i of every engine came right after run i of the one before it."""

    cell: Cell
    engines: list[EngineRuns]


def num_stages(settings: BenchSettings) -> int:
    """How often `measure` reports."""
    return len(settings.cells) * len(settings.engines) * (settings.runs + 2)


def measure(settings: BenchSettings, report: Report) -> Iterator[CellResult]:
    """Yield the cells one by one. `report` is told what begins: a load, a warm-up or a run.

    Every cell has workers of its own, so that its peak memory is its own. Raises CrushError if an engine refuses the
    settings, WorkerError if one breaks; no worker is left then.
    """
    for cell in settings.cells:
        yield _measure_cell(settings, cell, report)


def _measure_cell(settings: BenchSettings, cell: Cell, report: Report) -> CellResult:
    place = f"context {cell.context}, batch {cell.batch}"
    results = []
    with ExitStack() as stack:
        workers = [(name, stack.enter_context(worker(name))) for name in settings.engines]
        for name, process in workers:
            report(f"{place}: {name} loads")
            reply = process.ask(settings.worker_job(name, cell))
            results.append(EngineRuns(name, reply["load_s"], reply["peak_rss_bytes"], reply["peak_rss_bytes"]))
        for name, process in workers:
            report(f"{place}: {name} warms up")
            process.ask({"new_tokens": min(settings.new_tokens, WARM_UP_TOKENS)})
        for i in range(settings.runs):
            for (name, process), result in zip(workers, results, strict=True):
                report(f"{place}: {name}, run {i + 1} of {settings.runs}")
                reply = process.ask({"new_tokens": settings.new_tokens})
                result.runs.append(RunResult(**reply["run"]))
                result.peak_rss_bytes = reply["peak_rss_bytes"]
    return CellResult(cell, results)
