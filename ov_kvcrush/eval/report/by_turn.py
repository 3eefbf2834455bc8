"""Scores by turn of a conversation, or by number of the question about a context."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ov_kvcrush.eval.records import AVERAGE, Prediction
from ov_kvcrush.eval.runs.run_folder import Run
from ov_kvcrush.eval.statistics import BY_QUESTION, ResultRow, result_rows


@dataclass(frozen=True)
class ByTurn:
    """Result rows by turn.

    name: "turn" for conversations, "question" for items whose questions follow the context alone.
    rows: for `tables.by_task`, with "turn 1", "turn 2", ... in place of tasks; the average is that of the run.
    """

    name: str
    rows: tuple[ResultRow, ...]


def by_turn(run: Run) -> ByTurn | None:
    """Rows for the first, second, ... turn or question: averages of the tasks that have it.

    None if every item has a single one, and where contexts have different questions, whose numbers say nothing.
    """
    if run.config.suite in BY_QUESTION:
        return None
    name = "turn" if any(prediction.turn for prediction in run.predictions) else "question"
    found: dict[int, list[Prediction]] = {}
    for prediction in run.predictions:
        place = prediction.turn if name == "turn" else prediction.question_index
        found.setdefault(place, []).append(prediction)
    if len(found) < 2:
        return None
    rows = [row for row in run.rows if row.task == AVERAGE]
    for place in sorted(found):
        made = result_rows(found[place], run.config.settings, run.config.suite, seed=run.config.seed)
        rows += [replace(row, task=f"{name} {place + 1}") for row in made if row.task == AVERAGE]
    return ByTurn(name, tuple(rows))
