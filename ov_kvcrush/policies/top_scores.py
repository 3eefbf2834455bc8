"""The policy of most methods: one scorer and one budget allocator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from ov_kvcrush.policies.base import BudgetAllocator, CacheState, Inputs, Policy, Scorer, Selection, top_with_protected
from ov_kvcrush.policies.budgets.uniform import Uniform


@dataclass(frozen=True)
class TopScores(Policy):
    """Every head keeps its tokens of the highest scores, as many as the budget allocator gives it.

    Needs what its components need; costs what they cost and O(cached tokens).

    scorer: how much each token matters. allocator: how many tokens each head keeps.
    """

    name: ClassVar[str] = "top_scores"
    scorer: Scorer = field(kw_only=True)
    allocator: BudgetAllocator = field(default_factory=Uniform, kw_only=True)

    @property
    def inputs(self) -> Inputs:
        return self.scorer.inputs | self.allocator.inputs

    def select(self, state: CacheState, tokens: int) -> Selection:
        scores = [self.scorer.score(layer, index, state.length) for index, layer in enumerate(state.layers)]
        counts = self.allocator.allocate(state, scores, tokens)
        kept = [
            [
                top_with_protected(values, state.is_protected(head), count)
                for head, values, count in zip(layer, layer_scores, layer_counts, strict=True)
            ]
            for layer, layer_scores, layer_counts in zip(state.layers, scores, counts, strict=True)
        ]
        return Selection(kept)

    def update(self, state: CacheState) -> list[list[np.ndarray]] | None:
        return self.scorer.update_all(state) if self.inputs.state else None
