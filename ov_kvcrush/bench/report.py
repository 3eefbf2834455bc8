"""From runs to rows, ratios, and a JSON file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ov_kvcrush.bench.attention.measure import AttentionRow, AttentionSettings
from ov_kvcrush.bench.compare import CellResult, EngineRuns
from ov_kvcrush.bench.measure import RunResult
from ov_kvcrush.bench.settings import EVICTING, OURS, RECALLING, BenchSettings, Cell
from ov_kvcrush.genai.eviction import closest_genai_eviction
from ov_kvcrush.policies.base import Policy
from ov_kvcrush.policies.registry import name_of, settings_of
from ov_kvcrush.utils.process_memory import growth

# Field of a row -> whether more of it is better.
COMPARED = {"ttft_s": False, "tpot_ms": False, "tokens_per_s": True, "kv_bytes": False, "peak_rss_bytes": False}


@dataclass(frozen=True)
class BenchRow:
    """One engine in one cell; times, rates and bytes are medians over the runs, but peak_rss_bytes is of the process.

    policy: its name; of "genai-policy" that of what openvino_genai has instead. kept_tokens: tokens of the prompt that
        stay in the cache, of openvino_genai as it was told. policy_ms, policy_share: see RunResult.
    overhead_ms_per_step: see RunResult; None for an engine that does not tell.
    recall_tokens: what its decode steps read, as CacheConfig.recall_tokens; None = everything.
    attention, key_precision, value_precision: see Storage. is_as_asked: whether these types are the ones asked for.
    kv_bytes, kv_bytes_per_token: see RunResult.
    peak_growth_bytes: largest resident size since the model was loaded, less the one right then: cache, blocks of
        prompts and activations. held_growth_bytes: see RunResult.
    """

    engine: str
    attention: str
    key_precision: str
    value_precision: str
    is_as_asked: bool
    policy: str
    context: int
    batch: int
    new_tokens: int
    kept_tokens: float
    ttft_s: float
    tpot_ms: float
    tokens_per_s: float
    total_tokens_per_s: float
    kv_bytes: int
    kv_bytes_per_token: float | None
    peak_rss_bytes: int | None
    load_peak_rss_bytes: int | None
    peak_growth_bytes: int | None
    held_growth_bytes: float | None
    load_s: float
    policy_ms: float | None
    policy_share: float | None
    overhead_ms_per_step: float | None
    runs: list[RunResult]
    recall_tokens: str | None = None


@dataclass(frozen=True)
class Quotients:
    """Ours divided by theirs. best: smallest time or bytes, largest rate. pairs: each run by the one right after it."""

    of_medians: float
    of_best: float
    pairs_median: float
    pairs_min: float
    pairs_max: float


def make_row(cell: Cell, settings: BenchSettings, engine: EngineRuns) -> BenchRow:
    """Summarise the runs of one engine in one cell."""

    def middle(value: Callable[[RunResult], float]) -> float:
        return median(value(run) for run in engine.runs)

    def middle_if_told(value: Callable[[RunResult], float | None]) -> float | None:
        told = [x for x in map(value, engine.runs) if x is not None]
        return median(told) if told else None

    stored = engine.storage
    kept = middle_if_told(lambda run: run.kept_tokens)
    asked = (settings.key_precision, stored.key_precision), (settings.value_precision, stored.value_precision)
    return BenchRow(
        engine=engine.engine,
        attention=stored.attention,
        key_precision=stored.key_precision,
        value_precision=stored.value_precision,
        is_as_asked=all(wanted in (None, there) for wanted, there in asked),
        policy=_policy_name(settings.policy, engine.engine, cell),
        context=cell.context,
        batch=cell.batch,
        new_tokens=settings.new_tokens,
        kept_tokens=cell.context if kept is None else kept,
        ttft_s=middle(lambda run: run.ttft_s),
        tpot_ms=middle(lambda run: run.tpot_ms),
        tokens_per_s=middle(lambda run: run.tokens_per_s),
        total_tokens_per_s=middle(lambda run: run.total_tokens_per_s),
        kv_bytes=int(middle(lambda run: run.kv_bytes)),
        kv_bytes_per_token=middle_if_told(lambda run: run.kv_bytes_per_token),
        peak_rss_bytes=engine.peak_rss_bytes,
        load_peak_rss_bytes=engine.load_peak_rss_bytes,
        peak_growth_bytes=growth(engine.loaded_rss_bytes, engine.run_peak_rss_bytes),
        held_growth_bytes=middle_if_told(lambda run: run.held_growth_bytes),
        load_s=engine.load_s,
        policy_ms=middle_if_told(lambda run: run.policy_ms),
        policy_share=middle_if_told(lambda run: run.policy_share),
        overhead_ms_per_step=middle_if_told(lambda run: run.overhead_ms_per_step),
        runs=engine.runs,
        recall_tokens=settings.recall_of(engine.engine),
    )


def _policy_name(policy: Policy | None, engine: str, cell: Cell) -> str:
    if policy is None or engine not in (OURS, RECALLING, EVICTING):
        return "none"
    if engine == EVICTING:
        return closest_genai_eviction(policy, policy.budget.tokens(cell.context)).name
    return name_of(policy)


def quotients(ours: Sequence[float], theirs: Sequence[float], more_is_better: bool = False) -> Quotients:
    """Compare two engines' runs; run i of one belongs to run i of the other. All values are above 0."""
    best = max if more_is_better else min
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Quotients(
        of_medians=median(ours) / median(theirs),
        of_best=best(ours) / best(theirs),
        pairs_median=median(pairs),
        pairs_min=min(pairs),
        pairs_max=max(pairs),
    )


