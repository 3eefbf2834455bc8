"""What both engines look like to the pipelines above them."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.results import GenerationOutput, PipelineMetrics, RequestStats, StepSeconds


class Handle(Protocol):
    """The caller's side of one request, with the members of openvino_genai's GenerationHandle."""

    @property
    def request_id(self) -> int: ...

    def get_status(self) -> ov_genai.GenerationStatus: ...

    def can_read(self) -> bool: ...

    def read(self) -> dict[int, GenerationOutput]: ...

    def read_all(self) -> list[GenerationOutput]: ...

    def stop(self, finish_reason: ov_genai.GenerationFinishReason = ...) -> None: ...

    def cancel(self) -> None: ...

    def get_stats(self) -> RequestStats: ...


class Backend(Protocol):
    """An engine: requests are added, `step` moves all of them on."""

    def add(
        self, request_id: int, ids: np.ndarray, config: ov_genai.GenerationConfig, keep_kv: bool = False
    ) -> Handle: ...

    def step(self) -> None: ...

    def end_wanted(self) -> None: ...

    def has_unfinished(self) -> bool: ...

    def drop_kept_kv(self) -> None: ...

    def metrics(self) -> PipelineMetrics: ...

    def last_step(self) -> StepSeconds: ...
