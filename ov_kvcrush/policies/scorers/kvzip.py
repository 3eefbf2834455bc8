"""KVzip: tokens that the model attends to while it repeats the text are those needed to reconstruct it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ov_kvcrush.policies.base import HeadState, Inputs, LayerState, Replay, Scorer
from ov_kvcrush.policies.scorers.keydiff import cosines_to_mean
from ov_kvcrush.policies.scorers.knorm import norms

_SMALLEST = np.float32(1e-7)  # attention below counts as this
_RIDGE = np.float32(10)  # of predictors whose variance is 1


@dataclass(frozen=True)
class KVzip(Scorer):
    """The maximum attention to the token over all rows of a second prefill of the text and all query heads.

    Paper: https://arxiv.org/abs/2505.23416. Needs: a replay, which costs about as much as the prefill itself, and the
    whole prompt in the staging blocks; with sample < 1 also keys and values. Cost: O(G * S) a head beside that, with
    sample < 1 O(S * D + sample * S * D^2).

    Departures: the authors' rows attend to the whole text and score their own chunk; here they attend only to what they
    score, which is cheaper. With sees="all" they attend to and score the whole text.

    With sample < 1 only the first tokens of every chunk are read again. The log scores of the others are predicted from
    their keys and values, by a ridge regression per head on the tokens that were read again.

    chunk: tokens that are read again at a time. sees: what of the prompt their rows attend to, "chunk" or "all".
    sample: the fraction of each chunk that is read again, in (0, 1].
    """

    name: ClassVar[str] = "kvzip"
    chunk: int = 2048
    sees: str = "chunk"
    sample: float = 1.0

    def __post_init__(self) -> None:
        Replay(self.chunk, self.sees, self.sample)

    @property
    def inputs(self) -> Inputs:
        samples = self.sample < 1
        return Inputs(replay=Replay(self.chunk, self.sees, self.sample), keys=samples, values=samples)

    def score(self, layer: LayerState, index: int, length: int) -> list[np.ndarray]:
        scores = []
        for head in layer:
            assert head.replayed is not None
            seen = head.replayed.max(axis=0, initial=-np.inf)
            unread = np.isnan(seen)
            scores.append(_predicted(head, seen, unread) if unread.any() else seen)
        return scores


def _predicted(head: HeadState, seen: np.ndarray, unread: np.ndarray) -> np.ndarray:
    """float32 (S,): `seen` (S,), with predictions from keys and values where it is NaN."""
    known = ~unread & (seen > 0)
    scores = np.where(unread, np.float32(0), seen)
    if known.any():
        x = _predictors(head)
        mean, scale = x[known].mean(axis=0), np.maximum(x[known].std(axis=0), 1e-6)
        x = (x - mean) / scale
        y = np.log(np.maximum(seen[known], _SMALLEST))
        gram = x[known].T @ x[known] + _RIDGE * np.eye(x.shape[1], dtype=np.float32)
        weights = np.linalg.solve(gram, x[known].T @ (y - y.mean()))
        scores[unread] = np.exp(np.minimum(x[unread] @ weights + y.mean(), 0))  # attention is at most 1
    return scores.astype(np.float32)


def _predictors(head: HeadState) -> np.ndarray:
    """float32 (S, 2 D + 3): keys, values, log norms of both, cosine of the key to the mean key."""
    assert head.keys is not None
    assert head.values is not None
    logs = [np.log(np.maximum(norms(x), _SMALLEST)) for x in (head.keys, head.values)]
    return np.column_stack([head.keys, head.values, *logs, cosines_to_mean(head.keys)])
