"""A prompt that was read and stays on its staging blocks, for prompts that begin with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


class StagedPrompt:
    """Tokens int64 (S,) whose keys and values lie on `blocks`, int32, as they were computed, until `release`.

    A prompt that begins with them reads only what follows; after `release` it reads all of itself, with the same
    result. give_back: takes the blocks.
    """

    def __init__(self, ids: np.ndarray, blocks: np.ndarray, give_back: Callable[[np.ndarray], None]) -> None:
        self.ids = ids
        self.blocks = blocks
        self._give_back: Callable[[np.ndarray], None] | None = give_back

    @property
    def is_open(self) -> bool:
        """Whether it still has its blocks."""
        return self._give_back is not None

    def begins(self, ids: np.ndarray) -> bool:
        """Whether a prompt begins with these tokens and goes on."""
        return len(ids) > len(self.ids) and bool(np.array_equal(ids[: len(self.ids)], self.ids))

    def release(self) -> None:
        """Give the blocks back, between two steps; a second time does nothing."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back(self.blocks)
