"""Holdout: settings are chosen on one half of a run's items and reported on the other half."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.records import AVERAGE, FULL, Prediction
from ov_kvcrush.eval.report.tables import (
    Grid,
    difference_cells,
    in_percent,
    kept_label,
    policy_label,
    row_label,
    score_cells,
    sorted_rows,
)
from ov_kvcrush.eval.runs.run_folder import Run
from ov_kvcrush.eval.statistics import ResultRow, result_rows
from ov_kvcrush.utils.checks import check_choice
from ov_kvcrush.utils.json_file import write_file

ENOUGH = 4  # settings of one budget: with that many, the best one owes part of its score to luck


class Judged(NamedTuple):
    """A setting's average over the tasks, on the first and on the second half."""

    first: ResultRow
    second: ResultRow


@dataclass(frozen=True)
class HoldoutChoice:
    """The setting with the best score on the first half, among those of one budget, precision, query and engine.

    policy: among the settings of this policy; None = of all policies that evict. num_settings: how many those are.
    """

    best: Judged
    num_settings: int
    policy: str | None = None


@dataclass(frozen=True)
class Holdout:
    """Both halves of a run.

    judged: every setting, in the order of the tables. chosen: for each budget, precision, query and engine the best
    setting, and the best one of each policy that has ENOUGH settings there.
    """

    judged: tuple[Judged, ...]
    chosen: tuple[HoldoutChoice, ...]

    @property
    def json(self) -> dict[str, Any]:
        """For a file."""
        return {
            "settings": [_json(one) for one in self.judged],
            "chosen": [
                {**_json(one.best), "num_settings": one.num_settings, "policy": one.policy} for one in self.chosen
            ],
        }


def split(predictions: Iterable[Prediction]) -> tuple[list[Prediction], list[Prediction]]:
    """Split the items of every task, sorted by id, alternately into a first and a second half.

    Tasks with a single item are in neither half, so that both halves have the same tasks.
    """
    predictions = list(predictions)
    items: dict[str, set[str]] = {}
    for p in predictions:
        items.setdefault(p.task, set()).add(p.item_id)
    half = {(task, item): n % 2 for task, ids in items.items() if len(ids) > 1 for n, item in enumerate(sorted(ids))}
    first = [p for p in predictions if half.get((p.task, p.item_id)) == 0]
    return first, [p for p in predictions if half.get((p.task, p.item_id)) == 1]


def holdout_of(run: Run, engine: str | None = None) -> Holdout:
    """Both halves of a run, for one engine or for all. Ties on the first half go to the first setting of the run.

    Raises CrushError for an engine that did not run, and if no task has two items.
    """
    engines = dict.fromkeys(setting.engine for setting in run.config.settings)
    if engine is not None:
        check_choice("--engine", engine, engines)
    settings = [setting for setting in run.config.settings if engine in (None, setting.engine)]
    known = {setting.key for setting in settings}
    both = split(prediction for prediction in run.predictions if prediction.setting_key in known)
    if not all(both):
        raise CrushError(f"run must have a task of two items to be halved, got none in {str(run.folder)!r}")
    first, second = (
        [row for row in result_rows(half, settings, run.config.suite, seed=run.config.seed) if row.task == AVERAGE]
        for half in both
    )
    judged = [Judged(*rows) for rows in zip(first, second, strict=True)]
    groups: dict[tuple[object, ...], list[Judged]] = {}
    for one in judged:
        if one.first.policy != FULL:
            groups.setdefault(_group(one.first), []).append(one)
    order = {row_label(row): place for place, row in enumerate(sorted_rows(first))}
    judged.sort(key=lambda one: order[row_label(one.first)])
    chosen = [one for group in groups.values() for one in _choose(group)]
    chosen.sort(key=lambda one: (order[row_label(one.best.first)], one.policy is not None))
    return Holdout(tuple(judged), tuple(chosen))


def worth_showing(run: Run) -> bool:
    """Whether some budget has ENOUGH settings, and some task two items."""
    groups: dict[tuple[object, ...], int] = {}
    for row in run.rows:
        if row.task == AVERAGE and row.policy != FULL:
            groups[_group(row)] = groups.get(_group(row), 0) + 1
    return max(groups.values(), default=0) >= ENOUGH and all(split(run.predictions))


def chosen_grid(holdout: Holdout) -> Grid:
    """A line for each choice: the setting chosen on the first half, among how many, and its score on the second."""
    rows = [one.best.second for one in holdout.chosen]
    engine, query = _several(rows, "engine"), _several(rows, "query")
    header = (
        *("kept", "keys/values"), *(("query",) if query else ()), *(("engine",) if engine else ()),
        "among", "chosen",
    )  # fmt: skip
    numbers = ("of settings", "difference there", "n", "score", "full score", "difference", "95 % interval")
    lines = []
    for one in holdout.chosen:
        row = one.best.second
        names = [kept_label(row), row.precisions, *([row.query] if query else ()), *([row.engine] if engine else ())]
        there = difference_cells(one.best.first)[0]
        chosen = (one.policy or "all policies", policy_label(row), str(one.num_settings))
        lines.append((*names, *chosen, there, str(row.n), *score_cells(row)))
    return Grid((*header, *numbers), tuple(lines), len(header))


def judged_grid(holdout: Holdout) -> Grid:
    """A line for each setting: its difference to the full cache on both halves."""
    query = _several([one.first for one in holdout.judged], "query")
    header = ("policy", "kept", "keys/values", *(("query",) if query else ()))
    numbers = (
        *("n first", "difference first", "95 % interval first"),
        *("n second", "difference second", "95 % interval second"),
    )
    lines = []
    for first, second in holdout.judged:
        names = (policy_label(first), kept_label(first), first.precisions, *((first.query,) if query else ()))
        cells = (cell for row in (first, second) for cell in (str(row.n), *difference_cells(row)))
        lines.append((*names, *cells))
    return Grid((*header, *numbers), tuple(lines), len(header))


def markdown(holdout: Holdout) -> str:
    """Both tables with a sentence above each."""
    return "\n".join(
        (
            "Selection on the first half of the items (of every task, in turn by their ids), shown on the second:\n",
            chosen_grid(holdout).markdown(),
            "Differences to the full cache on both halves:\n",
            judged_grid(holdout).markdown(),
        )
    )


def write_page(holdout: Holdout, path: Path) -> None:
    """Write `markdown` to a file, whole or not at all. Raises CrushError if that fails."""
    write_file(path, "markdown", markdown(holdout).encode())


def _choose(group: list[Judged]) -> Iterable[HoldoutChoice]:
    yield HoldoutChoice(max(group, key=_gain), len(group))
    by_policy: dict[str, list[Judged]] = {}
    for one in group:
        by_policy.setdefault(one.first.policy, []).append(one)
    for policy, its in by_policy.items():
        if ENOUGH <= len(its) < len(group):
            yield HoldoutChoice(max(its, key=_gain), len(its), policy)


def _group(row: ResultRow) -> tuple[object, ...]:
    amounts = row.kept, row.settings.get("kept_tokens"), row.settings.get("budget")
    return row.engine, *amounts, row.precisions, row.query


def _gain(one: Judged) -> float:
    """Gain over the full cache on the first half; for a loss, less is better."""
    return one.first.difference if in_percent(one.first.suite) else -one.first.difference


def _several(rows: Sequence[ResultRow], field: str) -> bool:
    return len({getattr(row, field) for row in rows}) > 1


def _json(one: Judged) -> dict[str, Any]:
    return {"label": row_label(one.first), "first": asdict(one.first), "second": asdict(one.second)}
