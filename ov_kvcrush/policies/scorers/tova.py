"""TOVA: a transformer is an RNN of many states; evict the one with the least attention of the newest query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ov_kvcrush.policies.base import Inputs, LayerState, Scorer


@dataclass(frozen=True)
class TOVA(Scorer):
    """Attention of the last query, averaged over all query heads of the layer, so that its KV heads agree.

    Paper: https://arxiv.org/abs/2401.06104. Needs: attention of one query row. Cost: O(K * S * G + length) a layer.

    Departures: tokens are evicted once per `stride`, not one by one. Where KV heads hold different tokens, a token's
    mean is over the heads that still hold it.
    """

    name: ClassVar[str] = "tova"

    @property
    def inputs(self) -> Inputs:
        return Inputs(window=1)

    def score(self, layer: LayerState, index: int, length: int) -> list[np.ndarray]:
        total = np.zeros(length)
        holders = np.zeros(length)
        for head in layer:
            assert head.attention is not None
            total[head.positions] += head.attention.mean(axis=0)
            holders[head.positions] += 1
        mean = (total / np.maximum(holders, 1)).astype(np.float32)
        return [mean[head.positions] for head in layer]
