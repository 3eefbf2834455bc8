"""Memory of stock PagedAttention: blocks of 32 tokens at the plugin's precision."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

import numpy as np
import openvino as ov

from ov_kvcrush.core.request import AttentionScores, Sequence
from ov_kvcrush.core.snapshot import KVSnapshot
from ov_kvcrush.engine.scheduler import ScheduledTokens
from ov_kvcrush.errors import ContextFileError
from ov_kvcrush.kvcache.block_pool import BLOCK_SIZE, BlockPool, blocks_for
from ov_kvcrush.kvcache.block_tensors import BlockTensors
from ov_kvcrush.kvcache.eviction import Choice, EvictionSpec
from ov_kvcrush.kvcache.manager import KVCacheUsage
from ov_kvcrush.kvcache.prefix_cache import PrefixCache
from ov_kvcrush.model.graph.rewrite import SAMPLED_ROWS
from ov_kvcrush.pipelines.backend import SnapshotArrays
from ov_kvcrush.policies.base import Policy


class PagedKVCache:
    """Blocks of one pool, shared by sequences and kept prefixes; who writes into a shared block copies it first.

    A prompt gets all its blocks when it is admitted, a decoding sequence one at a time.
    """

    def __init__(self, pool: BlockPool, max_prefixes: int | None, copy_block: Callable[[int, int], None]) -> None:
        self.pool = pool
        self.prefixes: PrefixCache[np.ndarray] = PrefixCache(pool.release, max_prefixes)
        self._copy_block = copy_block

    @property
    def can_evict(self) -> bool:
        """A block holds 32 tokens of all heads."""
        return False

    @property
    def policy_seconds(self) -> float:
        """Zero: all tokens stay."""
        return 0.0

    def capacity_tokens(self, eviction: EvictionSpec | None, num_evicted: int = 0) -> int:
        """Tokens of all blocks."""
        return self.pool.num_blocks * BLOCK_SIZE

    def refusal(self, num_tokens: int, eviction: EvictionSpec | None, num_evicted: int = 0) -> str | None:
        """Why a prompt can never be run; None if it can."""
        if blocks_for(num_tokens + 1) <= self.pool.num_blocks:
            return None
        return (
            f"prompt must fit into the KV cache of {self.capacity_tokens(None)} tokens, got {num_tokens} tokens; "
            "raise num_kv_blocks or cache_size"
        )

    @property
    def staged_tokens(self) -> int:
        """Zero: nothing is staged."""
        return 0

    @property
    def is_contended(self) -> bool:
        """False: nothing is shared."""
        return False

    def allocate(self, sequence: Sequence) -> bool:
        """Give a waiting sequence the blocks of all its tokens, those of a kept prefix among them."""
        kv, length = self.prefixes.match(sequence.ids[:]) or (np.zeros(0, np.int32), 0)
        shared = kv[: blocks_for(length)]
        self.pool.share(shared)

        def missing() -> int:
            # One more when the prefix ends inside a block that stays shared: it is copied before it is written.
            copy = length % BLOCK_SIZE != 0 and self.pool.is_shared(int(shared[-1]))
            return blocks_for(len(sequence.ids)) - len(shared) + copy

        while self.pool.num_free < missing():
            if not self.prefixes.drop_oldest():
                self.pool.release(shared)
                return False
        sequence.blocks.extend(shared)
        sequence.num_cached = length
        self._own_last_block(sequence)
        while len(sequence.blocks) < blocks_for(len(sequence.ids)):
            sequence.blocks.append(self.pool.allocate())
        return True

    def append_slots(self, sequence: Sequence, num_tokens: int) -> bool:
        """See that the next tokens have slots of their own. Those of a prompt have them since it was admitted."""
        needs_block = blocks_for(sequence.num_cached + num_tokens) > len(sequence.blocks)
        needs_copy = not needs_block and self.pool.is_shared(int(sequence.blocks.ids[-1]))
        if not (needs_block or needs_copy):
            return True
        while not self.pool.num_free:
            if not self.prefixes.drop_oldest():
                return False
        if needs_block:
            sequence.blocks.append(self.pool.allocate())
        else:
            self._own_last_block(sequence)
        return True

    def _own_last_block(self, sequence: Sequence) -> None:
        """Copy the last block if it is partly filled and has another owner (copy on write)."""
        if sequence.num_cached % BLOCK_SIZE == 0:
            return
        last = sequence.blocks.ids[-1:].copy()
        if self.pool.is_shared(int(last[0])):
            copy = self.pool.allocate()
            self._copy_block(int(last[0]), copy)
            sequence.blocks.replace_last(copy)
            self.pool.release(last)

    def fork(self, parent: Sequence, twin: Sequence) -> None:
        """Share all blocks."""
        twin.blocks.extend(parent.blocks.ids)
        self.pool.share(parent.blocks.ids)

    def release(self, sequence: Sequence) -> None:
        """Take one owner from each block."""
        self.pool.release(sequence.blocks.ids)
        sequence.blocks.clear()

    def keep(self, sequence: Sequence) -> None:
        """The prefix cache becomes one more owner of the blocks."""
        if not sequence.num_cached:
            return
        blocks = sequence.blocks.ids[: blocks_for(sequence.num_cached)].copy()
        self.pool.share(blocks)
        self.prefixes.put(sequence.ids[: sequence.num_cached], blocks)

    def hold(self, sequence: Sequence) -> KVSnapshot | None:
        """None: contexts live in the store."""
        return None

    def take(self, staged: Sequence, policy: Policy | None, choice: Choice | None) -> KVSnapshot:
        """Contexts live in the store."""
        raise AssertionError("take() into paged memory")

    def drop_held(self, kv: KVSnapshot) -> None:
        """Nothing was given."""

    def share_held(self, kv: KVSnapshot) -> KVSnapshot:
        """Nothing was given."""
        return kv

    def bytes_held(self, kv: KVSnapshot) -> int:
        """Nothing was given."""
        return 0

    def dump_held(self, kv: KVSnapshot) -> SnapshotArrays:
        """Nothing was given."""
        raise AssertionError("dump_held() of paged memory")

    def load_held(self, held: SnapshotArrays, policy: Policy | None, base: int, base_kept: int) -> KVSnapshot:
        """Contexts live in the store."""
        raise ContextFileError("attention must be 'crush' to load a context, got 'paged'")

    def drop_kept(self) -> None:
        """Give back the blocks of ended sequences."""
        self.prefixes.clear()

    def step_inputs(self, rows: Items[ScheduledTokens]) -> dict[str, np.ndarray]:
        """See `paged_inputs`; sampled_rows i64 (rows that sample,)."""
        return {**paged_inputs(rows), **row_inputs(rows), SAMPLED_ROWS: sampled_rows(rows)}

    def commit(self, rows: Items[ScheduledTokens]) -> list[Sequence]:
        """Nothing is left to do: PagedAttention has written the blocks."""
        return []

    def split_scores(self, rows: Items[ScheduledTokens], outputs: list[np.ndarray]) -> dict[Sequence, AttentionScores]:
        """Nobody can ask: stock PagedAttention sums its scores over heads."""
        return {}


class PagedTensorsKVCache(PagedKVCache):
    """PagedKVCache with the tensors of a compiled model."""

    def __init__(self, cache: BlockTensors, max_prefixes: int | None) -> None:
        super().__init__(BlockPool(cache.num_blocks), max_prefixes, cache.copy_block)
        self._cache = cache

    def bind(self, request: ov.InferRequest) -> None:
        """Make the cache tensors the inputs of `request`."""
        self._cache.bind(request)

    def bytes_of(self, sequence: Sequence) -> int:
        """Bytes of the sequence's blocks."""
        return len(sequence.blocks) * self._cache.bytes_per_block

    def use(self) -> KVCacheUsage:
        """Blocks in use times their bytes."""
        return KVCacheUsage(
            self.pool.num_used * self._cache.bytes_per_block, self._cache.capacity_bytes, self.pool.num_used
        )


