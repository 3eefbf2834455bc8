"""KVzip: what the model looks at while it repeats the text is what it needs to know the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ov_kvcrush.policies.base import LayerState, Needs, Replay, Scorer


@dataclass(frozen=True)
class KVzip(Scorer):
    """The largest attention that any row of a second reading of the text pays to the token, over the query heads.

    Paper: https://arxiv.org/abs/2505.23416. Needs: a replay, which costs about as much as reading the prompt did; and
    all of the prompt in the staging blocks. O(G * S) a head beside that.

    Departures: the authors' rows see the whole text and are scored against their chunk; here they see what they are
    scored against, which is cheaper. With sees="all" they see everything as well, and are scored against it.

    chunk: tokens that are read again at a time. sees: "chunk" or "all", what of the prompt their rows see.
    """

    name: ClassVar[str] = "kvzip"
    chunk: int = 2048
    sees: str = "chunk"

    def __post_init__(self) -> None:
        Replay(self.chunk, self.sees)

    @property
    def needs(self) -> Needs:
        return Needs(replay=Replay(self.chunk, self.sees))

    def score(self, layer: LayerState, index: int, length: int) -> list[np.ndarray]:
        scores = []
        for head in layer:
            assert head.replayed is not None
            scores.append(head.replayed.max(axis=0))
        return scores
