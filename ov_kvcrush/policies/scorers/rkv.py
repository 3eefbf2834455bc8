"""R-KV: tokens that are important and not redundant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ov_kvcrush.errors import CrushError
from ov_kvcrush.policies.base import HeadState, Inputs, LayerState, Scorer
from ov_kvcrush.policies.scorers.knorm import norms
from ov_kvcrush.policies.scorers.snapkv import pool
from ov_kvcrush.utils.checks import check_fraction, check_integer

_BLOCK = 1 << 20  # cosines that are held at a time
_FIRST_COLUMNS = 32


@dataclass(frozen=True)
class RKV(Scorer):
    """Importance minus redundancy, for long answers.

    Paper: https://arxiv.org/abs/2505.24133. Importance is the attention of the last queries, max-pooled. Redundancy is
    the softmax of a key's mean cosine to all others; each token leaves out the newest of its duplicates, so that of a
    group of duplicates the newest stays. score = lam * importance - (1 - lam) * redundancy, each of sum 1 over the
    tokens (importance before pooling, and over those before the window).

    Needs: attention of `window` query rows, keys. Cost: O(S D) a head if every key has a duplicate among the newest,
    O(S^2 D) at worst; O(S) memory.

    Departures: attention is softmax over all tokens, averaged over the rows, then the maximum over the query heads; the
    authors take the maximum of the logits, then softmax over the tokens before the window. The window's tokens are
    scored too, and stay as part of `recent_tokens`. A key without duplicates leaves out none, theirs the first one.

    window: query rows. kernel: width of the pooling, odd. lam: weight of importance, in [0, 1].
    duplicate: cosine above which two keys are duplicates, in (0, 1]. Raises CrushError for anything else.
    """

    name: ClassVar[str] = "rkv"
    window: int = 8
    kernel: int = 7
    lam: float = 0.1
    duplicate: float = 0.5

    def __post_init__(self) -> None:
        check_integer("window", self.window, 1)
        check_integer("kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise CrushError(f"kernel must be odd, got {self.kernel}")
        check_fraction("lam", self.lam, zero=True)
        check_fraction("duplicate", self.duplicate)

    @property
    def inputs(self) -> Inputs:
        return Inputs(window=self.window, reduce="mean", keys=True)

    def score(self, layer: LayerState, index: int, length: int) -> list[np.ndarray]:
        return [self._score(head, length) for head in layer]

    def _score(self, head: HeadState, length: int) -> np.ndarray:
        assert head.attention is not None
        assert head.keys is not None
        attention = head.attention.max(axis=0)
        before = attention[: np.searchsorted(head.positions, length - self.window)].sum(dtype=np.float64)
        # Tokens of the window can have more attention than all tokens before it together: capped at their sum.
        importance = np.minimum(pool(attention, "max", self.kernel) / max(before, np.finfo(np.float32).tiny), 1)
        scores = self.lam * importance - (1 - self.lam) * redundancy(head.keys, self.duplicate)
        return scores.astype(np.float32)


def redundancy(keys: np.ndarray, threshold: float) -> np.ndarray:
    """float64 (S,) of sum 1: softmax of the mean cosine of each of keys (S, D) to the others."""
    unit = keys / (norms(keys) + np.float32(1e-8))[:, None]
    newest = newest_duplicate(unit, threshold)
    spared = np.flatnonzero(newest >= 0)
    cosines = np.einsum("sd,sd->s", unit[spared], unit[newest[spared]])
    # Column sums of the matrix of cosines are products with the sum of all keys: the matrix itself is not needed.
    likeness = unit @ unit.sum(axis=0) - np.einsum("sd,sd->s", unit, unit)
    likeness = likeness - np.bincount(newest[spared], weights=cosines, minlength=len(keys))
    exponent = likeness / max(len(keys), 1)
    powers = np.exp(exponent - exponent.max(initial=-np.inf))
    return np.asarray(powers / powers.sum())


def newest_duplicate(unit: np.ndarray, threshold: float) -> np.ndarray:
    """int64 (S,): the last other row of unit (S, D) with a cosine above threshold, -1 where there is none.

    Goes from the newest rows backwards in growing blocks: most rows are done after the first block.
    """
    newest = np.full(len(unit), -1, np.int64)
    open_rows = np.arange(len(unit))
    end, columns = len(unit), _FIRST_COLUMNS
    while end and len(open_rows):
        begin = max(0, end - columns)
        for rows in np.array_split(open_rows, -(-len(open_rows) * (end - begin) // _BLOCK)):
            alike = unit[rows] @ unit[begin:end].T > threshold
            own = np.flatnonzero((rows >= begin) & (rows < end))
            alike[own, rows[own] - begin] = False
            last = end - 1 - np.argmax(alike[:, ::-1], axis=1)
            newest[rows] = np.where(alike.any(axis=1), last, -1)
        open_rows = open_rows[newest[open_rows] < 0]
        end, columns = begin, min(2 * columns, 1024)
    return newest
