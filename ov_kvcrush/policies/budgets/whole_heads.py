"""Retrieval heads keep everything, the others only protected tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ov_kvcrush.policies.base import BudgetAllocator, CacheState, Scores
from ov_kvcrush.policies.budgets.allocation import Bounds, by_layer


@dataclass(frozen=True)
class WholeHeads(BudgetAllocator):
    """Heads of the highest scores keep everything, the others only protected tokens.

    KVzip's head level, https://arxiv.org/abs/2505.23416, section 3.4: heads that attend far back keep the text, heads
    that attend locally do not. A head's score is the highest of its unprotected tokens. The last head to get budget
    keeps its best tokens. Needs scores that compare between layers and heads; O(cached tokens).

    Departures: the paper finds the heads once per model, on a text of its own; here they are found for each text.
    """

    name: ClassVar[str] = "heads"

    def allocate(self, state: CacheState, scores: Scores, tokens: int) -> list[list[int]]:
        bounds = Bounds.of(state)
        pairs = [
            (head, values)
            for layer, of_layer in zip(state.layers, scores, strict=True)
            for head, values in zip(layer, of_layer, strict=True)
        ]
        best = [values[~state.is_protected(head)].max(initial=-np.inf) for head, values in pairs]
        counts = bounds.low.copy()
        left = bounds.total(tokens) - int(counts.sum())
        for index in np.argsort(-np.array(best, np.float64), kind="stable"):
            more = min(left, int(bounds.high[index] - bounds.low[index]))
            counts[index] += more
            left -= more
        return by_layer(state, counts)
