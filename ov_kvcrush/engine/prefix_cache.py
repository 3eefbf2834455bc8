"""KV of ended requests, kept so that a prompt which begins with the same tokens need not compute it again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ov_kvcrush.engine.block_pool import BlockPool, blocks_for


@dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens int64 (S,) and the blocks int32 (blocks_for(S),) that hold their KV; the cache is an owner of each."""

    ids: np.ndarray
    blocks: np.ndarray


class PrefixCache:
    """Prefixes from the least to the most recently used. Sharing is by token, not by block: the block in which a common
    prefix ends is shared too, and copied by whoever writes to it first.
    """

    def __init__(self, pool: BlockPool, max_prefixes: int | None = None) -> None:
        self._pool = pool
        self._max_prefixes = max_prefixes
        self._prefixes: list[Prefix] = []

    def __len__(self) -> int:
        return len(self._prefixes)

    def put(self, ids: np.ndarray, blocks: np.ndarray) -> None:
        """Keep the KV of `ids` in `blocks`: the cache becomes one more owner. Prefixes contained in it are dropped."""
        new = Prefix(ids.copy(), blocks[: blocks_for(len(ids))].copy())
        if not len(new.ids):
            return
        self._pool.share(new.blocks)
        for old in list(self._prefixes):
            if common_length(old.ids, new.ids) == len(old.ids):
                self._drop(old)
        self._prefixes.append(new)
        if self._max_prefixes is not None and len(self._prefixes) > self._max_prefixes:
            self._drop(self._prefixes[0])

    def match(self, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """Find the longest common prefix with `ids`, short of its last token, whose logits are needed.

        Returns the blocks, with the caller as one more owner, and the number of tokens that they hold of `ids`.
        """
        best, length = None, 0
        for prefix in self._prefixes:
            common = min(common_length(prefix.ids, ids), len(ids) - 1)
            if common > length:
                best, length = prefix, common
        if best is None:
            return np.zeros(0, np.int32), 0
        self._prefixes.remove(best)
        self._prefixes.append(best)
        blocks = best.blocks[: blocks_for(length)]
        self._pool.share(blocks)
        return blocks, length

    def reclaim(self, num_blocks: int) -> None:
        """Drop the least recently used prefixes until `num_blocks` blocks are free or nothing is left to drop."""
        while self._prefixes and self._pool.num_free < num_blocks:
            self._drop(self._prefixes[0])

    def clear(self) -> None:
        """Drop everything."""
        while self._prefixes:
            self._drop(self._prefixes[0])

    def _drop(self, prefix: Prefix) -> None:
        self._prefixes.remove(prefix)
        self._pool.release(prefix.blocks)


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """Number of leading elements that are equal."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
