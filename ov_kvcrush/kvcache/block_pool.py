"""Who owns which block of the KV cache: ids and reference counts, no memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BLOCK_SIZE = 32  # tokens of one block; PagedAttention on CPU knows no other size


def blocks_for(num_tokens: int) -> int:
    """Blocks that `num_tokens` tokens take."""
    return -(-num_tokens // BLOCK_SIZE)


class BlockPool:
    """Block ids 0 .. num_blocks-1 with a reference count each.

    A block that was used before is handed out before one that never was: memory is touched only when it is needed.
    num_held: blocks that stay until `unhold`, whatever runs.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_held = 0
        self._ref_counts = np.zeros(num_blocks, np.int32)
        self._freed: list[int] = []
        self._num_touched = 0

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out now."""
        return self.num_blocks - self._num_touched + len(self._freed)

    @property
    def num_used(self) -> int:
        """Blocks with at least one owner."""
        return self._num_touched - len(self._freed)

    def allocate(self) -> int:
        """Hand out one block with a reference count of 1. The caller has checked `num_free`."""
        assert self.num_free > 0, "allocate() without a free block"
        if self._freed:
            block = self._freed.pop()
        else:
            block = self._num_touched
            self._num_touched += 1
        self._ref_counts[block] = 1
        return block

    def share(self, blocks: np.ndarray) -> None:
        """Add one owner to each of `blocks`."""
        assert (self._ref_counts[blocks] > 0).all(), "share() of a free block"
        self._ref_counts[blocks] += 1

    def hold(self, blocks: np.ndarray) -> None:
        """Add an owner that no step takes away."""
        self.share(blocks)
        self.num_held += len(blocks)

    def unhold(self, blocks: np.ndarray) -> None:
        """Take that owner away."""
        self.num_held -= len(blocks)
        self.release(blocks)

    def is_shared(self, block: int) -> bool:
        """Whether `block` has more than one owner, and must be copied before it is written."""
        return self.num_owners(block) > 1

    def num_owners(self, block: int) -> int:
        """Owners of `block`."""
        return int(self._ref_counts[block])

    def owners(self, blocks: np.ndarray) -> np.ndarray:
        """int32: owners of each of `blocks`."""
        return self._ref_counts[blocks]

    def freed_by(self, owners: Sequence[np.ndarray]) -> int:
        """Blocks that would be free if each of these owners gave its own back."""
        if not owners:
            return 0
        blocks, counts = np.unique(np.concatenate(owners), return_counts=True)
        return int((self._ref_counts[blocks] == counts).sum())

    def release(self, blocks: np.ndarray) -> None:
        """Take one owner from each of `blocks`; those without one are free again."""
        assert (self._ref_counts[blocks] > 0).all(), "release() of a free block"
        self._ref_counts[blocks] -= 1
        self._freed.extend(blocks[self._ref_counts[blocks] == 0].tolist())
