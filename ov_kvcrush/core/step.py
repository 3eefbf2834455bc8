"""One step of the engine as data: which rows of which sequences it runs."""

from __future__ import annotations

from dataclasses import dataclass

from ov_kvcrush.core.request import Sequence


@dataclass(frozen=True)
class ScheduledTokens:
    """The next `num_tokens` tokens of a sequence that have no KV yet; samples: the last one gives a token."""

    sequence: Sequence
    num_tokens: int
    samples: bool

    @property
    def is_decode(self) -> bool:
        """Whether it is the row of an answer that goes on."""
        return self.num_tokens == 1 and self.samples and self.sequence.num_generated > 0


@dataclass(frozen=True)
class SchedulerOutput:
    """One inference: whose rows, in this order."""

    rows: tuple[ScheduledTokens, ...]
    out_of_memory: tuple[Sequence, ...]  # alone in memory and still without room for the next token

    @property
    def num_tokens(self) -> int:
        """Rows of the inference."""
        return sum(row.num_tokens for row in self.rows)
