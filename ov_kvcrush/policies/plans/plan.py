"""A plan of bytes: what fraction of the tokens each KV head keeps, and in which precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ov_kvcrush.utils.checks import check_choice, check_fraction

PLAN_PRECISIONS = ("bf16", "u8", "u4", "u2")  # from most to fewest bits


@dataclass(frozen=True)
class HeadPlan:
    """What one KV head keeps.

    kept: fraction of the text's tokens, in (0, 1]. key, value: precision of those that left the recent window.
    Raises CrushError for anything else.
    """

    kept: float = 1.0
    key: str = "u8"
    value: str = "u8"

    def __post_init__(self) -> None:
        check_fraction("kept", self.kept)
        check_choice("key", self.key, PLAN_PRECISIONS)
        check_choice("value", self.value, PLAN_PRECISIONS)


@dataclass(frozen=True)
class CachePlan:
    """What all KV heads keep.

    heads: [layer][KV head]. predicted_kl: of the next-token distribution to the full cache, in nats, the median over
    the profile's texts; None where nobody measured it. source: "profile" or "ladder" (no profile of this model).
    """

    heads: tuple[tuple[HeadPlan, ...], ...]
    predicted_kl: float | None = None
    source: str = "profile"

    @classmethod
    def of(
        cls, flat: Sequence[HeadPlan], num_kv_heads: Sequence[int], predicted_kl: float | None, source: str
    ) -> CachePlan:
        """From the heads of all layers, one after the other."""
        ends = np.cumsum(num_kv_heads)
        heads = tuple(tuple(flat[end - count : end]) for count, end in zip(num_kv_heads, ends, strict=True))
        return cls(heads, predicted_kl, source)

    @property
    def flat(self) -> list[HeadPlan]:
        """The heads of all layers, one after the other."""
        return [head for layer in self.heads for head in layer]

    @property
    def mean_kept(self) -> float:
        """Fraction of the tokens that a head keeps, on average."""
        return float(np.mean([head.kept for head in self.flat]))

    def tokens(self, length: int, least: int) -> np.ndarray:
        """int64 (heads,): tokens that each head keeps of a text of `length`, `least` of them in any case."""
        kept = np.array([head.kept for head in self.flat])
        return np.minimum(length, np.maximum(least, np.ceil(np.round(kept * length, 6)))).astype(np.int64)
