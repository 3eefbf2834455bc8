"""What options take in bytes: the store's formula (docs/kv_store.md) for one head, without the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ov_kvcrush.policies.plans.plan import TILE, HeadPlan, kept_tokens

TileBytes = Callable[[str, str, int], int]  # key precision, value precision, head size


def _nothing(head_size: int) -> int:
    return 0


@dataclass(frozen=True)
class CacheGeometry:
    """head_sizes: D of each KV head of all layers. recent: precision of the recent window of `recent_tokens` tokens.

    least: tokens that a head keeps in any case. tile_bytes: of a tile of 32 tokens. more_bytes: what each tile of this
    cache has beyond that, at most, by the head size; a cache that is compared with has none of it.
    """

    head_sizes: tuple[int, ...]
    recent: str
    recent_tokens: int
    least: int
    tile_bytes: TileBytes
    more_bytes: Callable[[int], int] = _nothing

    def sizes(self, options: Sequence[HeadPlan], length: int) -> np.ndarray:
        """float64 (N, O): bytes of each head with each option, of a text of `length` tokens."""
        kept = kept_tokens(np.array([option.kept for option in options]), length, self.least)
        settled = np.maximum(0, kept - self.recent_tokens) // TILE
        newest = np.ceil((kept - settled * TILE) / TILE)
        return self._by_head(lambda size: settled * self._tiles(options, size) + newest * self._recent(size))

    def settled_sizes(self, options: Sequence[HeadPlan]) -> np.ndarray:
        """float64 (N, O): bytes of each head with each option for each tile of the text that left the recent window."""
        kept = np.array([option.kept for option in options])
        return self._by_head(lambda size: kept * self._tiles(options, size))

    def window_bytes(self) -> float:
        """Bytes of the recent windows of all heads, at their longest."""
        tiles = self.recent_tokens // TILE + 1
        return float(sum(tiles * self._recent(size) for size in self.head_sizes))

    def full_bytes(self, length: int) -> float:
        """Bytes of all heads where everything stays in bf16."""
        return float(sum(-(-length // TILE) * self.tile_bytes("bf16", "bf16", size) for size in self.head_sizes))

    def full_settled(self) -> float:
        """Bytes of a tile of all heads in bf16."""
        return float(sum(self.tile_bytes("bf16", "bf16", size) for size in self.head_sizes))

    def _tiles(self, options: Sequence[HeadPlan], size: int) -> np.ndarray:
        held = [self.tile_bytes(option.key, option.value, size) + self.more_bytes(size) for option in options]
        return np.array(held, np.float64)

    def _recent(self, size: int) -> int:
        return self.tile_bytes(self.recent, self.recent, size) + self.more_bytes(size)

    def _by_head(self, of_size: Callable[[int], np.ndarray]) -> np.ndarray:
        found = {size: of_size(size) for size in set(self.head_sizes)}
        return np.stack([found[size] for size in self.head_sizes])
