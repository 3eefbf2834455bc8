"""Runs a suite: what its folder does not have yet is answered, item by item."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ov_kvcrush.eval.benchmarks.items import Task, score
from ov_kvcrush.eval.benchmarks.longgen import SUITE as LONGGEN
from ov_kvcrush.eval.records import Prediction
from ov_kvcrush.eval.runs.answers import Answer
from ov_kvcrush.eval.runs.crush import CrushRuns
from ov_kvcrush.eval.runs.genai import GenaiRuns
from ov_kvcrush.eval.runs.long_answers import long_runs
from ov_kvcrush.eval.runs.plan import Planned, caches_of, grouped, precisions_of
from ov_kvcrush.eval.runs.prompts import ItemPrompts
from ov_kvcrush.eval.runs.run_folder import Run, RunFolder
from ov_kvcrush.eval.statistics import result_rows

Advance = Callable[[int], None]  # told how many answers were added


class Runs(Protocol):
    """An engine that answers the questions of items."""

    def answer(self, prompts: ItemPrompts, task: Task, planned: Sequence[Planned]) -> Iterator[Answer]: ...


def run_suite(
    folder: RunFolder,
    prompts: Sequence[ItemPrompts],
    tasks: Mapping[str, Task],
    plan: Sequence[Planned],
    model: Path,
    properties: Mapping[str, Any],
    advance: Advance = lambda number: None,
    *,
    compares: bool = True,
) -> Run:
    """Answer what the folder does not have yet, and finish it.

    One model is loaded at a time: ours once for all its settings, openvino_genai for each. All answers to an item under
    one model, precision and query come from one batch, and are generated again together if the run stopped among them:
    a resumed run has the same answers as an uninterrupted one, whatever other precisions run.
    advance: told the number of answers that were added; first, those that were there already. compares: measure beside
    each score how far our engine's settings are from the full cache, along its own answer; longgen has no such figures.
    """
    advance(len(folder.predictions))
    for planned in _by_model(plan):
        todo = [p for p in prompts if _missing(folder, p, planned)]
        runs = _runs(model, planned, properties, folder.config.suite, compares) if todo else None
        for one in todo:
            assert runs is not None
            task = tasks[one.item.task]
            for same_query in grouped(planned, lambda setting: setting.query):
                if _missing(folder, one, same_query):
                    advance(_add(folder, one, task, runs.answer(one, task, same_query)))
        del runs  # before the next model is loaded
    settings = folder.config.settings
    return folder.finish(result_rows(folder.predictions, settings, folder.config.suite, seed=folder.config.seed))


def _runs(model: Path, planned: Sequence[Planned], properties: Mapping[str, Any], suite: str, compares: bool) -> Runs:
    """The engine for these settings, with the model loaded."""
    if suite == LONGGEN:
        return long_runs(model, planned, properties)
    first = planned[0].setting
    if first.engine == "genai":
        return GenaiRuns(model, *precisions_of(first), properties)
    return CrushRuns(model, caches_of(planned), properties, compares=compares)


def _by_model(plan: Sequence[Planned]) -> list[list[Planned]]:
    """Groups of settings that share a loaded model: all of our engine, each one of openvino_genai."""
    return grouped(plan, lambda s: (s.engine, s.key if s.engine == "genai" else ""))


def _missing(folder: RunFolder, prompts: ItemPrompts, planned: Sequence[Planned]) -> bool:
    done, item = folder.done(), prompts.item
    wanted = ((item.task, item.id, a.index, p.setting.key) for a in prompts.asked for p in planned)
    return any(key not in done for key in wanted)


def _add(folder: RunFolder, prompts: ItemPrompts, task: Task, answers: Iterator[Answer]) -> int:
    """Write the answers that are not there yet; returns their number."""
    done, made = folder.done(), [_prediction(prompts, task, answer) for answer in answers]
    new = [prediction for prediction in made if prediction.key not in done]
    for prediction in new:
        folder.add(prediction)
    return len(new)


def _prediction(prompts: ItemPrompts, task: Task, answer: Answer) -> Prediction:
    if task.is_compared:
        assert answer.kl is not None, "a comparison has compared"
        points = answer.kl
    else:
        points = score(task, answer.text, answer.asked.question)
    return Prediction(
        item_id=prompts.item.id,
        task=prompts.item.task,
        question_index=answer.asked.index,
        turn=answer.asked.turn,
        setting_key=answer.planned.setting.key,
        text=answer.text,
        score=points,
        kept_tokens=answer.kept_tokens,
        prompt_tokens=answer.prompt_tokens,
        bytes=answer.num_bytes,
        seconds=answer.seconds,
        kl=answer.kl,
        top1=answer.top1,
        loss=answer.loss,
    )