def make_ratios(rows: Sequence[BenchRow]) -> list[dict[str, Any]]:
    """One entry for each row of another engine, and of ours with recall, against the row of ours for the same cell."""
    ratios: list[dict[str, Any]] = []
    ours_by_cell = {(row.context, row.batch): row for row in rows if row.engine == OURS}
    for theirs in rows:
        ours = ours_by_cell.get((theirs.context, theirs.batch), theirs)
        if ours is theirs:
            continue
        entry: dict[str, Any] = {
            "engine": ours.engine,
            "against": theirs.engine,
            "context": ours.context,
            "batch": ours.batch,
        }
        for name, more_is_better in COMPARED.items():
            a, b = _values(ours, name), _values(theirs, name)
            known = None not in (*a, *b)
            entry[name] = asdict(quotients(a, b, more_is_better)) if known else None
        ratios.append(entry)
    return ratios


def _values(row: BenchRow, name: str) -> list[Any]:
    """The field's value in each run; a field that only the process has counts as one run."""
    return [getattr(row, name)] if name == "peak_rss_bytes" else [getattr(run, name) for run in row.runs]


def make_rows(results: Sequence[CellResult], settings: BenchSettings) -> list[BenchRow]:
    """All rows, the engines of a cell next to each other."""
    return [make_row(r.cell, settings, engine) for r in results for engine in r.engines]


def make_report(
    rows: Sequence[BenchRow], settings: BenchSettings, environment: Mapping[str, Any], command: str
) -> dict[str, Any]:
    """The content of the JSON file."""
    return {
        "rows": [asdict(row) for row in rows],
        "ratios": make_ratios(rows),
        "environment": dict(environment),
        "settings": {
            **asdict(settings),
            "model": str(settings.model),
            "gguf": settings.gguf and str(settings.gguf),
            "policy": settings.policy and settings_of(settings.policy),
        },
        "command": command,
    }


def make_attention_report(
    rows: Sequence[AttentionRow],
    model: Path,
    settings: AttentionSettings,
    environment: Mapping[str, Any],
    command: str,
) -> dict[str, Any]:
    """The content of the JSON file of attention alone."""
    return {
        "attention": [asdict(row) for row in rows],
        "environment": dict(environment),
        "settings": {**asdict(settings), "model": str(model)},
        "command": command,
    }
