"""How long others wait: tokens of answers while a long prompt is read, and a short prompt behind it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ov_kvcrush.bench.measure import MeasuredEngine, MeasuredHandle
from ov_kvcrush.bench.process import worker
from ov_kvcrush.bench.settings import OURS, BenchSettings, Cell
from ov_kvcrush.cli.console import Report
from ov_kvcrush.kvcache.block_pool import blocks_for

SHORT = 16  # tokens of the prompt that comes behind the long one
_ANSWERED = 64  # tokens of the prompts that are answered meanwhile
_MOST_NEW = 1 << 16  # tokens of their answers, which end when the prompts are read
_BEFORE = 8  # tokens of each before the long prompt comes


@dataclass(frozen=True)
class TrafficRun:
    """Seconds of one run. gaps: between tokens of answers while the long prompt was read.

    alone, behind: from adding the short prompt to its first token, with nobody else and behind the long one. long: the
    same of that. chunk: the longest step meanwhile.
    """

    alone: float
    behind: float
    long: float
    chunk: float
    gaps: list[float]


@dataclass(frozen=True)
class TrafficRow:
    """One engine: all runs together, in milliseconds; `alone`, `behind` and `long` are medians."""

    engine: str
    context: int
    batch: int
    max_step_ms: float | None
    gap_p50: float
    gap_p95: float
    gap_p99: float
    gap_max: float
    chunk: float
    alone: float
    behind: float
    long: float
    runs: list[TrafficRun] = field(default_factory=list)


def run_traffic(engine: MeasuredEngine, job: dict[str, Any], first_id: int) -> TrafficRun:
    """One run: the short prompt alone; then answers, a long prompt beside them, and the short one behind that."""
    rng = np.random.Generator(np.random.PCG64(job["seed"] + first_id))
    ids = iter(range(first_id, first_id + 1000))

    def add(length: int, new_tokens: int) -> _Timed:
        prompt = rng.integers(0, job["vocab_size"], length, dtype=np.int64)
        begin = time.perf_counter()
        return _Timed(engine.add(next(ids), prompt, new_tokens), begin)

    short = add(SHORT, 2)
    while engine.has_unfinished():
        engine.step()
        short.take()
    alone = short.first
    limit = job["context_length"]
    answers = [add(_ANSWERED, min(_MOST_NEW, limit - _ANSWERED) if limit else _MOST_NEW) for _ in range(job["batch"])]
    while min(len(x.moments) for x in answers) < _BEFORE:
        engine.step()
        for answer in answers:
            answer.take()
    long = add(job["context"], 2)
    behind: _Timed | None = None
    chunk = 0.0
    while behind is None or not (long.moments and behind.moments):
        begin = time.perf_counter()
        engine.step()
        chunk = max(chunk, time.perf_counter() - begin)
        for one in (*answers, long, *([behind] if behind else [])):
            one.take()
        if behind is None:
            behind = add(SHORT, 2)
    gaps = [gap for answer in answers for gap in answer.gaps(long.begin, long.moments[0])]
    for answer in answers:
        answer.handle.cancel()
    while engine.has_unfinished():
        engine.step()
    return TrafficRun(alone, behind.first, long.first, chunk, gaps)


class _Timed:
    """A request and the moments of its tokens."""

    def __init__(self, handle: MeasuredHandle, begin: float) -> None:
        self.handle = handle
        self.begin = begin
        self.moments: list[float] = []

    def take(self) -> None:
        while self.handle.can_read():
            count = sum(len(output.generated_ids) for output in self.handle.read().values())
            self.moments += [time.perf_counter()] * count

    @property
    def first(self) -> float:
        return self.moments[0] - self.begin

    def gaps(self, begin: float, end: float) -> list[float]:
        """Between each token that came within [begin, end] and the one before it."""
        pairs = zip(self.moments, self.moments[1:], strict=False)
        return [b - a for a, b in pairs if begin <= b <= end]


def measure_traffic(settings: BenchSettings, max_step_ms: float, report: Report) -> Iterator[TrafficRow]:
    """A row for each engine and cell; engines take turns, run by run. Raises CrushError, WorkerError."""
    for cell in settings.cells:
        yield from _measure_cell(settings, cell, max_step_ms, report)


def _measure_cell(settings: BenchSettings, cell: Cell, max_step_ms: float, report: Report) -> list[TrafficRow]:
    runs: dict[str, list[TrafficRun]] = {name: [] for name in settings.engines}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(worker(name)) for name in settings.engines}
        for name, process in workers.items():
            report(f"{name} loads")
            process.ask(_job(settings, name, cell, max_step_ms))
        for run in range(settings.runs + 1):
            for name, process in workers.items():
                report(f"{name}, run {run} of {settings.runs}" if run else f"{name} warms up")
                reply = process.ask({})
                if run:
                    runs[name].append(TrafficRun(**reply["run"]))
    return [_row(name, cell, max_step_ms if name == OURS else None, found) for name, found in runs.items()]


def num_stages(settings: BenchSettings) -> int:
    """How often `measure_traffic` reports."""
    return len(settings.cells) * len(settings.engines) * (settings.runs + 2)


def _job(settings: BenchSettings, engine: str, cell: Cell, max_step_ms: float) -> dict[str, object]:
    longest = settings.context_length or cell.context + 4096
    blocks = blocks_for(cell.context + 64) + (cell.batch + 2) * blocks_for(min(longest, _ANSWERED + 4096))
    more = {"traffic": True, "max_step_ms": max_step_ms, "context_length": settings.context_length}
    return {**settings.worker_job(engine, cell), **more, "num_kv_blocks": blocks}


def _row(engine: str, cell: Cell, max_step_ms: float | None, runs: Sequence[TrafficRun]) -> TrafficRow:
    gaps = np.concatenate([run.gaps for run in runs]) * 1e3
    p50, p95, p99 = (float(x) for x in np.percentile(gaps, [50, 95, 99]))
    alone, behind, long = (
        float(np.median([getattr(run, name) for run in runs])) * 1e3 for name in ("alone", "behind", "long")
    )
    chunk = max(run.chunk for run in runs) * 1e3
    place = (engine, cell.context, cell.batch, max_step_ms)
    return TrafficRow(*place, p50, p95, p99, float(gaps.max()), chunk, alone, behind, long, list(runs))


def traffic_report(rows: Sequence[TrafficRow], environment: dict[str, Any], command: str) -> dict[str, Any]:
    """The content of the JSON file."""
    return {"command": command, "environment": environment, "traffic": [asdict(row) for row in rows]}
