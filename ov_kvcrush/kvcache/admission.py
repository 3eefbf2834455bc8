"""Bytes that a prompt will take: whether it can ever run, and what is promised to those that are prefilled."""

from __future__ import annotations

from ov_kvcrush import native
from ov_kvcrush.core.eviction import EvictionSpec
from ov_kvcrush.core.request import Sequence
from ov_kvcrush.kvcache.block_pool import blocks_for
from ov_kvcrush.kvcache.planning import precisions_of, same_precisions
from ov_kvcrush.kvcache.replay import ROWS, replay_blocks
from ov_kvcrush.kvcache.sequence_kv import SequenceKV
from ov_kvcrush.policies.registry import name_of

_MAX_TOKENS = 1 << 31  # a text whose cache does not grow can be as long as the model's context


class Admission:
    """Promises of the store's bytes.

    num_heads: KV heads of all layers. num_blocks, bytes_per_block: of the staging pool. chunk: rows of one step, at
    most. prefilling: sequences that have not taken all the bytes promised to them.
    """

    def __init__(self, store: native.Store, num_heads: int, num_blocks: int, bytes_per_block: int, chunk: int) -> None:
        self._store = store
        self._num_heads = num_heads
        self._num_blocks = num_blocks
        self._bytes_per_block = bytes_per_block
        self._chunk = chunk
        self.prefilling: dict[Sequence, SequenceKV] = {}

    def capacity_tokens(self, eviction: EvictionSpec | None, num_evicted: int = 0) -> int:
        """Tokens of the longest text whose bytes are within the store's limit."""
        low, high = 0, _MAX_TOKENS
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._all_bytes_for(middle, eviction, num_evicted) <= self._store.max_bytes
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def refusal(self, num_tokens: int, eviction: EvictionSpec | None, num_evicted: int = 0) -> str | None:
        """Why a prompt can never run; None if it can."""
        needed = self._all_bytes_for(num_tokens + 1, eviction, num_evicted)
        num_replay_blocks = self._replay_blocks(eviction, num_tokens)
        num_blocks = blocks_for(num_tokens) + num_replay_blocks
        if eviction and num_replay_blocks and num_blocks > self._num_blocks:
            return (
                f"prompt must fit into the staging blocks to be read twice, as policy {name_of(eviction.policy)!r} "
                f"wants: it takes {num_blocks * self._bytes_per_block} bytes, "
                f"got staging of {self._num_blocks * self._bytes_per_block}; raise staging_bytes"
            )
        if needed <= self._store.max_bytes:
            return None
        return (
            f"prompt must fit into the KV store of {self._store.max_bytes} bytes, got {num_tokens} tokens, "
            f"which take {needed} bytes; raise max_bytes or lower the precision"
        )

    def replay_blocks_of(self, sequence: Sequence) -> int:
        """Staging blocks for the second reading of a sequence's prompt, 0 if it has none."""
        return self._replay_blocks(sequence.request.replayer, len(sequence.ids))

    def _replay_blocks(self, eviction: EvictionSpec | None, num_tokens: int) -> int:
        replay = eviction.policy.inputs.replay if eviction else None
        if eviction is None or replay is None or not eviction.num_read_again(num_tokens):
            return 0
        return replay_blocks(replay, eviction.replay_prompt, num_tokens)

    def _bytes_for(self, length: int, eviction: EvictionSpec | None, num_evicted: int = 0) -> int:
        """The most bytes that the store holds of one text of `length` tokens, which came without num_evicted."""
        if eviction is None:
            return self._store.bytes_for(max(length - num_evicted, 0))
        most = max(eviction.peak_tokens(length, self._chunk, num_evicted), 0)
        of_heads = eviction.peak_of_heads(length, self._chunk, num_evicted)
        tokens = most if of_heads is None else of_heads
        needed = self._store.bytes_for(tokens, precisions_of(eviction.plan) if eviction.plan else None)
        if eviction.policy.tiers:  # any number of the tokens may be in the first one
            first = same_precisions(eviction.policy.tiers[0], self._num_heads)
            needed = max(needed, self._store.bytes_for(tokens, first))
        return needed

    def _all_bytes_for(self, length: int, eviction: EvictionSpec | None, num_evicted: int) -> int:
        """`_bytes_for`, and the queries that are captured for the eviction."""
        rows = min(eviction.window, length) if eviction else 0
        return self._bytes_for(length, eviction, num_evicted) + self._store.capture_bytes(rows)

    def promised(self, without: Sequence | None = None) -> int:
        """Bytes that prompts being prefilled will still take."""
        return sum(self._missing(s, kv) for s, kv in self.prefilling.items() if s is not without)

    def _missing(self, sequence: Sequence, kv: SequenceKV) -> int:
        gone = kv.state.num_evicted
        held = 0 if kv.is_staged else sequence.num_cached - gone
        most = self._bytes_for(len(sequence.ids), sequence.request.eviction, gone)
        rows = min(sequence.request.captured_rows, len(sequence.ids))
        captured = self._store.capture_bytes(rows, kv.store_id)
        if self.replay_blocks_of(sequence):  # its reader captures queries of its own
            captured += self._store.capture_bytes(min(ROWS, self._chunk))
        plan = sequence.request.plan
        taken = self._store.bytes_for(held, precisions_of(plan) if plan else None)
        return max(most - taken, 0) + captured