def row_inputs(rows: Items[ScheduledTokens]) -> dict[str, np.ndarray]:
    """input_ids, position_ids i64 (T,) of T rows."""
    ids = [row.sequence.ids[row.sequence.num_cached : row.sequence.num_cached + row.num_tokens] for row in rows]
    counts = np.array([row.num_tokens for row in rows])
    past = np.array([row.sequence.num_cached + row.sequence.position_offset for row in rows])
    ends = np.cumsum(counts)
    positions = np.arange(ends[-1], dtype=np.int64) + np.repeat(past - (ends - counts), counts)
    return {"input_ids": np.concatenate(ids), "position_ids": positions}


def paged_inputs(rows: Items[ScheduledTokens]) -> dict[str, np.ndarray]:
    """PagedAttention's inputs for B sequences, none at all included.

    past_lens i32 (B,) · subsequence_begins, block_indices_begins i32 (B+1,) · block_indices i32 (all blocks,) ·
    max_context_len i32 ().
    """
    counts = np.array([row.num_tokens for row in rows], np.int64)
    past = np.array([row.sequence.num_cached for row in rows], np.int64)
    # A table may hold blocks for tokens that come later: PagedAttention takes the number of blocks at its word.
    tables = [row.sequence.blocks.ids[: blocks_for(row.sequence.num_cached + row.num_tokens)] for row in rows]
    begins = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(counts, out=begins[1:])
    block_begins = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(t) for t in tables], out=block_begins[1:])
    return {
        "past_lens": past.astype(np.int32),
        "subsequence_begins": begins,
        "block_indices": np.concatenate(tables) if tables else np.zeros(0, np.int32),
        "block_indices_begins": block_begins,
        "max_context_len": np.array((past + counts).max(initial=0), np.int32),
    }


def sampled_rows(rows: Items[ScheduledTokens]) -> np.ndarray:
    """i64: the last row of each that samples, in a step whose rows are in this order."""
    ends = np.cumsum([row.num_tokens for row in rows])
    return ends[[row.samples for row in rows]] - 1


def with_dummy_rows(inputs: dict[str, np.ndarray], num_rows: int, block: int) -> dict[str, np.ndarray]:
    """PagedAttention's inputs, and behind its sequences `num_rows` of one token each, all in `block`.

    What PagedAttention makes of them is not read; it must be given all rows that there are.
    """
    if not num_rows:
        return inputs
    steps = np.arange(1, num_rows + 1, dtype=np.int32)
    begins, block_begins = inputs["subsequence_begins"], inputs["block_indices_begins"]
    return {
        "past_lens": np.concatenate([inputs["past_lens"], np.zeros(num_rows, np.int32)]),
        "subsequence_begins": np.concatenate([begins, begins[-1] + steps]),
        "block_indices": np.concatenate([inputs["block_indices"], np.full(num_rows, block, np.int32)]),
        "block_indices_begins": np.concatenate([block_begins, block_begins[-1] + steps]),
        "max_context_len": np.array(max(int(inputs["max_context_len"]), 1), np.int32),
    }
