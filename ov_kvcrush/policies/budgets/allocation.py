"""Token counts per head that add up to the budget: shared by all budget allocators."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ov_kvcrush.policies.base import CacheState, Scores

_UNITS = 1_000_000  # per token: wanted counts are compared as integers, so that rounding cannot break a tie


@dataclass(frozen=True)
class Bounds:
    """The fewest and the most tokens that each head can keep.

    low: int64 (N,), protected tokens. high: int64 (N,), cached tokens. The heads of all layers, one after the other.
    """

    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, state: CacheState) -> Bounds:
        """The bounds of every head of `state`."""
        heads = [head for layer in state.layers for head in layer]
        low = [np.count_nonzero(state.is_protected(head)) for head in heads]
        return cls(np.array(low, np.int64), np.array([len(head) for head in heads], np.int64))

    def total(self, tokens: int) -> int:
        """Tokens of all heads together, for a mean of `tokens`."""
        return int(np.clip(tokens * len(self.low), self.low.sum(), self.high.sum()))

    def slice(self, begin: int, end: int) -> Bounds:
        """The bounds of some of the heads."""
        return Bounds(self.low[begin:end], self.high[begin:end])


def fit(wanted: np.ndarray, bounds: Bounds, total: int) -> np.ndarray:
    """int64 (N,): whole numbers within `bounds` that sum to `total` and come closest to `wanted` (N,).

    The difference of the sums is shared evenly by the heads that can take it; its remainder goes to the largest
    fractions, one each, the first heads among equals. total: within the sums of the bounds.
    """
    whole, fraction = np.divmod(np.rint(np.asarray(wanted, np.float64) * _UNITS).astype(np.int64), _UNITS)

    def moved(shift: int) -> np.ndarray:
        return np.clip(whole + shift, bounds.low, bounds.high)

    shift, above = int((bounds.low - whole).min()), int((bounds.high - whole).max()) + 1
    while above - shift > 1:
        middle = (shift + above) // 2
        if moved(middle).sum() <= total:
            shift = middle
        else:
            above = middle
    counts = moved(shift)
    takers = np.argsort(-fraction, kind="stable")
    takers = takers[moved(shift + 1)[takers] > counts[takers]]
    counts[takers[: total - int(counts.sum())]] += 1
    return counts


def by_layer(state: CacheState, counts: np.ndarray) -> list[list[int]]:
    """Numbers of all heads (N,) as [layer][KV head]."""
    ends = np.cumsum([len(layer) for layer in state.layers])
    return [part.tolist() for part in np.split(counts, ends[:-1])]


def _count(masks: Iterable[np.ndarray]) -> np.ndarray:
    return np.array([np.count_nonzero(mask) for mask in masks], np.int64)


@dataclass(frozen=True)
class Rivals:
    """The F unprotected tokens of each of N heads: scores float32 (F,), positions int32 (F,) in the text."""

    scores: list[np.ndarray]
    positions: list[np.ndarray]

    @classmethod
    def of(cls, state: CacheState, scores: Scores, first: int = 0, last: int | None = None) -> Rivals:
        """Tokens of layers first to last - 1, by default of all."""
        rivals = cls([], [])
        for layer, layer_scores in zip(state.layers[first:last], scores[first:last], strict=True):
            for head, values in zip(layer, layer_scores, strict=True):
                free = ~state.is_protected(head)
                rivals.scores.append(values[free])
                rivals.positions.append(head.positions[free])
        return rivals

    def winners(self, n: int) -> np.ndarray:
        """int64 (N,): how many of the n highest scores of all heads are in each head. O(tokens).

        Of equal scores the lower positions win, so that heads with equal scores get equal counts; then the first heads.
        """
        sizes = np.array([len(scores) for scores in self.scores], np.int64)
        if n <= 0 or n >= sizes.sum():
            return sizes if n > 0 else np.zeros_like(sizes)
        at = int(sizes.sum()) - n
        threshold = np.partition(np.concatenate(self.scores), at)[at]
        counts = _count(scores > threshold for scores in self.scores)
        equal = [positions[scores == threshold] for scores, positions in zip(self.scores, self.positions, strict=True)]
        missing = n - int(counts.sum())
        last = np.partition(np.concatenate(equal), missing - 1)[missing - 1]
        counts += _count(positions < last for positions in equal)
        at_last = np.flatnonzero([np.any(positions == last) for positions in equal])
        counts[at_last[: n - int(counts.sum())]] += 1
        return counts

    def compete(self, bounds: Bounds, total: int, floor: float) -> np.ndarray:
        """int64 (N,) of sum `total`: `floor` of the unprotected tokens is shared evenly, the rest by highest score."""
        free = total - int(bounds.low.sum())
        wanted = bounds.low + (1 - floor) * self.winners(free) + floor * free / len(bounds.low)
        return fit(wanted, bounds, total)
