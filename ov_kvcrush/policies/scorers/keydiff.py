"""KeyDiff: keys that differ from all others tend to get more attention and are not redundant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ov_kvcrush.policies.base import Inputs, LayerState, Scorer
from ov_kvcrush.policies.scorers.knorm import norms

SMALLEST = np.float32(1e-12)  # norms below count as this, so that a zero key has the cosine 0


@dataclass(frozen=True)
class KeyDiff(Scorer):
    """Minus the cosine of the key to the mean of the head's normalised keys.

    Paper: https://arxiv.org/abs/2504.15364. Needs: keys. Cost: O(S * D) a head.

    Departures: none but that sinks and recent tokens are protected by the policy.
    """

    name: ClassVar[str] = "keydiff"

    @property
    def inputs(self) -> Inputs:
        return Inputs(keys=True)

    def score(self, layer: LayerState, index: int, length: int) -> list[np.ndarray]:
        scores = []
        for head in layer:
            assert head.keys is not None
            scores.append(-cosines_to_mean(head.keys))
        return scores


def cosines_to_mean(keys: np.ndarray) -> np.ndarray:
    """float32 (S,) of keys (S, D)"""
    inverse = 1 / np.maximum(norms(keys), SMALLEST)
    mean = inverse @ keys / max(1, len(keys))
    direction = mean / max(np.linalg.norm(mean), SMALLEST)
    # Not keys @ direction, which is faster but may round equal keys differently: ties stay ties.
    return np.einsum("sd,d->s", keys, direction) * inverse
