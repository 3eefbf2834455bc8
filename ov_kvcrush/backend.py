"""What both engines look like to the pipelines above them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.policies.base import Policy
from ov_kvcrush.results import GenerationOutput, PipelineMetrics, RequestStats, StepSeconds


@dataclass(frozen=True)
class CacheUse:
    """What one request wants of the KV cache.

    keep_kv: leave the KV for a prompt that goes on from it. policy: which tokens stay, None = as the engine was told.
    protect: spans [begin, end) of the prompt's tokens that stay. system: the span of the system prompt, which stays
    too; it need not fit the policy's budget.
    """

    keep_kv: bool = False
    policy: Policy | None = None
    protect: tuple[tuple[int, int], ...] = ()
    system: tuple[int, int] | None = None


class Handle(Protocol):
    """The caller's side of one request, with the members of openvino_genai's GenerationHandle."""

    @property
    def request_id(self) -> int: ...

    def get_status(self) -> ov_genai.GenerationStatus: ...

    def can_read(self) -> bool: ...

    def read(self) -> dict[int, GenerationOutput]: ...

    def read_all(self) -> list[GenerationOutput]: ...

    @property
    def kept_positions(self) -> list[list[np.ndarray]] | None: ...

    @property
    def representative_positions(self) -> list[list[np.ndarray]] | None: ...

    def stop(self, finish_reason: ov_genai.GenerationFinishReason = ...) -> None: ...

    def cancel(self) -> None: ...

    def get_stats(self) -> RequestStats: ...


class Backend(Protocol):
    """An engine: requests are added, `step` moves all of them on."""

    def add(
        self, request_id: int, ids: np.ndarray, config: ov_genai.GenerationConfig, cache: CacheUse = ...
    ) -> Handle: ...

    def step(self) -> None: ...

    def end_wanted(self) -> None: ...

    def has_unfinished(self) -> bool: ...

    def drop_kept_kv(self) -> None: ...

    def metrics(self) -> PipelineMetrics: ...

    def last_step(self) -> StepSeconds: ...
