"""Ada-KV: the heads of a layer share its budget by how many of the layer's highest scores are theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ov_kvcrush.policies.base import BudgetAllocator, CacheState, Scores
from ov_kvcrush.policies.budgets.allocation import Bounds, Rivals, by_layer, fit
from ov_kvcrush.utils.checks import check_fraction


@dataclass(frozen=True)
class AdaKV(BudgetAllocator):
    """The heads of a layer share its budget by how many of the layer's highest scores are theirs.

    Paper: https://arxiv.org/abs/2407.11550. Every layer keeps the same number of tokens per head. Heads whose attention
    is concentrated leave budget to heads whose attention is spread. Needs scores that compare between heads, as
    attention does; O(cached tokens).

    Departures: KV heads, not query heads; protected tokens do not compete; rounding by the largest fraction, so
    that the sum is met; scores are not weighted per head (an option of the authors' code).

    floor: fraction of the unprotected budget that is shared evenly, in [0, 1]; 1 = Uniform.
    """

    name: ClassVar[str] = "ada"
    floor: float = 0.2

    def __post_init__(self) -> None:
        check_fraction("floor", self.floor, zero=True)

    def allocate(self, state: CacheState, scores: Scores, tokens: int) -> list[list[int]]:
        bounds = Bounds.of(state)
        ends = np.cumsum([len(layer) for layer in state.layers])
        heads = [bounds.slice(end - len(layer), end) for end, layer in zip(ends, state.layers, strict=True)]
        layers = Bounds(np.array([h.low.sum() for h in heads]), np.array([h.high.sum() for h in heads]))
        wanted = np.array([float(tokens * len(layer)) for layer in state.layers])
        totals = fit(wanted, layers, bounds.total(tokens))
        counts = [
            Rivals.of(state, scores, i, i + 1).compete(heads[i], int(total), self.floor)
            for i, total in enumerate(totals)
        ]
        return by_layer(state, np.concatenate(counts))
