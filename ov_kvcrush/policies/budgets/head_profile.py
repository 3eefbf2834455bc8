"""BaKlaVa: heads that change their input more keep more tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ov_kvcrush.policies.base import BudgetAllocator, CacheState, Scores
from ov_kvcrush.policies.budgets.allocation import Bounds, by_layer, fit
from ov_kvcrush.utils.checks import check_fraction, check_number


@dataclass(frozen=True)
class HeadProfile(BudgetAllocator):
    """Heads get a low, a medium or a high budget, by how much each changes its input on calibration texts.

    Gulhan et al., "BaKlaVa: Budgeted Allocation of KV cache for Long-context Inference", arXiv 2502.13176, section 3.
    Needs nothing of the text; O(heads log heads).

    changes: of the KV heads of all layers, 1 - cos(head input, head output), see `eval.calibrate.baklava`.
    low_share, high_share: the fraction of the heads that gets a low and a high budget. spread: the high budget is
    `spread` times the medium one, which is `spread` times the low one.
    Raises CrushError for shares that sum to more than 1, and for what is out of range.
    """

    name: ClassVar[str] = "baklava"
    changes: tuple[float, ...]
    low_share: float = 0.25
    high_share: float = 0.25
    spread: float = 2.0

    def __post_init__(self) -> None:
        check_fraction("low_share", self.low_share)
        check_fraction("high_share", self.high_share)
        check_fraction("low_share + high_share", self.low_share + self.high_share)
        check_number("spread", self.spread, 1)

    def allocate(self, state: CacheState, scores: Scores, tokens: int) -> list[list[int]]:
        bounds = Bounds.of(state)
        weights = self.weights()
        assert len(weights) == len(bounds.low), "the profile of another model"
        return by_layer(state, fit(weights * (tokens / weights.mean()), bounds, bounds.total(tokens)))

    def weights(self) -> np.ndarray:
        """float64 (N,): the budget of each head over the medium one. Of equal changes the first heads are lower."""
        count = len(self.changes)
        order = np.argsort(np.array(self.changes), kind="stable")
        weights = np.ones(count)
        weights[order[: round(self.low_share * count)]] = 1 / self.spread
        weights[order[count - round(self.high_share * count) :]] = self.spread
        return weights
