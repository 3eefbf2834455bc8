"""What a run of fidelity says of each setting: KL divergence, agreement, and what the reference's loss becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from ov_kvcrush.eval.records import AVERAGE
from ov_kvcrush.eval.report.tables import Grid, cost_cells, divergence_cells, kept_label, policy_label, sorted_rows
from ov_kvcrush.eval.runs.run_folder import Run
from ov_kvcrush.eval.statistics import ResultRow, result_rows

_TAIL = 0.95


def fidelity_rows(run: Run) -> list[dict[str, Any]]:
    """The run's rows with what else was measured.

    kl_low, kl_high: the interval of kl_mean. kl_q95: over prompts. loss, full_loss, loss_difference, loss_low,
    loss_high: of the reference, nats per token, over the prompts that have one; None without any.
    """
    return [asdict(row) | more for row, more in _with_more(run)]


def fidelity_grid(run: Run) -> Grid:
    """A line per setting, on the average of the tasks."""
    found = [(row, more) for row, more in _with_more(run) if row.task == AVERAGE]
    beside = {id(row): more for row, more in found}
    queries = len({row.query for row, _ in found}) > 1
    names = ("policy", "kept", "keys/values", *(("query",) if queries else ()))
    numbers = ("n", "KL mean", "95 % interval", "KL median", "KL q95", "same top %", "loss change")
    costs = ("kept tokens", "bytes per prompt token")
    lines = []
    for row in sorted_rows([row for row, _ in found]):
        more = beside[id(row)]
        mean, median, top = divergence_cells(row)
        loss = "" if more["loss"] is None else f"{more['loss_difference']:+.4f}"
        lines.append(
            (
                policy_label(row), kept_label(row), row.precisions, *((row.query,) if queries else ()), str(row.n),
                mean, f"{row.low:.3f} to {row.high:.3f}", median, f"{more['kl_q95']:.4f}", top, loss, *cost_cells(row),
            )
        )  # fmt: skip
    return Grid((*names, *numbers, *costs), tuple(lines), len(names))


def _with_more(run: Run) -> list[tuple[ResultRow, dict[str, Any]]]:
    tails = _tails(run)
    losses = _by_place(run, _losses(run))
    found = []
    for place, row in _by_place(run, run.rows).items():
        loss = losses.get(place)
        more = {
            "kl_low": row.low,
            "kl_high": row.high,
            "kl_q95": tails[place],
            "loss": loss.score if loss else None,
            "full_loss": loss.full_score if loss else None,
            "loss_difference": loss.difference if loss else None,
            "loss_low": loss.low if loss else None,
            "loss_high": loss.high if loss else None,
        }
        found.append((row, more))
    return found


def _by_place(run: Run, rows: Sequence[ResultRow]) -> dict[tuple[str, str], ResultRow]:
    """By task and setting: the rows of a task come in the order of the settings."""
    keys = [setting.key for setting in run.config.settings]
    return {(row.task, keys[i % len(keys)]): row for i, row in enumerate(rows)}


def _losses(run: Run) -> list[ResultRow]:
    """Rows whose score is the loss; tasks without references are not among them."""
    found = [replace(p, score=p.loss) for p in run.predictions if p.loss is not None]
    return result_rows(found, run.config.settings, run.config.suite, seed=run.config.seed) if found else []


def _tails(run: Run) -> dict[tuple[str, str], float]:
    """The 95th percentile over prompts by task and setting; of the average, the mean of the tasks'."""
    values: dict[tuple[str, str], list[float]] = {}
    for p in run.predictions:
        values.setdefault((p.task, p.setting_key), []).append(p.score)
    tails = {place: float(np.quantile(kl, _TAIL)) for place, kl in values.items()}
    tasks = list(dict.fromkeys(task for task, _ in tails))
    keys = [setting.key for setting in run.config.settings]
    tails |= {(AVERAGE, key): float(np.mean([tails[task, key] for task in tasks])) for key in keys}
    return tails
