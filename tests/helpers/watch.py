"""A policy that keeps everything and remembers what it was shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from ov_kvcrush.policies.base import Budget, CacheState, Inputs, Policy, Selection

AttentionScores = list[list[np.ndarray]]  # [layer][KV head] float32 (G, S)


@dataclass(frozen=True)
class Watch(Policy):
    """shown: what it was asked about, once for each prompt."""

    name: ClassVar[str] = "watch"

    budget: Budget = field(default_factory=lambda: Budget(kept_tokens=1, min_tokens=1))
    sink_tokens: int = 0
    recent_tokens: int = 0
    stride: int = 1 << 20
    window: int = 1
    reduce: str = "mean"
    shown: list[CacheState] = field(default_factory=list, compare=False)

    @property
    def inputs(self) -> Inputs:
        return Inputs(window=self.window, reduce=self.reduce)

    def select(self, state: CacheState, tokens: int) -> Selection:
        self.shown.append(state)
        return Selection([[np.arange(len(head), dtype=np.int32) for head in layer] for layer in state.layers])

    @property
    def scores(self) -> AttentionScores:
        """The attention of the only prompt so far."""
        (state,) = self.shown
        return [[head.attention for head in layer if head.attention is not None] for layer in state.layers]
