"""Runs a suite: each context is read once for all policies, and all that is asked of it is answered in one batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ov_kvcrush.config import CacheConfig
from ov_kvcrush.context import Context
from ov_kvcrush.eval.genai_runs import GenaiRuns
from ov_kvcrush.eval.items import Task, score
from ov_kvcrush.eval.plan import Planned
from ov_kvcrush.eval.prompts import Asked, ItemPrompts
from ov_kvcrush.eval.replies import Reply, generation_config
from ov_kvcrush.eval.rows import Prediction, Setting, rows_of
from ov_kvcrush.eval.run_folder import Run, RunFolder
from ov_kvcrush.llm_pipeline import LLMPipeline
from ov_kvcrush.policies.base import Replay

BATCH = 96  # sequences that are answered together
Advance = Callable[[int], None]  # answers that are there now


class Runs(Protocol):
    """An engine with one precision, and what it answers."""

    def answer(self, prompts: ItemPrompts, task: Task, planned: Sequence[Planned]) -> Iterator[Reply]: ...


@dataclass(frozen=True, eq=False)
class _Question:
    """What goes into a batch: token ids int64 (T,) that follow a context."""

    planned: Planned
    asked: Asked
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

    One pipeline at a time: of each engine and precision. advance: called with the number of answers that were added,
    first with those that were there. Answers to an item under one pipeline and query are made together or, after a
    stop, together again, so that a run that was stopped has the same answers as one that was not.
    """
    advance(len(folder.predictions))
    for planned in _by_pipeline(plan):
        todo = [p for p in prompts if _missing(folder, p, planned)]
        runs = _runs(model, planned[0].setting, properties) if todo else None
        for one in todo:
            assert runs is not None
            task = tasks[one.item.task]
            for same_query in _grouped(planned, lambda setting: setting.query):
                if _missing(folder, one, same_query):
                    advance(_add(folder, one, task, runs.answer(one, task, same_query)))
        del runs  # before the next model is loaded
    settings = folder.config.settings
    return folder.finish(rows_of(folder.predictions, settings, folder.config.suite, seed=folder.config.seed))


class CrushRuns:
    """Our own engine with one precision."""

    def __init__(self, pipeline: LLMPipeline) -> None:
        self._pipeline = pipeline

    def answer(self, prompts: ItemPrompts, task: Task, planned: Sequence[Planned]) -> Iterator[Reply]:
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
        questions: Sequence[tuple[Asked, np.ndarray]],
        planned: Sequence[Planned],
    ) -> Iterator[Reply]:
        contexts = self._compress(context, head, planned)
        batch = [_Question(p, a, c, ids) for p, c in zip(planned, contexts, strict=True) for a, ids in questions]
        replies: dict[tuple[str, int], Reply] = {}
        for length in dict.fromkeys(q.asked.question.max_new_tokens for q in batch):
            same = [q for q in batch if q.asked.question.max_new_tokens == length]
            for begin in range(0, len(same), BATCH):
                for reply in self._answer_batch(task, length, same[begin : begin + BATCH]):
                    replies[reply.planned.setting.key, reply.asked.index] = reply
        for used in contexts:
            used.close()
        yield from (replies[p.setting.key, a.index] for p in planned for a, _ in questions)

    def _compress(self, ids: np.ndarray, head: int, planned: Sequence[Planned]) -> list[Context]:
        """A context for each setting. One reading has one second reading at most."""
        replays = [p.policy.needs.replay if p.policy.evicts else None for p in planned]
        second: list[Replay | None] = [*dict.fromkeys(replay for replay in replays if replay is not None)] or [None]
        made: dict[int, Context] = {}
        for replay in second:
            places = [i for i, own in enumerate(replays) if (second[0] if own is None else own) == replay]
            contexts = self._pipeline.compress_ids(ids, [planned[i].policy for i in places], head=head)
            made.update(zip(places, contexts, strict=True))
        return [made[i] for i in range(len(planned))]

    def _answer_batch(self, task: Task, max_new_tokens: int, batch: Sequence[_Question]) -> list[Reply]:
        config = generation_config(self._pipeline, task, max_new_tokens)
        start = time.perf_counter()
        texts = self._pipeline.answer_each([(q.context, q.ids) for q in batch], config)
        seconds = (time.perf_counter() - start) / len(batch)
        return [
            Reply(
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


def _runs(model: Path, setting: Setting, properties: Mapping[str, Any]) -> Runs:
    """The engine and precision of a setting, with the model loaded."""
    key, value = setting.key_precision, setting.value_precision
    if setting.engine == "genai":
        return GenaiRuns(model, key, value, properties)
    cache = CacheConfig(key_precision=key, value_precision=value, attention="crush")
    return CrushRuns(LLMPipeline(model, "CPU", dict(properties), cache_config=cache))


def _by_pipeline(plan: Sequence[Planned]) -> list[list[Planned]]:
    """Settings that one pipeline answers: of ours all with its precision, of openvino_genai one."""
    return _grouped(plan, lambda s: (s.engine, s.precisions, s.key if s.engine == "genai" else ""))


def _grouped(plan: Sequence[Planned], key: Callable[[Setting], Any]) -> list[list[Planned]]:
    """The plan in parts of equal keys, both in the order in which they first appear."""
    found: dict[Any, list[Planned]] = {}
    for planned in plan:
        found.setdefault(key(planned.setting), []).append(planned)
    return list(found.values())


def _missing(folder: RunFolder, prompts: ItemPrompts, planned: Sequence[Planned]) -> bool:
    done, item = folder.done(), prompts.item
    wanted = ((item.task, item.id, a.index, p.setting.key) for a in prompts.asked for p in planned)
    return any(key not in done for key in wanted)


def _add(folder: RunFolder, prompts: ItemPrompts, task: Task, replies: Iterator[Reply]) -> int:
    """Write what is not there yet, and return how many that were."""
    done, made = folder.done(), [_prediction(prompts, task, reply) for reply in replies]
    new = [prediction for prediction in made if prediction.key not in done]
    for prediction in new:
        folder.add(prediction)
    return len(new)


def _prediction(prompts: ItemPrompts, task: Task, reply: Reply) -> Prediction:
    return Prediction(
        item_id=prompts.item.id,
        task=prompts.item.task,
        question_index=reply.asked.index,
        turn=reply.asked.turn,
        setting_key=reply.planned.setting.key,
        text=reply.text,
        score=score(task, reply.text, reply.asked.question),
        kept_tokens=reply.kept_tokens,
        prompt_tokens=reply.prompt_tokens,
        bytes=reply.num_bytes,
        seconds=reply.seconds,
    )
