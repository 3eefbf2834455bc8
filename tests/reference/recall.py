"""Which tiles a decode step reads, in numpy: what native/src/store/recall.cpp must choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from reference.clusters import SINK_TOKENS
from reference.codec import TILE, num_recalled, num_target_tiles

Array = npt.NDArray[Any]
ROWS = 4  # the most rows of a step that are ranked


@dataclass(frozen=True)
class Recalled:
    """Tiles of a head: those that are read in any case, and the ranked ones with their weights.

    num_read: ranked tiles that are read, all of them where there are no more.
    """

    always: Array
    ranked: Array
    weights: Array
    num_read: int

    def accepts(self, chosen: Array, tolerance: float) -> bool:
        """Whether these tiles, ascending, are the best ones, but for weights that differ by the tolerance at most."""
        best = np.isin(self.ranked, chosen)
        expected = np.sort(np.concatenate([self.always, self.ranked[best]]))
        worst = self.weights[best].min(initial=np.inf)
        left = self.weights[~best].max(initial=-np.inf)
        is_enough = best.sum() == min(self.num_read, len(self.ranked))
        return bool(np.array_equal(chosen, expected) and is_enough and worst >= left - tolerance)


def recalled(
    keys: Array,
    positions: Array,
    q: Array,
    row_positions: Array,
    *,
    scale: float,
    window: int,
    recall_tokens: float,
    recent_tokens: int,
) -> Recalled:
    """For keys (S, D) of one KV head at positions (S,) and rows q (T, G, D) of its query heads at row_positions (T,).

    A tile weighs the mean over rows and query heads of softmax(scale * q . its mean key).
    """
    num_tiles = -(-len(keys) // TILE)
    before_recent = num_target_tiles(len(keys), recent_tokens)
    tiles = positions[: TILE * before_recent].reshape(-1, TILE)
    seen = tiles.max(axis=1, initial=-1) > (row_positions[0] - window if window else -1)
    sinks = seen & (tiles.min(axis=1, initial=np.iinfo(np.int32).max) < SINK_TOKENS)
    ranked = np.flatnonzero(seen & ~sinks)
    always = np.concatenate([np.flatnonzero(sinks), np.arange(before_recent, num_tiles)])
    means = keys[: TILE * before_recent].reshape(before_recent, TILE, -1).astype(np.float64).mean(axis=1)
    logits = scale * q.astype(np.float64) @ means[ranked].astype(np.float16).astype(np.float64).T
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True, initial=-np.inf))
    weights /= weights.sum(axis=-1, keepdims=True)
    return Recalled(always, ranked, weights.mean(axis=(0, 1)), num_recalled(recall_tokens, len(keys)))
