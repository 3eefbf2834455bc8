"""Expected attention: the attention a token will get if future queries are distributed like the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ov_kvcrush.policies.base import HeadState, Inputs, LayerState, Scorer
from ov_kvcrush.policies.scorers.knorm import norms
from ov_kvcrush.utils.checks import check_integer

BLOCK = 1024  # keys at a time, so that their products with all queries stay in the processor's cache


@dataclass(frozen=True)
class ExpectedAttention(Scorer):
    """Expected attention under a Gaussian model of the queries, times the norm of the value.

    For queries of mean m and covariance C, exp(q.k / sqrt(D)) is exp(m.k / sqrt(D) + k'Ck / 2D) on average; softmax
    over the cached tokens, mean over the G query heads.

    Paper: https://arxiv.org/abs/2510.00636. Needs: keys, values, and the last `window` queries. Cost: O(S * D * G * W)
    a head, as much as the attention of the window itself and by far the most of all scorers.

    Departures: the paper models queries before RoPE, of the whole text, and averages RoPE over future positions. Here
    they are the last ones, after RoPE: future positions are taken to be like the most recent ones.

    window: query rows, fewer if the text is shorter. Raises CrushError if it is not an integer of at least 1.
    """

    name: ClassVar[str] = "expected_attention"
    window: int = 64

    def __post_init__(self) -> None:
        check_integer("window", self.window, 1)

    @property
    def inputs(self) -> Inputs:
        return Inputs(window=self.window, keys=True, values=True, queries=True)

    def score(self, layer: LayerState, index: int, length: int) -> list[np.ndarray]:
        return [self._score(head) for head in layer]

    def _score(self, head: HeadState) -> np.ndarray:
        assert head.keys is not None
        assert head.values is not None
        assert head.queries is not None
        if not len(head):
            return np.zeros(0, np.float32)
        attention = _expected_logits(head.keys, head.queries[-self.window :])
        attention -= attention.max(axis=0)
        np.exp(attention, out=attention)
        attention /= attention.sum(axis=0)
        return attention.mean(axis=1) * norms(head.values)


def _expected_logits(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """float32 (S, G): log of the mean of exp(q.k / sqrt(D)), for keys (S, D) and queries (W, G, D)."""
    rows, groups, size = queries.shape
    mean = queries.mean(axis=0)
    # k'Ck = |Xk|^2 / W for the W centred queries X: with W up to D no more work than with C itself.
    centred = (queries - mean).transpose(2, 1, 0).reshape(size, groups * rows)
    logits = keys @ (mean.T / np.float32(np.sqrt(size)))
    for begin in range(0, len(keys), BLOCK):
        spread = (keys[begin : begin + BLOCK] @ centred).reshape(-1, groups, rows)
        logits[begin : begin + BLOCK] += np.einsum("sgw,sgw->sg", spread, spread) / np.float32(2 * size * rows)
    return logits
