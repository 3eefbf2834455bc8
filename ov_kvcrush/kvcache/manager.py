"""What scheduler, runner and engine ask of the memory of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import openvino as ov

from ov_kvcrush.core.eviction import EvictionSpec, EvictionState
from ov_kvcrush.core.request import Sequence
from ov_kvcrush.core.snapshot import KVSnapshot
from ov_kvcrush.core.step import ScheduledTokens
from ov_kvcrush.kvcache.replay import ReplayState
from ov_kvcrush.kvcache.snapshots import SnapshotStore


@dataclass(frozen=True)
class KVCacheUsage:
    """used_bytes: of sequences and cached prefixes. capacity_bytes: the most that they may have.

    num_used_blocks: `used_bytes` in blocks of 32 tokens, rounded up. staging_bytes: of prompts that are prefilled.
    """

    used_bytes: int
    capacity_bytes: int
    num_used_blocks: int
    staging_bytes: int = 0


class KVCacheManager(Protocol):
    """Keys and values of all sequences: who may have how much, and how one inference finds them.

    A sequence is allocated, then gets slots for its next tokens before each step; `commit` follows each inference.
    Nothing is preempted here: where there is no room the scheduler decides who goes.
    """

    @property
    def snapshots(self) -> SnapshotStore | None:
        """KV that outlives its requests; None where tokens cannot be kept and dropped one by one."""

    @property
    def policy_seconds(self) -> float:
        """Time spent so far in choosing what stays and in doing what was chosen."""

    def capacity_tokens(self, eviction: EvictionSpec | None, num_evicted: int = 0) -> int:
        """Tokens that the text of one sequence can have with nothing else in memory. num_evicted: as in `refusal`."""

    def refusal(self, num_tokens: int, eviction: EvictionSpec | None, num_evicted: int = 0) -> str | None:
        """Why a prompt of `num_tokens` tokens can never run, with both numbers; None if it can.

        num_evicted: tokens that the context it starts from has lost.
        """

    @property
    def staged_tokens(self) -> int:
        """Tokens of the longest prompt that several caches can be made from."""

    @property
    def is_contended(self) -> bool:
        """Whether other managers hold some of what this one shares with them: who finds no room may wait for it."""

    def allocate(self, sequence: Sequence) -> bool:
        """Promise memory for all tokens of a waiting sequence; sets `num_cached` to what is reused."""

    def append_slots(self, sequence: Sequence, num_tokens: int) -> bool:
        """Add slots for the next tokens of an allocated sequence."""

    def fork(self, parent: Sequence, twin: Sequence) -> None:
        """Share the KV of `parent` with a new sequence."""

    def free(self, sequence: Sequence) -> None:
        """Take back everything that a sequence has; nothing if it has nothing."""

    def cache_prefix(self, sequence: Sequence) -> None:
        """Keep the KV of an ending sequence for prompts that begin with its tokens."""

    def clear_prefixes(self) -> None:
        """Give back the KV of ended sequences."""

    def snapshot(self, sequence: Sequence) -> KVSnapshot | None:
        """The KV of an ending sequence, for the caller to release; None if there is none."""

    def eviction_state(self, sequence: Sequence) -> EvictionState:
        """What policies left of a sequence; may be called by any thread."""

    def replay(self, sequence: Sequence) -> ReplayState | None:
        """The second reading of its prompt, also while it is still to come; may be called by any thread."""

    def bind(self, request: ov.InferRequest) -> None:
        """Make the cache tensors the inputs of `request`."""

    def step_inputs(self, rows: Items[ScheduledTokens]) -> dict[str, np.ndarray]:
        """The small inputs of the compiled model for the rows of one step; logits come in the order of `rows`."""

    def commit(
        self, rows: Items[ScheduledTokens], scores: Callable[[], list[np.ndarray]]
    ) -> list[tuple[Sequence, Exception | None]]:
        """Note that the inference of `rows` is done (`num_cached` is up to date, without guessed tokens).

        scores: the attention scores of each layer, flat, as the model gave them. Returns the sequences whose KV found
        no room (None), or whose policy broke; the caller ends them.
        """

    def max_draft(self, sequence: Sequence, most: int) -> int:
        """How many guessed tokens, `most` at most, can be run behind the next one so that each row reads what it would
        read in a step of its own."""

    def settle(self, sequence: Sequence, num_run: int, num_kept: int) -> None:
        """Note which of the `num_run` rows with guessed tokens of the last step are the sequence's: the first ones.

        `commit` leaves such rows to this.
        """

    def bytes_of(self, sequence: Sequence) -> int:
        """Bytes that a sequence holds, shared ones in full."""

    def usage(self) -> KVCacheUsage:
        """Bytes in use now."""
