"""Runs a suite: each context is prefilled once for all policies and precisions; its questions are answered in batches,
one for each precision.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ov_kvcrush.config import CacheConfig
from ov_kvcrush.contexts.context import Context
from ov_kvcrush.eval.benchmarks.items import Task, score
from ov_kvcrush.eval.benchmarks.longgen import SUITE as LONGGEN
from ov_kvcrush.eval.records import Prediction
from ov_kvcrush.eval.runs.answers import Answer, generation_config
from ov_kvcrush.eval.runs.genai import GenaiRuns
from ov_kvcrush.eval.runs.long_answers import long_runs
from ov_kvcrush.eval.runs.plan import CacheKey, Planned, cache_of, caches_of, grouped, precisions_of
from ov_kvcrush.eval.runs.prompts import ItemPrompts, QuestionPrompt
from ov_kvcrush.eval.runs.run_folder import Run, RunFolder
from ov_kvcrush.eval.statistics import result_rows
from ov_kvcrush.pipelines.llm import LLMPipeline
from ov_kvcrush.policies.base import Replay

BATCH = 96  # sequences that are answered together
Advance = Callable[[int], None]  # told how many answers were added


class Runs(Protocol):
    """An engine that answers the questions of items."""

    def answer(self, prompts: ItemPrompts, task: Task, planned: Sequence[Planned]) -> Iterator[Answer]: ...


@dataclass(frozen=True, eq=False)
class _Question:
    """One row of a batch: token ids int64 (T,) that follow a context."""

    planned: Planned
    asked: QuestionPrompt
    context: Context
    ids: np.ndarray


def run_suite(
    folder: RunFolder,
    prompts: Sequence[ItemPrompts],
    tasks: Mapping[str, Task],
    plan: Sequence[Planned],
    model: Path,
    properties: Mapping[str, Any],
    advance: Advance = lambda number: None,
) -> Run:
    """Answer what the folder does not have yet, and finish it.

    One model is loaded at a time: ours once for all its settings, openvino_genai for each. All answers to an item under
    one model, precision and query come from one batch, and are generated again together if the run stopped among them:
    a resumed run has the same answers as an uninterrupted one, whatever other precisions run.
    advance: told the number of answers that were added; first, those that were there already.
    """
    advance(len(folder.predictions))
    for planned in _by_model(plan):
        todo = [p for p in prompts if _missing(folder, p, planned)]
        runs = _runs(model, planned, properties, folder.config.suite) if todo else None
        for one in todo:
            assert runs is not None
            task = tasks[one.item.task]
            for same_query in grouped(planned, lambda setting: setting.query):
                if _missing(folder, one, same_query):
                    advance(_add(folder, one, task, runs.answer(one, task, same_query)))
        del runs  # before the next model is loaded
    settings = folder.config.settings
    return folder.finish(result_rows(folder.predictions, settings, folder.config.suite, seed=folder.config.seed))


class CrushRuns:
    """Our own engine on one model, with a store for each of the precisions and budgets.

    caches: by `cache_of`. Each store is as large as if it were alone: half of the memory that is free now.
    """

    def __init__(self, model: Path, caches: Mapping[CacheKey, CacheConfig], properties: Mapping[str, Any]) -> None:
        first, *others = caches
        self._reader = LLMPipeline(model, "CPU", dict(properties), cache_config=caches[first])
        self._pipelines = {first: self._reader, **{name: self._reader.with_cache(caches[name]) for name in others}}

    def answer(self, prompts: ItemPrompts, task: Task, planned: Sequence[Planned]) -> Iterator[Answer]:
        """Answers to all questions of an item under settings of one query."""
        if planned[0].setting.query == "agnostic":
            yield from self._ask(task, prompts.ids, prompts.head, [(a, a.ids) for a in prompts.asked], planned)
            return
        for asked in prompts.asked:  # the policy sees all but the last token, which begins the answer
            context = np.concatenate([prompts.ids, asked.ids[:-1]])
            yield from self._ask(task, context, prompts.head, [(asked, asked.ids[-1:])], planned)

    def _ask(
        self,
        task: Task,
        context: np.ndarray,
        head: int,
        questions: Sequence[tuple[QuestionPrompt, np.ndarray]],
        planned: Sequence[Planned],
    ) -> Iterator[Answer]:
        answers: dict[tuple[str, int], Answer] = {}
        with ExitStack() as stack:
            contexts = self._compress(context, head, planned, stack)
            for same in grouped(planned, cache_of):
                batch = [_Question(p, a, contexts[p.setting.key], ids) for p in same for a, ids in questions]
                for answer in self._answer(task, self._pipelines[cache_of(same[0].setting)], batch):
                    answers[answer.planned.setting.key, answer.asked.index] = answer
        yield from (answers[p.setting.key, a.index] for p in planned for a, _ in questions)

    def _compress(self, ids: np.ndarray, head: int, planned: Sequence[Planned], stack: ExitStack) -> dict[str, Context]:
        """A context by the key of each setting, closed with `stack`. Each way of replaying a prompt is a prefill."""
        replays = [p.policy.inputs.replay if p.policy.evicts else None for p in planned]
        second: list[Replay | None] = [*dict.fromkeys(replay for replay in replays if replay is not None)] or [None]
        made: dict[str, Context] = {}
        for replay in second:
            now = [p for p, own in zip(planned, replays, strict=True) if (second[0] if own is None else own) == replay]
            homes = [self._pipelines[cache_of(p.setting)] for p in now]
            contexts = self._reader.compress_ids(ids, [p.policy for p in now], pipelines=homes, head=head)
            made.update((p.setting.key, stack.enter_context(c)) for p, c in zip(now, contexts, strict=True))
        return made

    def _answer(self, task: Task, pipeline: LLMPipeline, questions: Sequence[_Question]) -> Iterator[Answer]:
        for length in dict.fromkeys(q.asked.question.max_new_tokens for q in questions):
            same = [q for q in questions if q.asked.question.max_new_tokens == length]
            for begin in range(0, len(same), BATCH):
                yield from _answer_batch(task, pipeline, length, same[begin : begin + BATCH])


def _answer_batch(task: Task, pipeline: LLMPipeline, max_new_tokens: int, batch: Sequence[_Question]) -> list[Answer]:
    config = generation_config(pipeline, task, max_new_tokens)
    start = time.perf_counter()
    texts = pipeline.answer_each([(q.context, q.ids) for q in batch], config)
    seconds = (time.perf_counter() - start) / len(batch)
    return [
        Answer(
            planned=q.planned,
            asked=q.asked,
            text=text,
            kept_tokens=float(q.context.kept_tokens),
            prompt_tokens=q.context.num_tokens + len(q.ids),
            num_bytes=q.context.nbytes,
            seconds=seconds,
        )
        for q, text in zip(batch, texts, strict=True)
    ]


def _runs(model: Path, planned: Sequence[Planned], properties: Mapping[str, Any], suite: str) -> Runs:
    """The engine for these settings, with the model loaded."""
    if suite == LONGGEN:
        return long_runs(model, planned, properties)
    first = planned[0].setting
    if first.engine == "genai":
        return GenaiRuns(model, *precisions_of(first), properties)
    return CrushRuns(model, caches_of(planned), properties)


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
    return Prediction(
        item_id=prompts.item.id,
        task=prompts.item.task,
        question_index=answer.asked.index,
        turn=answer.asked.turn,
        setting_key=answer.planned.setting.key,
        text=answer.text,
        score=score(task, answer.text, answer.asked.question),
        kept_tokens=answer.kept_tokens,
        prompt_tokens=answer.prompt_tokens,
        bytes=answer.num_bytes,
        seconds=answer.seconds,
    )
