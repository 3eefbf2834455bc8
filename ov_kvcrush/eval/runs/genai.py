"""openvino_genai on the items of a run, driven by engine="genai": every question with its whole prompt."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as ov_genai

from ov_kvcrush.config import CacheConfig, SchedulerConfig
from ov_kvcrush.eval.benchmarks.items import Task
from ov_kvcrush.eval.runs.answers import Answer, greedy
from ov_kvcrush.eval.runs.plan import Planned
from ov_kvcrush.eval.runs.prompts import ItemPrompts, QuestionPrompt
from ov_kvcrush.genai.eviction import GenaiEviction, block_size, closest_genai_eviction
from ov_kvcrush.pipelines.backend import Handle
from ov_kvcrush.pipelines.continuous_batching import ContinuousBatchingPipeline


class GenaiRuns:
    """openvino_genai with one precision.

    The number of kept tokens is fixed when a pipeline is loaded. It is loaded again when a prompt needs another number
    (rounded down to blocks), so one setting at a time is fastest.
    """

    def __init__(self, model: Path, key_precision: str, value_precision: str, properties: Mapping[str, Any]) -> None:
        self._model = model
        self._cache = CacheConfig(key_precision=key_precision, value_precision=value_precision)
        self._properties = dict(properties)
        self._loaded: tuple[GenaiEviction | None, ContinuousBatchingPipeline] | None = None

    def answer(self, prompts: ItemPrompts, task: Task, planned: Sequence[Planned]) -> Iterator[Answer]:
        """Answers to all questions of an item, with as many kept tokens as our policy's budget.

        Raises CrushError for a budget below what openvino_genai's eviction allows.
        """
        for one in planned:
            for asked in prompts.asked:
                yield self._answer_one(task, one, asked, np.concatenate([prompts.ids, asked.ids]))

    def _answer_one(self, task: Task, planned: Planned, asked: QuestionPrompt, ids: np.ndarray) -> Answer:
        eviction = self._eviction(planned, len(ids))
        pipeline = self._pipeline_for(eviction)
        config = greedy(pipeline.get_config(), task, asked.question.max_new_tokens)
        start = time.perf_counter()
        handle = pipeline.add_request(0, ov.Tensor(ids[None]), config)
        num_bytes = _bytes_at_first_token(pipeline, handle)
        handle.wait()
        handle.raise_error()
        seconds = time.perf_counter() - start
        tokens = handle.outputs()[0].generated_ids
        text = pipeline.get_tokenizer().decode(tokens) if tokens else ""
        for stop in task.stop:  # it may be at the end of the ids
            text = text.split(stop)[0]
        num_tokens = self._num_tokens(ids, tokens)
        return Answer(
            planned=planned,
            asked=asked,
            text=text,
            kept_tokens=float(min(num_tokens, eviction.kept_tokens) if eviction else num_tokens),
            prompt_tokens=num_tokens,
            num_bytes=int(num_bytes * _blocks(num_tokens, eviction) / _blocks(len(ids), None)),
            seconds=seconds,
        )

    def _num_tokens(self, prompt: np.ndarray, answer: Sequence[int]) -> int:
        """Tokens in the cache when its size is recorded: those of the prompt."""
        return len(prompt)

    def _eviction(self, planned: Planned, num_tokens: int) -> GenaiEviction | None:
        policy = planned.policy
        if not policy.evicts or num_tokens <= policy.budget.min_tokens:
            return None
        tokens = policy.budget.tokens(num_tokens)
        return None if tokens >= num_tokens else closest_genai_eviction(policy, tokens)

    def _pipeline_for(self, eviction: GenaiEviction | None) -> ContinuousBatchingPipeline:
        """The pipeline, loaded again if the eviction differs from the last one."""
        if self._loaded is not None and self._loaded[0] == eviction:
            return self._loaded[1]
        self._loaded = None  # two at a time would take twice the memory
        scheduler = ov_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = SchedulerConfig().max_num_batched_tokens
        scheduler.enable_prefix_caching = False
        if eviction is not None:
            scheduler = eviction.added_to(scheduler, is_default=True)
        made = ContinuousBatchingPipeline(
            self._model, scheduler, "CPU", self._properties, engine="genai", cache_config=self._cache
        )
        self._loaded = eviction, made
        return made


def _blocks(num_tokens: int, eviction: GenaiEviction | None) -> int:
    """Blocks of a text; after eviction a last, partly filled one comes on top of the kept tokens."""
    block = block_size("CPU")
    blocks = -(-num_tokens // block)
    return blocks if eviction is None else min(blocks, eviction.kept_tokens // block + 1)


def _bytes_at_first_token(pipeline: ContinuousBatchingPipeline, handle: Handle) -> float:
    """Bytes of a prompt's blocks at its first token; eviction follows a step or two later.

    Measured this early since an answer may end before the eviction: step by step, or the engine would be further by
    then. The size of the pool says nothing: it only grows.
    """
    while not handle.can_read() and handle.get_status() == ov_genai.GenerationStatus.RUNNING:
        pipeline.step()
    metrics = pipeline.get_metrics()
    return metrics.cache_size_in_bytes * metrics.cache_usage / 100
