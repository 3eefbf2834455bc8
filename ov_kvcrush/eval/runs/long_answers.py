"""Long answers: every setting is a request of its own, whose policy chooses again while the answer is written."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ov_kvcrush.config import CacheConfig
from ov_kvcrush.core.cache_params import CacheParams
from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.benchmarks.items import Task
from ov_kvcrush.eval.benchmarks.longgen import SUITE, TASKS, loss_text
from ov_kvcrush.eval.likelihood.forcing import ForcedEngine
from ov_kvcrush.eval.likelihood.pipeline import ScoringPipeline
from ov_kvcrush.eval.runs.answers import Answer, greedy
from ov_kvcrush.eval.runs.genai import GenaiRuns
from ov_kvcrush.eval.runs.plan import CacheKey, Planned, cache_of, caches_of, grouped, precisions_of
from ov_kvcrush.eval.runs.prompts import ItemPrompts, QuestionPrompt
from ov_kvcrush.genai.eviction import GenaiEviction, closest_genai_eviction
from ov_kvcrush.pipelines.backend import Handle


class LongRuns:
    """Our own engine on one model. All settings of a question and a precision run in one batch."""

    def __init__(self, model: Path, caches: Mapping[CacheKey, CacheConfig], properties: Mapping[str, Any]) -> None:
        self._pipeline = ScoringPipeline(model, "CPU", "crush", next(iter(caches.values())), None, dict(properties))
        self._engines = {name: self._pipeline.make_engine(cache, SUITE) for name, cache in caches.items()}

    def answer(self, prompts: ItemPrompts, task: Task, planned: Sequence[Planned]) -> Iterator[Answer]:
        """Answers to all questions of an item. Policies see the whole prompt, question included."""
        for asked in prompts.asked:
            ids = np.concatenate([prompts.ids, asked.ids])
            for same in grouped(planned, cache_of):
                yield from self._batch(task, asked, ids, self._engines[cache_of(same[0].setting)], same)

    def _batch(
        self, task: Task, asked: QuestionPrompt, ids: np.ndarray, engine: ForcedEngine, planned: Sequence[Planned]
    ) -> list[Answer]:
        params = [CacheParams(policy=one.policy) for one in planned]
        start = time.perf_counter()
        run = self._forced if task.is_forced else self._written
        answers = run(task, asked, ids, engine, params)
        seconds = (time.perf_counter() - start) / len(planned)
        return [
            Answer(one, asked, a.text, float(a.kept_tokens), len(ids) + a.num_tokens, a.kv_bytes, seconds)
            for one, a in zip(planned, answers, strict=True)
        ]

    def _written(
        self, task: Task, asked: QuestionPrompt, ids: np.ndarray, engine: ForcedEngine, params: Sequence[CacheParams]
    ) -> list[_LongAnswer]:
        config = greedy(self._pipeline.get_config(), task, asked.question.max_new_tokens)
        return [_answer(handle, self._pipeline) for handle in engine.write((ids, config, own) for own in params)]

    def _forced(
        self, task: Task, asked: QuestionPrompt, ids: np.ndarray, engine: ForcedEngine, params: Sequence[CacheParams]
    ) -> list[_LongAnswer]:
        answer = self._pipeline.encode(asked.question.answers[0], add_special_tokens=False)
        return [
            _LongAnswer(loss_text(-s.logprob / len(answer), len(answer)), len(answer), s.kept_tokens, s.kv_bytes)
            for s in engine.force((ids, answer, own) for own in params)
        ]


class _LongAnswer(NamedTuple):
    """num_tokens: of the answer. kept_tokens: that a head held at its end, on average; kv_bytes: of all heads then."""

    text: str
    num_tokens: int
    kept_tokens: int
    kv_bytes: int


def _answer(handle: Handle, pipeline: ScoringPipeline) -> _LongAnswer:
    output, stats = handle.outputs()[0], handle.get_stats()
    ids = output.generated_ids
    text = pipeline.get_tokenizer().decode(ids) if ids and output.text is None else output.text or ""
    return _LongAnswer(text, len(ids), stats.kept_tokens or 0, stats.kv_bytes)


class GenaiLongRuns(GenaiRuns):
    """openvino_genai with one precision. It evicts during generation too, down to one fixed cache size."""

    def _eviction(self, planned: Planned, num_tokens: int) -> GenaiEviction | None:
        policy = planned.policy
        if not policy.evicts:
            return None
        assert policy.budget.kept_tokens is not None, "check_long() refparams fractions"
        return closest_genai_eviction(policy, policy.budget.kept_tokens)

    def _num_tokens(self, prompt: np.ndarray, answer: Sequence[int]) -> int:
        return len(prompt) + len(answer)


def long_runs(model: Path, planned: Sequence[Planned], properties: Mapping[str, Any]) -> LongRuns | GenaiLongRuns:
    """The engine for these settings, with the model loaded; openvino_genai takes one precision."""
    first = planned[0].setting
    if first.engine == "genai":
        return GenaiLongRuns(model, *precisions_of(first), properties)
    return LongRuns(model, caches_of(planned), properties)


def check_long(plan: Sequence[Planned], tasks: Sequence[str]) -> None:
    """Raise CrushError for settings that long answers do not support, before a model is loaded."""
    if any(planned.setting.query != "aware" for planned in plan):
        raise CrushError(f"--query must be aware for {SUITE}, whose policies see all of a prompt, got agnostic")
    forced = [task for task in dict.fromkeys(tasks) if TASKS[task].is_forced]
    theirs = [planned for planned in plan if planned.setting.engine == "genai"]
    if theirs and forced:
        others = ",".join(task for task in TASKS if task not in forced)
        raise CrushError(
            f"--task must be {others} for openvino_genai, which cannot be told what to write, got {', '.join(forced)}"
        )
    for planned in theirs:
        if planned.policy.evicts and planned.policy.budget.kept_tokens is None:
            raise CrushError(
                f"--kept-tokens must be given in place of --kept for openvino_genai in {SUITE}, as its cache has one "
                f"size, got kept={planned.setting.kept}"
            )
