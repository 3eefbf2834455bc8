"""What both engines look like to the pipelines above them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.core.outputs import GenerationOutput, PipelineMetrics, RequestStats, StepSeconds
from ov_kvcrush.policies.base import Policy

if TYPE_CHECKING:
    from ov_kvcrush.core.snapshot import KVSnapshot


def _no_tokens() -> np.ndarray:
    return np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class ReplayPrompt:
    """Token ids int64 (n,) that stand between a text and its repetition, for policies that read a prompt twice.

    first: "repeat this". again: "repeat this from the place where it says", followed by the last tokens before the
    chunk. answer: what makes it the model's turn. All may be empty.
    """

    first: np.ndarray = field(default_factory=_no_tokens)
    again: np.ndarray = field(default_factory=_no_tokens)
    answer: np.ndarray = field(default_factory=_no_tokens)


NO_REPLAY_PROMPT = ReplayPrompt()


@dataclass(frozen=True, eq=False)
class FanOut:
    """A policy that chooses from the prompt of somebody else's request. home: the engine that holds what it chose, the
    one that reads or one beside it; None = the one that reads.
    """

    policy: Policy
    home: Backend | None = None


@dataclass(frozen=True)
class CacheParams:
    """What one request wants of the KV cache.

    keep_kv: leave the KV for a prompt that goes on from it. policy: which tokens stay, None = as the engine was told.
    protect: spans [begin, end) of the prompt's tokens that stay. system: the span of the system prompt, which stays
    too; it need not fit the policy's budget. words: for policies that read the prompt twice.
    context: KV that the prompt's first tokens have already; a policy chooses from what follows. hold: hand the
    KV out at the end, as `Handle.held`. prefill_only: end when the prompt is read, without a token. others: policies
    that choose from the same reading of the prompt, each for KV of its own, `Handle.held_others`; with prefill_only, and
    nothing is held of the request itself then.
    """

    keep_kv: bool = False
    policy: Policy | None = None
    protect: tuple[tuple[int, int], ...] = ()
    system: tuple[int, int] | None = None
    words: ReplayPrompt = NO_REPLAY_PROMPT
    context: KVSnapshot | None = None
    hold: bool = False
    prefill_only: bool = False
    others: tuple[FanOut, ...] = ()


DEFAULT_CACHE_PARAMS = CacheParams()


class SnapshotArrays(Protocol):
    """Held KV as arrays.

    heads, tiles: as Store.dump gives them. carried float32, representatives int32: [layer][KV head], as in Kept.
    """

    @property
    def heads(self) -> np.ndarray: ...

    @property
    def tiles(self) -> np.ndarray: ...

    @property
    def num_evicted(self) -> int: ...

    @property
    def num_choices(self) -> int: ...

    @property
    def carried(self) -> tuple[tuple[np.ndarray, ...], ...] | None: ...

    @property
    def representatives(self) -> tuple[tuple[np.ndarray, ...], ...] | None: ...


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

    @property
    def held(self) -> KVSnapshot | None: ...

    @property
    def held_others(self) -> list[KVSnapshot]: ...

    @property
    def progress(self) -> tuple[int, int]: ...


class Backend(Protocol):
    """An engine: requests are added, `step` moves all of them on."""

    def add(
        self, request_id: int, ids: np.ndarray, config: ov_genai.GenerationConfig, cache: CacheParams = ...
    ) -> Handle: ...

    def step(self) -> None: ...

    def process_aborts(self) -> None: ...

    def has_unfinished(self) -> bool: ...

    def drop_kept_kv(self) -> None: ...

    def drop_held(self, kv: KVSnapshot) -> None: ...

    def share_held(self, kv: KVSnapshot) -> KVSnapshot: ...

    def bytes_held(self, kv: KVSnapshot) -> int: ...

    def dump_held(self, kv: KVSnapshot) -> SnapshotArrays: ...

    def load_held(self, held: SnapshotArrays, policy: Policy | None, base: int, base_kept: int) -> KVSnapshot: ...

    def storage(self) -> dict[str, str]: ...

    def kv_heads(self) -> list[int]: ...

    def metrics(self) -> PipelineMetrics: ...

    def last_step(self) -> StepSeconds: ...
