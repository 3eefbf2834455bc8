"""Staging blocks: full-precision keys and values of prompts that are prefilled."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from ov_kvcrush.core.eviction import Choice, EvictionSpec
from ov_kvcrush.core.request import Sequence
from ov_kvcrush.core.staged_prompt import StagedPrompt
from ov_kvcrush.kvcache.block_pool import BLOCK_SIZE, BlockPool, blocks_for
from ov_kvcrush.kvcache.block_tensors import BlockTensors
from ov_kvcrush.kvcache.planning import tiers_of
from ov_kvcrush.kvcache.room import Room
from ov_kvcrush.kvcache.sequence_kv import SequenceKV

_RESIDENT_BYTES = 16 << 20  # stays in memory: giving a page back and touching it again takes 5 us


class Staging:
    """Tensors of staging blocks and who owns which; several managers may share both.

    pool: None = a new one of all blocks but the last, which is for rows that are not of a prompt.
    """

    def __init__(self, tensors: BlockTensors, pool: BlockPool | None = None) -> None:
        self.tensors = tensors
        self.pool = pool or BlockPool(tensors.num_blocks - 1)
        self._num_resident = _RESIDENT_BYTES // tensors.bytes_per_block

    @property
    def num_tokens(self) -> int:
        """Tokens of all blocks."""
        return self.pool.num_blocks * BLOCK_SIZE

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks in use."""
        return self.pool.num_used * self.tensors.bytes_per_block

    def is_contended(self, own: Iterable[SequenceKV]) -> bool:
        """Whether blocks are in use beside those of `own`; those that are held are nobody's to wait for."""
        of_own = sum(len(kv.blocks) - kv.num_shared + (len(kv.replay.own_blocks) if kv.replay else 0) for kv in own)
        return self.pool.num_used - self.pool.num_held > of_own

    def has_room_for(self, sequence: Sequence, num_more: int) -> bool:
        """Whether there are blocks for a prompt, and as many more."""
        num_own = blocks_for(len(sequence.ids)) - len(self._shared_blocks(sequence))
        return num_own + num_more <= self.pool.num_free

    def _shared_blocks(self, sequence: Sequence) -> np.ndarray:
        """int32: blocks of the staged prompt that this one begins with, up to where it must read by itself.

        The rows whose queries are captured are read again, and rows begin with a block.
        """
        request, prefix = sequence.request, sequence.request.staged_prefix
        if prefix is None or not prefix.is_open:
            return np.zeros(0, np.int32)
        num_read = min(len(prefix.ids), len(sequence.ids) - max(request.captured_rows, 1))
        return prefix.blocks[: max(num_read, 0) // BLOCK_SIZE]

    def stage(self, sequence: Sequence, kv: SequenceKV) -> None:
        """Give a prompt its blocks: those that it shares, and its own, which the caller has seen to be free."""
        shared = self._shared_blocks(sequence)
        self.pool.share(shared)
        kv.num_shared = len(shared)
        kv.blocks.extend(shared)
        kv.blocks.extend(self.allocate(blocks_for(len(sequence.ids)) - len(shared)))
        sequence.num_cached = len(shared) * BLOCK_SIZE

    def hold_if_asked(self, sequence: Sequence, kv: SequenceKV) -> None:
        """Have a complete prompt stay on its blocks where its request wants that: `Request.staged`."""
        if sequence.request.returns_staged:
            blocks = kv.blocks.view.copy()
            self.pool.hold(blocks)
            sequence.request.staged = StagedPrompt(sequence.request.prompt_ids.copy(), blocks, self._give_back)

    def _give_back(self, blocks: np.ndarray) -> None:
        self.pool.unhold(blocks)
        self._discard(blocks)

    def allocate(self, num_blocks: int) -> np.ndarray:
        """int32: blocks that the caller has seen to be free."""
        return np.array([self.pool.allocate() for _ in range(num_blocks)], np.int32)

    def release(self, kv: SequenceKV) -> None:
        """Take back the blocks of a prompt, and those of its second reading."""
        if not kv.is_staged:
            return
        blocks = kv.blocks.view
        if kv.replay:
            blocks = np.concatenate([blocks, kv.replay.own_blocks])
            kv.replay = None
        blocks = np.sort(blocks)
        self.pool.release(blocks[::-1])  # the lowest are handed out first
        self._discard(blocks)
        kv.blocks.clear()
        kv.num_shared = 0

    def _discard(self, blocks: np.ndarray) -> None:
        gone = blocks[(blocks >= self._num_resident) & (self.pool.owners(blocks) == 0)]
        self.tensors.discard(gone)


def commit_for_each(
    sequence: Sequence, blocks: np.ndarray, choose: Callable[[EvictionSpec | None], Choice | None]
) -> None:
    """Make every cache of the fan-out of a staged prompt, in their order: `Request.fan_out_snapshots`.

    Staged keys and values are as they were computed, so equal evictions get the same choice, whatever the precisions of
    their stores. Raises StoreFull where one has no room; those before it are made.
    """
    request = sequence.request
    choices: dict[EvictionSpec | None, Choice | None] = {}
    for eviction, target in request.fan_out:
        if eviction not in choices:
            choices[eviction] = choose(eviction)
        made = target.commit_snapshot(blocks, sequence.num_cached, eviction, choices[eviction])
        request.fan_out_snapshots.append(replace(made, adapters=request.adapters))


def commit_prefill(room: Room, store_id: int, choice: Choice | None) -> None:
    """Move what was chosen (None = all) of a staged prompt to the store.

    Cached prefixes make room; what is promised to others stays. Raises StoreFull.
    """
    offsets, indices = (choice.offsets, choice.indices) if choice else (None, None)
    promised = room.admission.promised()
    tiers = tiers_of(choice)
    room.call(lambda: room.store.commit_prefill(store_id, offsets, indices, promised, **tiers), promised)
