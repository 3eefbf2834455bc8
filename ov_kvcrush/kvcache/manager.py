"""What the scheduler and the engine ask of the memory that keys and values live in."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import openvino as ov

if TYPE_CHECKING:
    from ov_kvcrush.core.request import AttentionScores, Sequence
    from ov_kvcrush.core.snapshot import KVSnapshot
    from ov_kvcrush.engine.scheduler import ScheduledTokens
    from ov_kvcrush.kvcache.eviction import Choice, EvictionSpec
    from ov_kvcrush.pipelines.backend import SnapshotArrays
    from ov_kvcrush.policies.base import Policy


@dataclass(frozen=True)
class KVCacheUsage:
    """used_bytes: what sequences and kept prefixes hold now. capacity_bytes: the most they may hold.

    num_used_blocks: `used_bytes` in blocks of 32 tokens, rounded up. staging_bytes: of prompts that are being read.
    """

    used_bytes: int
    capacity_bytes: int
    num_used_blocks: int
    staging_bytes: int = 0


class KVCacheManager(Protocol):
    """Keys and values of all sequences: who may have how much, and how one inference finds them.

    A sequence is admitted, then gets room for its next tokens before each step; `commit` follows each inference.
    Nothing here preempts: where there is no room the scheduler decides who goes.
    """

    @property
    def can_evict(self) -> bool:
        """Whether single tokens can be dropped."""
        ...

    @property
    def policy_seconds(self) -> float:
        """Time that went so far into choosing what stays, and into doing what was chosen."""
        ...

    def capacity_tokens(self, eviction: EvictionSpec | None, num_evicted: int = 0) -> int:
        """Tokens that the text of one sequence can have with nothing else in memory. num_evicted: as of `refusal`."""
        ...

    def refusal(self, num_tokens: int, eviction: EvictionSpec | None, num_evicted: int = 0) -> str | None:
        """Why a prompt of `num_tokens` tokens can never be run, with both numbers; None if it can.

        num_evicted: of its tokens, in the context that it goes on from.
        """
        ...

    @property
    def staged_tokens(self) -> int:
        """Tokens of the longest prompt that others can take KV of while it is read."""
        ...

    @property
    def is_contended(self) -> bool:
        """Whether other memories hold some of what this one shares with them: who finds no place there may wait."""
        ...

    def allocate(self, sequence: Sequence) -> bool:
        """Promise memory for all tokens that a waiting sequence has; sets `num_cached` to what is reused."""
        ...

    def append_slots(self, sequence: Sequence, num_tokens: int) -> bool:
        """See that the next `num_tokens` tokens of an admitted sequence have a place of their own."""
        ...

    def fork(self, parent: Sequence, twin: Sequence) -> None:
        """Let a new sequence share what its parent holds."""
        ...

    def release(self, sequence: Sequence) -> None:
        """Take back everything that a sequence holds."""
        ...

    def keep(self, sequence: Sequence) -> None:
        """Hold the KV of an ending sequence for prompts that begin with its tokens."""
        ...

    def hold(self, sequence: Sequence) -> KVSnapshot | None:
        """The KV of an ending sequence, for the caller to keep; None if there is none."""
        ...

    def take(self, staged: Sequence, policy: Policy | None, choice: Choice | None) -> KVSnapshot:
        """What a policy chose of a prompt that was read, here or by another on the same staging blocks; None = all."""
        ...

    def drop_held(self, kv: KVSnapshot) -> None:
        """Give back what `hold` or `take` gave."""
        ...

    def share_held(self, kv: KVSnapshot) -> KVSnapshot:
        """The same for one more holder."""
        ...

    def bytes_held(self, kv: KVSnapshot) -> int:
        """Bytes of what `hold` gave, shared ones in full."""
        ...

    def dump_held(self, kv: KVSnapshot) -> SnapshotArrays:
        """What `hold` gave, as arrays."""
        ...

    def load_held(self, held: SnapshotArrays, policy: Policy | None, base: int, base_kept: int) -> KVSnapshot:
        """The same from arrays, checked. Raises ContextFileError, and OutOfMemory where there is no room."""
        ...

    def drop_kept(self) -> None:
        """Give back the KV of ended sequences."""
        ...

    def bind(self, request: ov.InferRequest) -> None:
        """Make the cache tensors the inputs of `request`."""
        ...

    def step_inputs(self, rows: Items[ScheduledTokens]) -> dict[str, np.ndarray]:
        """The small inputs of the compiled model for the rows of one step; logits come in the order of `rows`."""
        ...

    def commit(self, rows: Items[ScheduledTokens]) -> list[Sequence]:
        """Note that the inference of `rows` is done (`num_cached` is up to date).

        Returns the sequences whose KV found no place any more; the caller ends them.
        """
        ...

    def split_scores(self, rows: Items[ScheduledTokens], outputs: list[np.ndarray]) -> dict[Sequence, AttentionScores]:
        """The attention scores of each sequence that asked in this step, from one flat output per layer."""
        ...

    def bytes_of(self, sequence: Sequence) -> int:
        """Bytes that a sequence holds, shared ones in full."""
        ...

    def use(self) -> KVCacheUsage:
        """Bytes in use now."""
        ...
