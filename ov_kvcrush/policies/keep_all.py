"""The policy that evicts nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ov_kvcrush.errors import CrushError
from ov_kvcrush.policies.base import CacheState, Policy, Selection


@dataclass(frozen=True)
class KeepAll(Policy):
    """Everything stays: the reference for all other policies.

    Needs nothing; O(cached tokens). Raises CrushError for a budget of less than everything, which it would not meet.
    """

    name: ClassVar[str] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kept", "kept_tokens"):
            value = getattr(self.budget, name)
            if value is not None and not (name == "kept" and value == 1):
                raise CrushError(f"{name} must be left out with policy 'none', which keeps everything, got {value!r}")

    def select(self, state: CacheState, tokens: int) -> Selection:
        return Selection([[np.arange(len(head), dtype=np.int32) for head in layer] for layer in state.layers])
