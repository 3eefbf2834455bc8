"""LeanKV: important tokens stay in a high precision, others in a low one, the rest is dropped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from ov_kvcrush.errors import CrushError
from ov_kvcrush.policies.base import (
    BudgetAllocator,
    CacheState,
    Inputs,
    Policy,
    Scorer,
    Selection,
    top,
    top_with_protected,
)
from ov_kvcrush.policies.budgets.ada_kv import AdaKV
from ov_kvcrush.policies.plans.plan import PLAN_PRECISIONS
from ov_kvcrush.policies.scorers.snapkv import SnapKV
from ov_kvcrush.utils.checks import check_fraction


@dataclass(frozen=True)
class LeanKV(Policy):
    """Important tokens stay in a high precision, others in a low one, the rest is dropped.

    Paper: https://arxiv.org/abs/2412.03131. Keys have more bits than values. Needs what its components need; costs what
    they cost and O(cached tokens).

    Departures: the paper compares a token's score with multiples of the mean; here the budget says how many tokens
    stay, `high_share` how many of a layer are in the high precision: those of the highest scores in whichever head.

    scorer: how much each token matters. allocator: how many tokens each head keeps.
    high, low: precisions "keys/values", the low one of no more bits. high_share: in [0, 1].
    Raises CrushError for anything else.
    """

    name: ClassVar[str] = "leankv"
    scorer: Scorer = field(default_factory=SnapKV, kw_only=True)
    allocator: BudgetAllocator = field(default_factory=AdaKV, kw_only=True)
    high: str = field(default="u8/u4", kw_only=True)
    low: str = field(default="u4/u2", kw_only=True)
    high_share: float = field(default=0.25, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("high_share", self.high_share, zero=True)
        for better, worse in zip(_pair("high", self.high), _pair("low", self.low), strict=True):
            if PLAN_PRECISIONS.index(better) > PLAN_PRECISIONS.index(worse):
                raise CrushError(f"low must have no more bits than high={self.high}, got {self.low!r}")

    @property
    def inputs(self) -> Inputs:
        return self.scorer.inputs | self.allocator.inputs

    @property
    def tiers(self) -> tuple[tuple[str, str], ...]:
        return _pair("high", self.high), _pair("low", self.low)

    def select(self, state: CacheState, tokens: int) -> Selection:
        scores = [self.scorer.score(layer, index, state.length) for index, layer in enumerate(state.layers)]
        counts = self.allocator.allocate(state, scores, tokens)
        kept, tiers = [], []
        for layer, layer_scores, layer_counts in zip(state.layers, scores, counts, strict=True):
            chosen = [
                top_with_protected(values, state.is_protected(head), count)
                for head, values, count in zip(layer, layer_scores, layer_counts, strict=True)
            ]
            kept.append(chosen)
            tiers.append(self._tiers([values[i] for values, i in zip(layer_scores, chosen, strict=True)]))
        return Selection(kept, tiers=tiers, precisions=self.tiers)

    def _tiers(self, scores: list[np.ndarray]) -> list[np.ndarray]:
        """[K] uint8: 0 for the highest scores of the layer, 1 for the others."""
        every = np.concatenate(scores)
        tiers = np.ones(len(every), np.uint8)
        tiers[top(every, int(self.high_share * len(every) + 0.5))] = 0
        return np.split(tiers, np.cumsum([len(x) for x in scores])[:-1])

    def update(self, state: CacheState) -> list[list[np.ndarray]] | None:
        return self.scorer.update_all(state) if self.inputs.state else None


def _pair(name: str, text: str) -> tuple[str, str]:
    parts = text.split("/") if isinstance(text, str) else []
    if len(parts) != 2 or any(part not in PLAN_PRECISIONS for part in parts):
        raise CrushError(f"{name} must be keys/values, each one of {', '.join(PLAN_PRECISIONS)}, got {text!r}")
    return parts[0], parts[1]
