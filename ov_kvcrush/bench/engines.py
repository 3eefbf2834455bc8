"""The engines as the bench drives them: each directly, with the settings of the job and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as ov_genai

from ov_kvcrush import native
from ov_kvcrush.bench.measure import MeasuredEngine, MeasuredHandle, Storage
from ov_kvcrush.bench.peers import LLAMA_CPP, LlamaUnderTest
from ov_kvcrush.bench.settings import EVICTING, OURS, RECALLING
from ov_kvcrush.config import CacheConfig, SchedulerConfig
from ov_kvcrush.core.lookahead_params import NGRAM_SIZE, NUM_TOKENS
from ov_kvcrush.errors import CrushError, reason_of
from ov_kvcrush.genai.eviction import GenaiEviction, closest_genai_eviction
from ov_kvcrush.model.plugin import capped_properties, kept_signal_stack, paged_precisions, plugin_precisions
from ov_kvcrush.pipelines.continuous_batching import ContinuousBatchingPipeline
from ov_kvcrush.policies.registry import as_policy, name_of

_SCHEDULER_FIELDS = ("max_num_batched_tokens", "num_kv_blocks", "max_num_seqs")
_DEFAULT_PRECISION = "u8"  # of a type that is not given beside one that is


def make_engine(job: dict[str, Any]) -> MeasuredEngine:
    """Load the model of `job` (see BenchSettings.worker_job) on CPU. Raises CrushError if it cannot be loaded."""
    kinds: dict[str, Callable[[dict[str, Any]], MeasuredEngine]]
    kinds = {OURS: CrushUnderTest, RECALLING: CrushUnderTest, LLAMA_CPP: LlamaUnderTest}
    return kinds.get(job["engine"], GenaiUnderTest)(job)


def eviction_of(job: dict[str, Any]) -> GenaiEviction | None:
    """What openvino_genai is told to evict: as many tokens as the policy of `job` does, or nothing."""
    policy = as_policy(job["policy"]) if job["engine"] == EVICTING else None
    return None if policy is None else closest_genai_eviction(policy, policy.budget.tokens(job["context"]))


def _greedy(new_tokens: int, prompt_lookup: bool) -> ov_genai.GenerationConfig:
    config = ov_genai.GenerationConfig()
    config.max_new_tokens = new_tokens
    config.ignore_eos = True
    if prompt_lookup:
        config.num_assistant_tokens, config.max_ngram_size = NUM_TOKENS, NGRAM_SIZE
    return config


def _properties_of(job: dict[str, Any]) -> dict[str, Any]:
    """What an engine is loaded with."""
    return dict(job["properties"]) | ({"prompt_lookup": True} if job.get("prompt_lookup") else {})


class CrushUnderTest:
    """This package's ContinuousBatchingPipeline."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._prompt_lookup = bool(job.get("prompt_lookup"))
        cache, self._storage = _cache_of(job)
        values = {name: job[name] for name in _SCHEDULER_FIELDS}
        if cache.attention == "crush":
            values["num_kv_blocks"] = 0  # the store takes memory as it fills, up to max_bytes or half of what is free
        values["max_step_ms"] = job.get("max_step_ms", 0)  # all requests come at once: no answer waits for a prompt
        self._pipeline = ContinuousBatchingPipeline(
            job["model"], SchedulerConfig(**values), "CPU", _properties_of(job), engine=OURS, cache_config=cache
        )

    def storage(self) -> Storage:
        return self._storage

    def add(self, request_id: int, ids: np.ndarray, new_tokens: int) -> MeasuredHandle:
        config = _greedy(new_tokens, self._prompt_lookup)
        return self._pipeline.add_request(request_id, ov.Tensor(ids[None]), config)

    def step(self) -> None:
        self._pipeline.step()

    def has_unfinished(self) -> bool:
        return self._pipeline.has_non_finished_requests()

    def kv_bytes(self) -> int:
        return self._pipeline.get_metrics().kv_cache_size_in_bytes

    def last_overhead_s(self) -> float | None:
        return self._pipeline.get_last_step().overhead

    def last_policy_s(self) -> float | None:
        return self._pipeline.get_last_step().policy

    def kept_tokens(self, handle: Any) -> int | None:
        kept: int | None = handle.get_stats().kept_tokens
        return kept


