"""Heads keep the fractions of a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ov_kvcrush.policies.base import Budget, BudgetAllocator, CacheState, Policy, Scores
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


def chooses_alike(policy: Policy, other: Policy | None) -> bool:
    """Whether both choose tokens by the same rule: they are equal, or both planned, whatever the plans.

    Plans of one budget differ with the length of the text: a conversation goes on under the plan of its new length.
    """
    if policy == other:
        return True
    if other is None or not all(isinstance(getattr(x, "allocator", None), Planned) for x in (policy, other)):
        return False
    return replace(policy, budget=other.budget, allocator=other.allocator) == other  # type: ignore[call-arg,attr-defined]


def planned(policy: Policy, plan: CachePlan) -> Policy:
    """The policy with the plan's budget: it says which tokens stay, the plan how many of each head."""
    least = min(policy.budget.min_tokens, policy.budget.floor)
    budget = Budget(kept=plan.mean_kept, min_tokens=max(least, policy.sink_tokens + policy.recent_tokens))
    changes: dict[str, object] = {"budget": budget}
    if hasattr(policy, "allocator"):
        changes["allocator"] = Planned(plan)
    return replace(policy, **changes)  # type: ignore[arg-type]
