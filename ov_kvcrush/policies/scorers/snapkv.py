"""SnapKV: tokens that the last queries of the prompt attend to, and their neighbours, are those the answer needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ov_kvcrush.errors import CrushError
from ov_kvcrush.policies.base import Inputs, LayerState, Scorer
from ov_kvcrush.utils.checks import check_choice, check_integer

AGGREGATES = ("mean", "max", "sum")
POOLINGS = ("avg", "max", "none")
REDUCTIONS = ("mean", "max", "sum_squares")


def pool(scores: np.ndarray, pooling: str, kernel: int) -> np.ndarray:
    """float32 (S,): average or maximum of the `kernel` (odd) scores around each, at the ends of fewer. O(S * kernel).

    The average always divides by `kernel`, as with zero padding. No running sums: equal neighbourhoods must get equal
    results, so that ties stay ties.
    """
    if pooling == "none":
        return scores
    combine = np.add if pooling == "avg" else np.maximum
    pooled = scores.copy()
    for shift in range(1, min(kernel // 2, len(scores) - 1) + 1):
        combine(pooled[shift:], scores[:-shift], out=pooled[shift:])
        combine(pooled[:-shift], scores[shift:], out=pooled[:-shift])
    return pooled / np.float32(kernel) if pooling == "avg" else pooled


@dataclass(frozen=True)
class SnapKV(Scorer):
    """Attention of the last queries, pooled over neighbouring tokens.

    Paper: https://arxiv.org/abs/2404.14469. Needs: attention of `window` query rows. Cost: O(S * (G + kernel)) a head.

    Departures: one score per KV head rather than per query head, so that the cache does not grow G-fold; mean over the
    rows rather than sum, which gives the same order; the window's own tokens are scored and pooled with the rest (a
    policy's recent tokens protect them); after an eviction, neighbours are those in the cache, not those in the text.
    The defaults come from the measurement in docs/policies.md, not from the paper (32 and 5).

    window: query rows, fewer if the text is shorter. pooling: "avg", "max" or "none". kernel: tokens pooled, odd.
    aggregate: over the G query heads, "mean", "max" or "sum". reduce: over the rows, "mean", "max" or "sum_squares".
    Raises CrushError for anything else.
    """

    name: ClassVar[str] = "snapkv"
    window: int = 16
    pooling: str = "avg"
    kernel: int = 13
    aggregate: str = "mean"
    reduce: str = "mean"

    def __post_init__(self) -> None:
        check_integer("window", self.window, 1)
        check_choice("pooling", self.pooling, POOLINGS)
        check_integer("kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise CrushError(f"kernel must be odd, got {self.kernel}")
        check_choice("aggregate", self.aggregate, AGGREGATES)
        check_choice("reduce", self.reduce, REDUCTIONS)

    @property
    def inputs(self) -> Inputs:
        return Inputs(window=self.window, reduce=self.reduce)

    def score(self, layer: LayerState, index: int, length: int) -> list[np.ndarray]:
        scores = []
        for head in layer:
            assert head.attention is not None
            scores.append(pool(getattr(head.attention, self.aggregate)(axis=0), self.pooling, self.kernel))
        return scores
