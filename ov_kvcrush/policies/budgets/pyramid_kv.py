"""The first layers keep more than the last ones, falling in a straight line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ov_kvcrush.policies.base import BudgetAllocator, CacheState, Scores
from ov_kvcrush.policies.budgets.allocation import Bounds, by_layer, fit
from ov_kvcrush.utils.checks import check_integer


@dataclass(frozen=True)
class PyramidKV(BudgetAllocator):
    """The first layers keep more than the last ones, falling in a straight line.

    Paper: https://arxiv.org/abs/2406.02069. Beside the protected tokens, the last layer keeps 1 / beta of the mean B,
    and the first one the more. Where that is more than there is, the first layer keeps all and the line is less steep;
    a text shorter than 2 B is split evenly, as the authors do. Needs nothing; O(heads).

    Departures: the paper's window is every protected token here; nothing is rounded before the sum is met exactly.

    beta: how many times fewer than the mean the last layer keeps, at least 1; 1 = evenly.
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
        # One layer alone has no slope.
        return np.linspace(first, 2 * mean - first, layers) if layers > 1 else np.full(1, mean)
