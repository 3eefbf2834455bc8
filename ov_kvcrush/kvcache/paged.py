"""The KV cache of stock PagedAttention: blocks of 32 tokens at the plugin's precision."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Protocol

import numpy as np
import openvino as ov

from ov_kvcrush.core.eviction import EvictionSpec, EvictionState
from ov_kvcrush.core.request import Sequence
from ov_kvcrush.core.snapshot import KVSnapshot
from ov_kvcrush.core.step import ScheduledTokens
from ov_kvcrush.kvcache.block_pool import BLOCK_SIZE, BlockPool, blocks_for
from ov_kvcrush.kvcache.manager import KVCacheUsage
from ov_kvcrush.kvcache.model_inputs import paged_inputs, row_inputs, sampled_rows
from ov_kvcrush.kvcache.prefix_cache import PrefixCache
from ov_kvcrush.kvcache.replay import ReplayState
from ov_kvcrush.kvcache.sequence_kv import SequenceKV
from ov_kvcrush.model.graph.rewrite import SAMPLED_ROWS


class Blocks(Protocol):
    """The tensors that blocks lie in; BlockTensors are."""

    num_blocks: int
    bytes_per_block: int

    def copy_block(self, source: int, target: int) -> None: ...

    def bind(self, request: ov.InferRequest) -> None: ...


class PagedKVCache:
    """Blocks of one pool, shared by sequences and cached prefixes; who writes into a shared block copies it first.

    A prompt gets all its blocks when it is allocated, a decoding sequence one at a time.
    """

    snapshots = None  # a block holds 32 tokens of all heads: none of them can go alone
    policy_seconds = 0.0
    staged_tokens = 0
    is_contended = False

    def __init__(self, blocks: Blocks, max_prefixes: int | None) -> None:
        self.pool = BlockPool(blocks.num_blocks)
        self.prefixes: PrefixCache[np.ndarray] = PrefixCache(self.pool.release, max_prefixes)
        self._blocks = blocks
        self._kv: dict[Sequence, SequenceKV] = {}

    def capacity_tokens(self, eviction: EvictionSpec | None, num_evicted: int = 0) -> int:
        """Tokens of all blocks."""
        return self.pool.num_blocks * BLOCK_SIZE

    def refusal(self, num_tokens: int, eviction: EvictionSpec | None, num_evicted: int = 0) -> str | None:
        """Why a prompt can never run; None if it can."""
        if blocks_for(num_tokens + 1) <= self.pool.num_blocks:
            return None
        return (
            f"prompt must fit into the KV cache of {self.capacity_tokens(None)} tokens, got {num_tokens} tokens; "
            "raise num_kv_blocks or cache_size"
        )

    def allocate(self, sequence: Sequence) -> bool:
        """Give a waiting sequence the blocks of all its tokens, those of a cached prefix among them."""
        found = self.prefixes.match(sequence.ids[:], salt=sequence.request.cache_salt)
        cached, length = found or (np.zeros(0, np.int32), 0)
        shared = cached[: blocks_for(length)]
        self.pool.share(shared)
        written = int(shared[-1]) if length % BLOCK_SIZE else None
        if not self._make_room(blocks_for(len(sequence.ids)) - len(shared), written):
            self.pool.release(shared)
            return False
        kv = self._kv[sequence] = SequenceKV()
        kv.blocks.extend(shared)
        sequence.num_cached = length
        self._own_last_block(sequence, kv)
        while len(kv.blocks) < blocks_for(len(sequence.ids)):
            kv.blocks.append(self.pool.allocate())
        return True

    def append_slots(self, sequence: Sequence, num_tokens: int) -> bool:
        """Add blocks, and own the last one that is there. Those of a prompt are there since it was allocated."""
        kv = self._kv[sequence]
        num_new = max(blocks_for(sequence.num_cached + num_tokens) - len(kv.blocks), 0)
        last = int(kv.blocks.view[-1])
        is_written = len(kv.blocks) * BLOCK_SIZE > sequence.num_cached
        written = last if is_written and self.pool.is_shared(last) else None
        if not num_new and written is None:
            return True
        if not self._make_room(num_new, written):
            return False
        if written is not None:
            self._own_last_block(sequence, kv)
        for _ in range(num_new):
            kv.blocks.append(self.pool.allocate())
        return True

    def _make_room(self, num_new: int, written: int | None) -> bool:
        """Drop as few prefixes as leave `num_new` blocks free, and one more for a copy of `written` if it is shared.

        False, and none is dropped, where all of them would not do.
        """

        def enough(dropped: list[np.ndarray]) -> bool:
            num_others = sum(written in blocks for blocks in dropped)
            copies = written is not None and self.pool.num_owners(written) - num_others > 1
            return num_new + copies <= self.pool.num_free + self.pool.freed_by(dropped)

        return self.prefixes.drop_until(enough)

    def _own_last_block(self, sequence: Sequence, kv: SequenceKV) -> None:
        """Copy the last block if it is partly filled and has another owner (copy on write)."""
        if sequence.num_cached % BLOCK_SIZE == 0:
            return
        last = kv.blocks.view[-1:].copy()
        if self.pool.is_shared(int(last[0])):
            copy = self.pool.allocate()
            self._blocks.copy_block(int(last[0]), copy)
            kv.blocks.replace_last(copy)
            self.pool.release(last)

    def fork(self, parent: Sequence, twin: Sequence) -> None:
        """Share all blocks."""
        blocks = self._kv[parent].blocks.view
        self._kv[twin] = SequenceKV()
        self._kv[twin].blocks.extend(blocks)
        self.pool.share(blocks)

    def free(self, sequence: Sequence) -> None:
        """Take one owner from each block."""
        kv = self._kv.pop(sequence, None)
        if kv is not None:
            self.pool.release(kv.blocks.view)

    def cache_prefix(self, sequence: Sequence) -> None:
        """The prefix cache becomes one more owner of the blocks."""
        if sequence.num_cached:
            blocks = self._kv[sequence].blocks[: blocks_for(sequence.num_cached)].copy()
            self.pool.share(blocks)
            self.prefixes.put(sequence.ids[: sequence.num_cached], blocks, sequence.request.cache_salt)

    def clear_prefixes(self) -> None:
        """Give back the blocks of ended sequences."""
        self.prefixes.clear()

    def snapshot(self, sequence: Sequence) -> KVSnapshot | None:
        """None: there is no store to hold it."""
        return None

    def kv_of(self, sequence: Sequence) -> SequenceKV:
        """What is known of an allocated sequence."""
        return self._kv[sequence]

    def eviction_state(self, sequence: Sequence) -> EvictionState:
        """Nothing is evicted."""
        return EvictionState()

    def replay(self, sequence: Sequence) -> ReplayState | None:
        """None: no policy reads a prompt twice here."""
        return None

    def bind(self, request: ov.InferRequest) -> None:
        """Make the cache tensors the inputs of `request`."""
        self._blocks.bind(request)

    def step_inputs(self, rows: Items[ScheduledTokens]) -> dict[str, np.ndarray]:
        """See `paged_inputs`; sampled_rows i64 (rows that sample,)."""
        tables = [self._kv[row.sequence].blocks.view for row in rows]
        return {**paged_inputs(rows, tables), **row_inputs(rows), SAMPLED_ROWS: sampled_rows(rows, rows)}

    def commit(
        self, rows: Items[ScheduledTokens], scores: Callable[[], list[np.ndarray]]
    ) -> list[tuple[Sequence, Exception | None]]:
        """Nothing is left to do: PagedAttention has written the blocks."""
        return []

    def max_draft(self, sequence: Sequence, most: int) -> int:
        """All: nothing is quantised again, and nothing is evicted."""
        return most

    def settle(self, sequence: Sequence, num_run: int, num_kept: int) -> None:
        """Nothing is left to do: later tokens are written over those that were wrong."""

    def bytes_of(self, sequence: Sequence) -> int:
        """Bytes of the sequence's blocks."""
        kv = self._kv.get(sequence)
        return len(kv.blocks) * self._blocks.bytes_per_block if kv else 0

    def usage(self) -> KVCacheUsage:
        """Blocks in use times their bytes."""
        size, pool = self._blocks.bytes_per_block, self.pool
        return KVCacheUsage(pool.num_used * size, pool.num_blocks * size, pool.num_used)
