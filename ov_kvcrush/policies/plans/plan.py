"""A plan of bytes: what fraction of the tokens each KV head keeps, and in which precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ov_kvcrush.utils.checks import check_choice, check_fraction

PLAN_PRECISIONS = ("bf16", "u8", "u4", "u2")  # from most to fewest bits
TILE = 32  # tokens


def whole_tiles(tokens: np.ndarray) -> np.ndarray:
    """Numbers of tokens, rounded up to whole tiles.

    Behind whole tiles the recent window is one tile, else two, and that tile takes as many bytes in bf16 as three to
    six settled ones: more tokens take fewer bytes.
    """
    return np.asarray(np.ceil(tokens / TILE) * TILE)


def kept_tokens(fractions: np.ndarray, length: int, least: int) -> np.ndarray:
    """float64: the tokens that heads keep of a text of `length`: whole tiles, or all. At least `least`."""
    wanted = np.maximum(least, np.ceil(np.round(fractions * length, 6)))
    return np.minimum(length, whole_tiles(wanted))


@dataclass(frozen=True)
class HeadPlan:
    """What one KV head keeps.

    kept: fraction of the text's tokens, in (0, 1], rounded up to whole tiles. key, value: precision of those that left
    the recent window.
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
        return kept_tokens(np.array([head.kept for head in self.flat]), length, least).astype(np.int64)
