"""StreamingLLM: the first tokens, where attention rests when it has nowhere to go, and the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ov_kvcrush.policies.base import LayerState, Scorer


@dataclass(frozen=True)
class StreamingLLM(Scorer):
    """The newer, the better. The first tokens are those that the policy protects, `sink_tokens`.

    Paper: https://arxiv.org/abs/2309.17453. Needs: nothing. Cost: O(S) a head.

    Departures: tokens keep the places they had in the text; the paper closes the gap that dropped ones leave.
    """

    name: ClassVar[str] = "streaming_llm"

    def score(self, layer: LayerState, index: int, length: int) -> list[np.ndarray]:
        return [head.positions.astype(np.float32) for head in layer]
