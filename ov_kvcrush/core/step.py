"""One step of the engine as data: which rows of which sequences it runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ov_kvcrush.core.request import Sequence


@dataclass(frozen=True)
class ScheduledTokens:
    """The next `num_tokens` tokens of a sequence that have no KV yet; samples: the last one gives a token.

    draft: what may follow them. The last of these rows are its tokens, each samples, too, and what of it is not what
    the rows before it sample is taken back.
    """

    sequence: Sequence
    num_tokens: int
    samples: bool
    draft: tuple[int, ...] = ()

    @property
    def num_known(self) -> int:
        """Rows of tokens that are the sequence's."""
        return self.num_tokens - len(self.draft)

    @property
    def num_samples(self) -> int:
        """Rows that give a token."""
        return self.samples + len(self.draft)

    @property
    def ids(self) -> np.ndarray:
        """int64 (num_tokens,)"""
        begin = self.sequence.num_cached
        known = self.sequence.ids[begin : begin + self.num_known]
        return np.concatenate([known, np.array(self.draft, np.int64)]) if self.draft else known

    @property
    def is_decode(self) -> bool:
        """Whether it is the row of an answer that goes on."""
        return self.num_known == 1 and self.samples and self.sequence.num_generated > 0


@dataclass(frozen=True)
class SchedulerOutput:
    """One inference: whose rows, in this order."""

    rows: tuple[ScheduledTokens, ...]
    out_of_memory: tuple[Sequence, ...]  # alone in memory and still without room for the next token

    @property
    def num_tokens(self) -> int:
        """Rows of the inference."""
        return sum(row.num_tokens for row in self.rows)

    @property
    def num_draft_tokens(self) -> int:
        """Those of them that may be taken back."""
        return sum(len(row.draft) for row in self.rows)
