"""The order of a measurement: workers up, one warm-up each, then the engines take turns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from ov_kvcrush.bench.measure import RunResult, Storage
from ov_kvcrush.bench.process import worker
from ov_kvcrush.bench.settings import BenchSettings, Cell
from ov_kvcrush.cli.console import Report

WARM_UP_TOKENS = 16


@dataclass
class EngineRuns:
    """What one engine did in one cell. Resident sizes are those of its own process; None where nobody tells.

    load_peak_rss_bytes: largest until the model was loaded. loaded_rss_bytes: when it was. run_peak_rss_bytes: largest
    since then, or ever.
    """

    engine: str
    load_s: float
    storage: Storage
    load_peak_rss_bytes: int | None = None
    loaded_rss_bytes: int | None = None
    run_peak_rss_bytes: int | None = None
    runs: list[RunResult] = field(default_factory=list)

    @property
    def peak_rss_bytes(self) -> int | None:
        """Largest resident size of the process, loading included."""
        return max((x for x in (self.load_peak_rss_bytes, self.run_peak_rss_bytes) if x is not None), default=None)


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
            results.append(EngineRuns(name, **{**reply, "storage": Storage(**reply["storage"])}))
        for name, process in workers:
            report(f"{place}: {name} warms up")
            process.ask({"new_tokens": min(settings.new_tokens, WARM_UP_TOKENS), "prompt_tokens": settings.warm_up})
        for i in range(settings.runs):
            for (name, process), result in zip(workers, results, strict=True):
                report(f"{place}: {name}, run {i + 1} of {settings.runs}")
                reply = process.ask({"new_tokens": settings.new_tokens})
                result.runs.append(RunResult(**reply["run"]))
                result.run_peak_rss_bytes = reply["peak_rss_bytes"]
    return CellResult(cell, results)
