"""H2O: heavy hitters, the tokens with the most attention so far, keep getting attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ov_kvcrush.policies.base import HeadState, Inputs, LayerState, Scorer
from ov_kvcrush.utils.checks import check_integer

SEEN = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class H2O(Scorer):
    """Accumulated attention of a token, averaged over the G query heads.

    Paper: https://arxiv.org/abs/2306.14048. Needs: attention of `window` query rows, and its sums so far as state.
    Cost: O(S * G) a head; the attention of all rows of a prompt is what makes the original slow.

    Only rows that were in a window count. `score` and `update` return the same, the sums so far plus what the newest
    rows add: the window's mean times the number of new rows, which is the number of tokens since the last choice but
    at most `window`. Both are called with the state before the choice, `update` once a choice.

    Departures:
    - The sums are the paper's if the window has exactly the new rows: the whole prompt, or a window of `stride`. A
      shorter window misses the older new rows, so tokens that only those attend to score low.
    - A longer window also has rows from before the last eviction. The new rows are then taken to be like the window's
      mean: the amount of attention added is right and nothing counts twice, but its distribution is approximate.
    - Old rows of a window see the tokens left in the cache, not those of their time.

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
