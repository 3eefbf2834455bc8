"""Heads keep the fractions of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ov_kvcrush.policies.base import BudgetAllocator, CacheState, Scores
from ov_kvcrush.policies.budgets.allocation import Bounds, by_layer, fit
from ov_kvcrush.policies.plans.plan import CachePlan


@dataclass(frozen=True)
class Planned(BudgetAllocator):
    """Heads keep the fractions of a plan that was solved from a profile of the model.

    The budget is shared in the proportions of the plan. Heads that cannot take or give their part come as close as they
    can, and the others share the difference evenly. Needs nothing; O(heads).

    plan: of the model's layers and KV heads.
    """

    name: ClassVar[str] = "planned"
    plan: CachePlan

    def allocate(self, state: CacheState, scores: Scores, tokens: int) -> list[list[int]]:
        bounds = Bounds.of(state)
        wanted = np.array([head.kept for head in self.plan.flat]) / self.plan.mean_kept * tokens
        return by_layer(state, fit(np.minimum(wanted, bounds.high), bounds, bounds.total(tokens)))
