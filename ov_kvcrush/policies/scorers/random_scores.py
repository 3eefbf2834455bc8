"""Random: the baseline that every other scorer has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ov_kvcrush.policies.base import LayerState, Scorer
from ov_kvcrush.utils.checks import check_integer


@dataclass(frozen=True)
class Random(Scorer):
    """Uniform in [0, 1), a function of seed, layer, KV head and position in the text alone.

    Needs: nothing. Cost: O(length) a head.

    seed: an integer of at least 0. Raises CrushError for anything else.
    """

    name: ClassVar[str] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, 0)

    def score(self, layer: LayerState, index: int, length: int) -> list[np.ndarray]:
        # A longer text draws more numbers from the same stream, so earlier tokens keep theirs.
        return [
            np.random.default_rng((self.seed, index, k)).random(length, np.float32)[head.positions]
            for k, head in enumerate(layer)
        ]
