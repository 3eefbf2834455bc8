"""Which tokens a sequence holds, and how often it wrote them: brought up to date by what was appended since."""

from __future__ import annotations

import numpy as np

from ov_kvcrush.core.growable import GrowableArray


class TokenCounts:
    """Distinct tokens of prompt and answer, and the counts of those of the answer.

    A step costs what it appended, not what is there: sorting 128k tokens for each one took 61 ms.
    num_tokens: tokens of the vocabulary.
    """

    def __init__(self, num_tokens: int) -> None:
        self._is_seen = np.zeros(num_tokens, np.bool_)
        self._counts = np.zeros(num_tokens, np.int32)
        self._seen = GrowableArray(np.int64)
        self._written = GrowableArray(np.int64)
        self._num_known = 0  # of the sequence's tokens

    def update(self, ids: np.ndarray, num_prompt_tokens: int) -> None:
        """Take in what is new of all tokens so far, int64 (S,)."""
        prompt = ids[self._num_known : num_prompt_tokens]
        if len(prompt):
            new = np.zeros_like(self._is_seen)
            new[prompt] = True
            new &= ~self._is_seen
            self._is_seen |= new
            self._seen.extend(np.flatnonzero(new))
        for token in ids[max(self._num_known, num_prompt_tokens) :].tolist():
            if not self._is_seen[token]:
                self._is_seen[token] = True
                self._seen.append(token)
            if not self._counts[token]:
                self._written.append(token)
            self._counts[token] += 1
        self._num_known = len(ids)

    @property
    def seen(self) -> np.ndarray:
        """int64 (n,): distinct tokens of prompt and answer."""
        return self._seen.view

    def written(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct tokens of the answer, int64 (n,), and how often each is there, int32 (n,)."""
        return self._written.view, self._counts[self._written.view]

    def copy(self) -> TokenCounts:
        """An independent copy."""
        twin = TokenCounts(0)
        twin._is_seen, twin._counts = self._is_seen.copy(), self._counts.copy()
        twin._seen, twin._written = self._seen.copy(), self._written.copy()
        twin._num_known = self._num_known
        return twin
