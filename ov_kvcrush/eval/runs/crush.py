"""Our own engine on the items of a run: a context is read once for all settings, and its questions go in batches.

Beside its answer each setting is compared with the full cache, along that one's own answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ov_kvcrush.config import CacheConfig, SchedulerConfig
from ov_kvcrush.contexts.context import Context
from ov_kvcrush.core.sampling_params import model_end_tokens
from ov_kvcrush.core.staged_prompt import StagedPrompt
from ov_kvcrush.engine.draw import log_softmax_at
from ov_kvcrush.eval.benchmarks.items import Task
from ov_kvcrush.eval.likelihood.divergence import Reference, log_softmax
from ov_kvcrush.eval.records import FULL, bits
from ov_kvcrush.eval.runs.answers import Answer, generation_config
from ov_kvcrush.eval.runs.context_rows import ContextRows, Tail
from ov_kvcrush.eval.runs.plan import CacheKey, Planned, cache_of
from ov_kvcrush.eval.runs.prompts import ItemPrompts, QuestionPrompt
from ov_kvcrush.pipelines.llm import LLMPipeline
from ov_kvcrush.policies.base import Replay

BATCH = 96  # sequences that are answered together
AWARE_BATCH = 16  # questions that are answered together where each has caches of its own
MOST_ROWS = 64  # of an answer, along which caches are compared
REFERENCE_TOKENS = 128  # of a reference whose loss is measured, the first ones

Key = tuple[str, int]  # of a setting, and the index of a question


@dataclass(frozen=True, eq=False)
class _Cache:
    """What a setting left of a context."""

    planned: Planned
    context: Context
    pipeline: LLMPipeline

    @property
    def key(self) -> str:
        return self.planned.setting.key


@dataclass(frozen=True, eq=False)
class _Asked:
    """A question, and its tokens int64 (T,) that follow the context."""

    prompt: QuestionPrompt
    ids: np.ndarray


_Group = tuple[list[_Cache], list[_Asked]]  # questions that are asked of the same caches


class _Written(NamedTuple):
    text: str
    ids: list[int]
    seconds: float


class CrushRuns:
    """Our own engine on one model, with a store for each of the precisions and budgets.

    caches: by `cache_of`. Each store is as large as if it were alone: half of the memory that is free now.
    compares: whether settings are compared with the full cache beside their scores.
    """

    def __init__(
        self,
        model: Path,
        caches: Mapping[CacheKey, CacheConfig],
        properties: Mapping[str, Any],
        *,
        compares: bool = True,
    ) -> None:
        first, *others = caches
        # Nothing is kept for later prompts: what a setting costs does not depend on what came before.
        alone = SchedulerConfig(enable_prefix_caching=False)
        self._reader = LLMPipeline(model, "CPU", dict(properties), cache_config=caches[first], scheduler_config=alone)
        self._pipelines = {first: self._reader, **{name: self._reader.with_cache(caches[name]) for name in others}}
        self._rows = ContextRows(self._reader)
        config = self._reader.get_generation_config()
        self._ends = model_end_tokens(config)
        self._compares = compares

    def answer(self, prompts: ItemPrompts, task: Task, planned: Sequence[Planned]) -> Iterator[Answer]:
        """Answers to all questions of an item under settings of one query."""
        if planned[0].setting.query == "agnostic":
            with ExitStack() as stack:
                caches = self._compress(prompts.ids, prompts.head, planned, stack)
                yield from self._ask(task, [(caches, [_Asked(asked, asked.ids) for asked in prompts.asked])])
            return
        with ExitStack() as staging:
            # Where several questions follow a context it is read once for all.
            shares = len(prompts.asked) > 1
            staged = staging.enter_context(self._reader.stage_ids(prompts.ids)) if shares else None
            for begin in range(0, len(prompts.asked), AWARE_BATCH):
                with ExitStack() as stack:
                    asked: list[_Group] = []
                    for one in prompts.asked[begin : begin + AWARE_BATCH]:
                        # The policy sees all but the last token, which begins the answer.
                        ids = np.concatenate([prompts.ids, one.ids[:-1]])
                        caches = self._compress(
                            ids, prompts.head, planned, stack, staged if len(one.ids) > 1 else None, asks=True
                        )
                        asked.append((caches, [_Asked(one, one.ids[-1:])]))
                    yield from self._ask(task, asked)

    def _ask(self, task: Task, groups: Sequence[_Group]) -> Iterator[Answer]:
        """Answers to questions, those of each group on the same caches."""
        written = self._write(task, groups)
        for caches, asked in groups:
            full = _full(caches)
            found = {(c.key, one.prompt.index): self._answer(task, c, one, written) for c in caches for one in asked}
            for one in asked:
                if self._compares or task.is_compared:
                    self._compare(caches, full, one, written[full.key, one.prompt.index].ids, found)
                if one.prompt.forced:
                    self._force(task, caches, one, found)
            yield from found.values()

    def _compress(
        self,
        ids: np.ndarray,
        head: int,
        planned: Sequence[Planned],
        stack: ExitStack,
        staged: StagedPrompt | None = None,
        *,
        asks: bool = False,
    ) -> list[_Cache]:
        """A context of each setting, closed with `stack`. Each way of replaying a prompt is a prefill."""
        replays = [p.policy.inputs.replay if p.policy.evicts else None for p in planned]
        second: list[Replay | None] = [*dict.fromkeys(replay for replay in replays if replay is not None)] or [None]
        made: dict[str, _Cache] = {}
        for replay in second:
            now = [p for p, own in zip(planned, replays, strict=True) if (second[0] if own is None else own) == replay]
            homes = [self._pipelines[cache_of(p.setting)] for p in now]
            policies = [p.policy for p in now]
            contexts = self._reader.compress_ids(ids, policies, pipelines=homes, head=head, staged=staged, asks=asks)
            for p, context, home in zip(now, contexts, homes, strict=True):
                made[p.setting.key] = _Cache(p, stack.enter_context(context), home)
        return [made[p.setting.key] for p in planned]

    # -- answers -------------------------------------------------------------------------------------------------------

    def _write(self, task: Task, groups: Sequence[_Group]) -> dict[Key, _Written]:
        """What is written: by the full cache alone where answers are chosen, or not scored."""
        written: dict[Key, _Written] = {}
        wanted = [
            (cache, one)
            for caches, asked in groups
            for cache in caches
            for one in asked
            if cache is _full(caches) or not (one.prompt.forced or task.is_compared)
        ]
        for home in dict.fromkeys(cache.pipeline for cache, _ in wanted):
            for length in dict.fromkeys(one.prompt.question.max_new_tokens for _, one in wanted):
                same = [
                    (cache, one)
                    for cache, one in wanted
                    if cache.pipeline is home and one.prompt.question.max_new_tokens == length
                ]
                for begin in range(0, len(same), BATCH):
                    batch = same[begin : begin + BATCH]
                    config, start = generation_config(home, task, length), time.perf_counter()
                    found = home.answer_each_with_ids([(cache.context, one.ids) for cache, one in batch], config)
                    seconds = (time.perf_counter() - start) / len(batch)
                    for (cache, one), (text, ids) in zip(batch, found, strict=True):
                        written[cache.key, one.prompt.index] = _Written(text, ids, seconds)
        return written

    def _answer(self, task: Task, cache: _Cache, asked: _Asked, written: Mapping[Key, _Written]) -> Answer:
        said = written.get((cache.key, asked.prompt.index), _Written("", [], 0.0))
        return Answer(
            planned=cache.planned,
            asked=asked.prompt,
            text="" if asked.prompt.forced and not task.is_compared else said.text,
            kept_tokens=float(cache.context.kept_tokens),
            prompt_tokens=cache.context.num_tokens + len(asked.ids),
            num_bytes=cache.context.nbytes,
            seconds=said.seconds,
        )

    # -- beside them ---------------------------------------------------------------------------------------------------

    def _compare(
        self, caches: Sequence[_Cache], full: _Cache, asked: _Asked, answer: Sequence[int], found: dict[Key, Answer]
    ) -> None:
        """Note how far each cache is from the full one, along its answer."""
        said = np.array([token for token in answer if token not in self._ends][: MOST_ROWS - 1], np.int64)
        tokens, skip = np.concatenate([asked.ids, said]), len(asked.ids) - 1
        ((_, logits),) = self._rows.logits([_tail(full, full, tokens, skip)])
        reference = Reference(log_softmax(logits))
        for cache, logits in self._rows.logits(_tail(cache, cache, tokens, skip) for cache in caches):
            key = cache.key, asked.prompt.index
            kl, top1 = reference.compare(logits)
            found[key] = replace(found[key], kl=kl, top1=top1)

    def _force(self, task: Task, caches: Sequence[_Cache], asked: _Asked, found: dict[Key, Answer]) -> None:
        """Note the likeliest choice, or the loss of the reference."""
        most = REFERENCE_TOKENS if task.is_compared else None
        forced = [ids[:most] for ids in asked.prompt.forced]
        logprobs = {cache.key: [0.0] * len(forced) for cache in caches}
        start = time.perf_counter()
        tails = (
            _tail((cache, place), cache, np.concatenate([asked.ids, ids[:-1]]), len(asked.ids) - 1)
            for cache in caches
            for place, ids in enumerate(forced)
        )
        for (cache, place), logits in self._rows.logits(tails):
            rows = zip(logits, forced[place], strict=True)
            logprobs[cache.key][place] = sum(log_softmax_at(row, int(token)) for row, token in rows)
        seconds = (time.perf_counter() - start) / len(caches)
        for cache in caches:
            key, own = (cache.key, asked.prompt.index), logprobs[cache.key]
            if task.is_compared:
                found[key] = replace(found[key], loss=-own[0] / len(forced[0]), seconds=seconds)
            else:
                found[key] = replace(found[key], text=likeliest(asked.prompt.question.forced, own), seconds=seconds)


def likeliest(choices: Sequence[str], logprobs: Sequence[float]) -> str:
    """The choice with the largest log probability by byte, as lm-evaluation-harness's acc_norm has it."""
    return max(zip(choices, logprobs, strict=True), key=lambda pair: pair[1] / len(pair[0].encode()))[0]


def _full(caches: Sequence[_Cache]) -> _Cache:
    """The most precise full cache."""
    return min((c for c in caches if _is_full(c.planned)), key=lambda c: -bits(c.planned.setting.precisions))


def _is_full(planned: Planned) -> bool:
    return planned.setting.policy == FULL and planned.setting.recall_tokens is None


def _tail(name: Any, cache: _Cache, tokens: np.ndarray, skip: int) -> Tail:
    return Tail(
        name, cache.pipeline, cache.context, tokens, skip, reads_all=cache.planned.setting.recall_tokens is None
    )
