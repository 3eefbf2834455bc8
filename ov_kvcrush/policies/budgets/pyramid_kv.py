"""PyramidKV: early layers keep more tokens than late ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ov_kvcrush.policies.base import BudgetAllocator, CacheState, Scores
from ov_kvcrush.policies.budgets.allocation import Bounds, by_layer, fit
from ov_kvcrush.utils.checks import check_integer


@dataclass(frozen=True)
class PyramidKV(BudgetAllocator):
    """Early layers keep more tokens than late ones: budgets fall linearly with depth.

    Paper: https://arxiv.org/abs/2406.02069. With a mean of B beside the protected tokens, the last layer keeps B / beta
    and the first one 2 B - B / beta; if that exceeds the text, it keeps all and the line is less steep. For a text
    shorter than 2 B all layers keep the same, as by the authors. Needs nothing; O(heads).

    Departures: the paper's window is every protected token here; rounding is left to the end, so the sum is exact.

    beta: the last layer keeps this many times fewer tokens than the mean, at least 1; 1 = evenly.
    """

    name: ClassVar[str] = "pyramid"
    beta: int = 20

    def __post_init__(self) -> None:
        check_integer("beta", self.beta, 1)

    def allocate(self, state: CacheState, scores: Scores, tokens: int) -> list[list[int]]:
        bounds = Bounds.of(state)
        always = float(bounds.low.mean())
        line = always + self._line(tokens - always, state.length - always, state.length, len(state.layers))
        wanted = np.repeat(line, [len(layer) for layer in state.layers])
        return by_layer(state, fit(wanted, bounds, bounds.total(tokens)))

    def _line(self, mean: float, most: float, length: int, layers: int) -> np.ndarray:
        """float64 (L,): tokens of each layer beside the protected ones, `mean` on average and at most `most`."""
        if mean <= 0 or length < 2 * mean:
            return np.full(layers, mean)
        first = min(2 * mean - mean / self.beta, most)
        # A single layer has no slope.
        return np.linspace(first, 2 * mean - first, layers) if layers > 1 else np.full(1, mean)
