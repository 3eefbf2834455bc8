"""Heads keep the fractions of a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ov_kvcrush.policies.base import Budget, BudgetAllocator, CacheState, DefaultBudget, Policy, Scores
from ov_kvcrush.policies.budgets.allocation import Bounds, by_layer
from ov_kvcrush.policies.plans.plan import CachePlan, whole_tiles


@dataclass(frozen=True)
class Planned(BudgetAllocator):
    """Heads keep the fractions of a plan that was solved from a profile of the model.

    The budget is a mean in whole tokens, rounded up: heads get what the plan says of a text that the budget is at least
    for, a few tokens less, in whole tiles. Needs nothing; O(heads).

    plan: of the model's layers and KV heads.
    """

    name: ClassVar[str] = "planned"
    plan: CachePlan

    def allocate(self, state: CacheState, scores: Scores, tokens: int) -> list[list[int]]:
        bounds = Bounds.of(state)
        kept = np.array([head.kept for head in self.plan.flat])
        wanted = np.ceil(kept * (tokens - 1) / self.plan.mean_kept).astype(np.int64)
        counts = np.minimum(whole_tiles(np.maximum(wanted, bounds.low)), bounds.high).astype(np.int64)
        return by_layer(state, np.where(kept == 1, bounds.high, counts))


def chooses_alike(policy: Policy, other: Policy | None) -> bool:
    """Whether both choose tokens by the same rule: they are equal, or plans say how many stay, whatever the plans.

    Plans of one budget differ with the length of the text: a conversation goes on under the plan of its new length, and
    one that began too short for the default budget under its first.
    """
    if policy == other:
        return True
    if other is None or not (_is_planned(policy) and _is_planned(other)):
        return False
    changes: dict[str, object] = {"budget": other.budget}
    if hasattr(policy, "allocator") and hasattr(other, "allocator"):
        changes["allocator"] = other.allocator
    return replace(policy, **changes) == other  # type: ignore[arg-type]


def _is_planned(policy: Policy) -> bool:
    return isinstance(policy.budget, DefaultBudget) or isinstance(getattr(policy, "allocator", None), Planned)


def planned(policy: Policy, plan: CachePlan) -> Policy:
    """The policy with the plan's budget: it says which tokens stay, the plan how many of each head."""
    least = min(policy.budget.min_tokens, policy.budget.floor)
    budget = Budget(kept=plan.mean_kept, min_tokens=max(least, policy.sink_tokens + policy.recent_tokens))
    changes: dict[str, object] = {"budget": budget}
    if hasattr(policy, "allocator"):
        changes["allocator"] = Planned(plan)
    return replace(policy, **changes)  # type: ignore[arg-type]
