"""The engines as the bench drives them: each directly, with the settings of the job and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as ov_genai

from ov_kvcrush.bench.measure import MeasuredEngine, MeasuredHandle
from ov_kvcrush.bench.settings import OURS
from ov_kvcrush.errors import CrushError, reason_of

_SCHEDULER_FIELDS = ("max_num_batched_tokens", "num_kv_blocks", "max_num_seqs")


def make_engine(job: dict[str, Any]) -> MeasuredEngine:
    """Load the model of `job` (see BenchSettings.worker_job) on CPU. Raises CrushError if it cannot be loaded."""
    return CrushUnderTest(job) if job["engine"] == OURS else GenaiUnderTest(job)


def _greedy(new_tokens: int) -> ov_genai.GenerationConfig:
    config = ov_genai.GenerationConfig()
    config.max_new_tokens = new_tokens
    config.ignore_eos = True
    return config


class CrushUnderTest:
    """This package's ContinuousBatchingPipeline."""

    def __init__(self, job: dict[str, Any]) -> None:
        from ov_kvcrush.cb_pipeline import ContinuousBatchingPipeline
        from ov_kvcrush.config import SchedulerConfig

        scheduler = SchedulerConfig(**{name: job[name] for name in _SCHEDULER_FIELDS})
        self._pipeline = ContinuousBatchingPipeline(
            job["model"], scheduler, "CPU", job["properties"], engine=job["engine"]
        )

    def add(self, request_id: int, ids: np.ndarray, new_tokens: int) -> MeasuredHandle:
        return self._pipeline.add_request(request_id, ov.Tensor(ids[None]), _greedy(new_tokens))

    def step(self) -> None:
        self._pipeline.step()

    def has_unfinished(self) -> bool:
        return self._pipeline.has_non_finished_requests()

    def kv_bytes(self) -> int:
        return self._pipeline.get_metrics().kv_cache_size_in_bytes

    def last_overhead_s(self) -> float | None:
        return self._pipeline.get_last_step().overhead


class GenaiUnderTest:
    """openvino_genai's own ContinuousBatchingPipeline, not through this package."""

    def __init__(self, job: dict[str, Any]) -> None:
        scheduler = ov_genai.SchedulerConfig()
        for name in _SCHEDULER_FIELDS:
            setattr(scheduler, name, job[name])
        scheduler.cache_size = 0
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        scheduler.use_cache_eviction = False
        try:
            self._pipeline = ov_genai.ContinuousBatchingPipeline(job["model"], scheduler, "CPU", job["properties"])
        except RuntimeError as error:
            raise CrushError(
                f"model and properties must be ones that openvino_genai can load, got: {reason_of(error)}"
            ) from None

    def add(self, request_id: int, ids: np.ndarray, new_tokens: int) -> MeasuredHandle:
        handle: MeasuredHandle = self._pipeline.add_request(request_id, ov.Tensor(ids[None]), _greedy(new_tokens))
        return handle

    def step(self) -> None:
        self._pipeline.step()

    def has_unfinished(self) -> bool:
        return bool(self._pipeline.has_non_finished_requests())

    def kv_bytes(self) -> int:
        return int(self._pipeline.get_metrics().kv_cache_size_in_bytes)

    def last_overhead_s(self) -> float | None:
        return None
