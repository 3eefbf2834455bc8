"""Knorm: keys of a small L2 norm tend to get high attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ov_kvcrush.policies.base import Inputs, LayerState, Scorer


def norms(vectors: np.ndarray) -> np.ndarray:
    """L2 norms float32 (S,) of the rows of (S, D), finite. Equal rows have equal norms."""
    with np.errstate(over="ignore"):
        lengths = np.sqrt(np.einsum("sd,sd->s", vectors, vectors))
    return np.minimum(lengths, np.finfo(np.float32).max)


@dataclass(frozen=True)
class Knorm(Scorer):
    """Minus the L2 norm of the key.

    Paper: https://arxiv.org/abs/2406.11430. Needs: keys. Cost: O(S * D) a head.

    Departures: all layers are compressed; the paper leaves out the first two.
    """

    name: ClassVar[str] = "knorm"

    @property
    def inputs(self) -> Inputs:
        return Inputs(keys=True)

    def score(self, layer: LayerState, index: int, length: int) -> list[np.ndarray]:
        scores = []
        for head in layer:
            assert head.keys is not None
            scores.append(-norms(head.keys))
        return scores
