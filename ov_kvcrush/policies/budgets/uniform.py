"""Every head keeps the same number of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ov_kvcrush.policies.base import BudgetAllocator, CacheState, Scores
from ov_kvcrush.policies.budgets.allocation import Bounds, by_layer, fit


@dataclass(frozen=True)
class Uniform(BudgetAllocator):
    """Every head keeps the same number of tokens.

    As in most methods (H2O, SnapKV, StreamingLLM). Heads that cannot (fewer cached, more protected) come as close as
    they can, and the others share the difference evenly. Needs nothing; O(heads). No fields.
    """

    name: ClassVar[str] = "uniform"

    def allocate(self, state: CacheState, scores: Scores, tokens: int) -> list[list[int]]:
        bounds = Bounds.of(state)
        wanted = np.full(len(bounds.low), float(tokens))
        return by_layer(state, fit(wanted, bounds, bounds.total(tokens)))