def _cache_of(job: dict[str, Any]) -> tuple[CacheConfig, Storage]:
    """The cache that `job` asks for, and what it will be. Raises CrushError if it asks for what is not there."""
    wanted = {"key_precision": job["key_precision"], "value_precision": job["value_precision"]}
    wanted["max_bytes"] = job["max_kv_bytes"] or None
    wanted["policy"] = job["policy"]
    wanted |= {name: job.get(name) for name in ("budget", "recall_tokens", "weights")}
    cache = CacheConfig(**{name: value for name, value in wanted.items() if value is not None})
    reason = native.why_unavailable()
    if reason is None:
        stored = cache.with_properties(job["properties"])[0]
        key, value = ("plan", "plan") if cache.is_planned else (stored.key_precision, stored.value_precision)
        storage = Storage("CrushAttention", key, value)
        return replace(cache, attention="crush"), storage
    if cache != CacheConfig():
        raise CrushError(
            "--key-precision, --value-precision, --max-kv-mb and --policy must be left out without the native library, "
            f"got {cache.key_precision}, {cache.value_precision}, {cache.max_bytes >> 20}, "
            f"{name_of(cache.eviction_policy) if cache.eviction_policy else 'none'}: {reason}"
        )
    return CacheConfig(attention="paged"), _paged_storage(job["properties"])


def _paged_storage(properties: dict[str, Any]) -> Storage:
    try:
        precisions = plugin_precisions(properties)
    except RuntimeError as error:
        raise CrushError(f"--property must be one that the CPU takes, got: {reason_of(error)}") from None
    return Storage("PagedAttention", precisions.key, precisions.value)


class GenaiUnderTest:
    """openvino_genai's own ContinuousBatchingPipeline, not through this package."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._prompt_lookup = bool(job.get("prompt_lookup"))
        self._context = int(job["context"])
        scheduler = ov_genai.SchedulerConfig()
        for name in _SCHEDULER_FIELDS:
            setattr(scheduler, name, job[name])
        scheduler.cache_size = 0
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        self._eviction = eviction_of(job)
        scheduler.use_cache_eviction = self._eviction is not None
        if self._eviction:
            scheduler.cache_eviction_config = self._eviction.config()
        properties = {**capped_properties(), **_properties_of(job)}
        try:
            if job["key_precision"] or job["value_precision"]:
                key, value = (job[name] or _DEFAULT_PRECISION for name in ("key_precision", "value_precision"))
                properties |= paged_precisions(key, value, properties)
            self._storage = _paged_storage(properties)
            with kept_signal_stack():
                self._pipeline = ov_genai.ContinuousBatchingPipeline(job["model"], scheduler, "CPU", properties)
        except RuntimeError as error:
            raise CrushError(
                f"model and properties must be ones that openvino_genai can load, got: {reason_of(error)}"
            ) from None

    def add(self, request_id: int, ids: np.ndarray, new_tokens: int) -> MeasuredHandle:
        config = _greedy(new_tokens, self._prompt_lookup)
        handle: MeasuredHandle = self._pipeline.add_request(request_id, ov.Tensor(ids[None]), config)
        return handle

    def step(self) -> None:
        self._pipeline.step()

    def has_unfinished(self) -> bool:
        return bool(self._pipeline.has_non_finished_requests())

    def kv_bytes(self) -> int:
        return int(self._pipeline.get_metrics().kv_cache_size_in_bytes)

    def storage(self) -> Storage:
        return self._storage

    def last_overhead_s(self) -> float | None:
        return None

    def last_policy_s(self) -> float | None:
        return None if self._eviction else 0.0

    def kept_tokens(self, handle: Any) -> int | None:
        """As it was told: it does not tell what it holds of one request."""
        return min(self._context, self._eviction.kept_tokens) if self._eviction else self._context
