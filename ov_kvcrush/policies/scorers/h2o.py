"""H2O: tokens that gathered the most attention so far, the heavy hitters, go on to gather it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ov_kvcrush.policies.base import HeadState, Inputs, LayerState, Scorer
from ov_kvcrush.utils.checks import check_integer

SEEN = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class H2O(Scorer):
    """Running sum of the attention that a token got, averaged over the G query heads.

    Paper: https://arxiv.org/abs/2306.14048. Needs: attention of `window` query rows, and its sums so far as state.
    Cost: O(S * G) a head; the attention of all rows of a prompt is what makes the original slow.

    Only rows that were in a window count. `score` and `update` return the same, the sums so far plus what the newest
    rows add: the window's mean times the number of new rows, which is the number of tokens since the last choice but
    at most `window`. Both are called with the state before the choice, `update` once a choice.

    Departures:
    - The sums are the paper's where the window has all new rows and no others: one of at least the prompt, or as long
      as every stride. A shorter one leaves out the older of them, and what only those looked at scores low.
    - A longer one holds rows of earlier choices too. The new ones are then taken to be like the whole window: as much
      attention is added as they gave, none of it twice, but not spread exactly as they spread it.
    - Old rows of a window see what is left in the cache, not what they once saw.

    window: query rows, fewer if the text is shorter. Raises CrushError if it is not an integer of at least 1.
    """

    name: ClassVar[str] = "h2o"
    window: int = 128

    def __post_init__(self) -> None:
        check_integer("window", self.window, 1)

    @property
    def inputs(self) -> Inputs:
        return Inputs(window=self.window, state=True)

    def score(self, layer: LayerState, index: int, length: int) -> list[np.ndarray]:
        return [self._sums(head) for head in layer]

    def update(self, layer: LayerState, index: int, length: int) -> list[np.ndarray]:
        return [self._sums(head) for head in layer]

    def _sums(self, head: HeadState) -> np.ndarray:
        assert head.attention is not None
        sums = np.zeros(len(head), np.float32) if head.state is None else head.state
        # Whatever was seen before has at least SEEN, so zeros are the tokens since then.
        rows = min(self.window, len(head) - np.count_nonzero(sums))
        return np.maximum(sums + head.attention.mean(axis=0) * np.float32(rows), SEEN)
