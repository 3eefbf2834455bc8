"""What sequences know of the grammar that they follow; the engine's is `engine/grammar/masks.py`."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class TokenGrammar(Protocol):
    """Where one sequence is in its grammar."""

    @property
    def is_complete(self) -> bool: ...

    def fork(self) -> TokenGrammar: ...

    def mask(self) -> np.ndarray: ...

    def completes(self, generated: np.ndarray) -> bool: ...
