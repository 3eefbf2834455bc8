"""Rows of guessed tokens: how many a step may run, so that each reads what it would read alone; which of them stay."""

from __future__ import annotations

from ov_kvcrush import native
from ov_kvcrush.core.eviction import EvictionState
from ov_kvcrush.core.request import Sequence
from ov_kvcrush.kvcache.block_pool import BLOCK_SIZE
from ov_kvcrush.kvcache.sequence_kv import SequenceKV


def max_draft(sequence: Sequence, state: EvictionState, rows: int, most: int) -> int:
    """Of a stored sequence, `most` at most. rows: that a step may have of it.

    A tile that fills lets an older one be quantised, and a cache that grows over its budget lets a policy choose: what
    is there afterwards is for the next step. Where heads hold different numbers of tokens, some tile fills nearly
    always: there the rows behind it read that tile before it is quantised.
    """
    cached = sequence.num_cached
    most = min(most, rows - 1)
    if not state.num_evicted:
        most = min(most, BLOCK_SIZE - 1 - cached % BLOCK_SIZE)
    eviction = sequence.request.eviction
    if eviction is None:
        return most
    for num_rows in range(1, most + 1):
        length = cached + num_rows
        if eviction.wants(length, length - state.num_evicted, is_read=False):
            return num_rows - 1
    return most


def settle(store: native.Store, kv: SequenceKV, num_tokens: int, num_wrong: int) -> None:
    """Leave the first `num_tokens` tokens of a text, without those guessed wrong; quantise what is old enough."""
    if num_wrong:
        store.crop(kv.store_id, num_tokens)
    kv.free_slots = store.free_slots(kv.store_id)
    if not kv.free_slots or kv.state.num_evicted:
        store.quantize_aged(kv.store_id)
