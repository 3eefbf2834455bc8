"""One threshold over all layers and heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ov_kvcrush.policies.base import BudgetAllocator, CacheState, Scores
from ov_kvcrush.policies.budgets.allocation import Bounds, Rivals, by_layer
from ov_kvcrush.utils.checks import check_fraction


@dataclass(frozen=True)
class GlobalThreshold(BudgetAllocator):
    """One threshold over all layers and heads: the highest scores stay, in whichever head.

    As in KVzip, https://arxiv.org/abs/2505.23416. Needs scores that compare between layers and heads; O(cached tokens).

    floor: fraction of the unprotected budget that is shared evenly, in [0, 1]; 0 = the threshold alone.
    """

    name: ClassVar[str] = "global"
    floor: float = 0.0

    def __post_init__(self) -> None:
        check_fraction("floor", self.floor, zero=True)

    def allocate(self, state: CacheState, scores: Scores, tokens: int) -> list[list[int]]:
        bounds = Bounds.of(state)
        return by_layer(state, Rivals.of(state, scores).compete(bounds, bounds.total(tokens), self.floor))
