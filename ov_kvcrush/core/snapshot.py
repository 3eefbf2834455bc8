"""KV that an ended request leaves in the store, and whom it can serve."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ov_kvcrush.core.request import Sequence
from ov_kvcrush.kvcache.eviction import EvictionState
from ov_kvcrush.policies.base import Policy


@dataclass(frozen=True, eq=False)
class KVSnapshot:
    """KV of an ended sequence: its place in the store, what is left of it, by whose choice, and captured queries.

    num_tokens: of the text, kept or not. base: tokens of it at the front that later policies do not choose from;
    base_kept: what a head holds of these, on average.
    """

    stored: int
    kept: EvictionState
    policy: Policy | None
    num_tokens: int
    captured_rows: int
    base: int = 0
    base_kept: int = 0

    @property
    def num_kept(self) -> int:
        """Tokens that a head holds, on average."""
        return self.num_tokens - self.kept.num_evicted

    def as_base(self) -> KVSnapshot:
        """The same, of which nothing is chosen from again."""
        return replace(self, base=self.num_tokens, base_kept=self.num_kept)

    def serves(self, sequence: Sequence, length: int) -> bool:
        """Whether the first `length` tokens are as they would be if `sequence` had computed them itself."""
        if sequence.request.takers:  # they take from staging blocks, where kept KV is not
            return False
        eviction, captured_rows = sequence.request.eviction, sequence.request.captured_rows
        rest = len(sequence.ids) - length
        # Rows behind kept KV attend through the store, several times slower than PagedAttention reads a prompt.
        if rest > length:
            return False
        if self.kept.num_evicted and (length < self.num_tokens or not eviction or eviction.policy != self.policy):
            return False
        # Kept KV is not staged: nothing could be read twice there.
        if eviction and not self.kept.num_choices and eviction.num_read_again(len(sequence.ids)):
            return False
        if eviction and not self.kept.holds(eviction.spans, self.num_tokens):
            return False
        is_whole = length == self.num_tokens and captured_rows == self.captured_rows
        return not captured_rows or is_whole or (rest >= captured_rows == self.captured_rows)
