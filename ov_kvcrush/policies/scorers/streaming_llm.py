"""StreamingLLM: attention sinks, the first tokens, and the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ov_kvcrush.policies.base import LayerState, Scorer


@dataclass(frozen=True)
class StreamingLLM(Scorer):
    """The score is the position: newer tokens stay. The policy's `sink_tokens` protect the first ones.

    Paper: https://arxiv.org/abs/2309.17453. Needs: nothing. Cost: O(S) a head.

    Departures: tokens keep their positions in the text; the paper closes the gaps of evicted ones.
    """

    name: ClassVar[str] = "streaming_llm"

    def score(self, layer: LayerState, index: int, length: int) -> list[np.ndarray]:
        return [head.positions.astype(np.float32) for head in layer]
