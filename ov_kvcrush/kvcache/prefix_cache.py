"""KV of ended requests, kept so that a prompt which begins with the same tokens need not compute it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from ov_kvcrush.core.request import Sequence
from ov_kvcrush.core.snapshot import KVSnapshot

KV = TypeVar("KV")


@dataclass(frozen=True, eq=False)
class Prefix(Generic[KV]):
    """Tokens int64 (S,) and what holds their keys and values."""

    ids: np.ndarray
    kv: KV


class PrefixCache(Generic[KV]):
    """Prefixes from the least to the most recently used. Sharing is by token: a common prefix may end anywhere.

    release: gives back the KV of a prefix that is dropped.
    """

    def __init__(self, release: Callable[[KV], None], max_prefixes: int | None = None) -> None:
        self._release = release
        self._max_prefixes = max_prefixes
        self._prefixes: list[Prefix[KV]] = []

    def __len__(self) -> int:
        return len(self._prefixes)

    def put(self, ids: np.ndarray, kv: KV) -> None:
        """Keep `kv`, which now belongs to the cache, as that of `ids`. Prefixes contained in it are dropped."""
        new = Prefix(ids.copy(), kv)
        for old in list(self._prefixes):
            if common_length(old.ids, new.ids) == len(old.ids):
                self._drop(old)
        self._prefixes.append(new)
        if self._max_prefixes is not None and len(self._prefixes) > self._max_prefixes:
            self._drop(self._prefixes[0])

    def match(
        self, ids: np.ndarray, usable: Callable[[KV, int], bool] = lambda kv, length: True
    ) -> tuple[KV, int] | None:
        """Find the longest common prefix with `ids`, short of its last token, whose logits are needed.

        usable: whether the first `length` tokens of what is kept can serve. Returns what holds them, still the cache's,
        and their number; None if there are none.
        """
        best, length = None, 0
        for prefix in self._prefixes:
            common = min(common_length(prefix.ids, ids), len(ids) - 1)
            if common > length and usable(prefix.kv, common):
                best, length = prefix, common
        if best is None:
            return None
        self._prefixes.remove(best)
        self._prefixes.append(best)
        return best.kv, length

    def drop_oldest(self) -> bool:
        """Drop the least recently used prefix; False if there is none."""
        if self._prefixes:
            self._drop(self._prefixes[0])
            return True
        return False

    def shrink(self, limit: int, size: Callable[[KV], int]) -> None:
        """Drop the least recently used until the sizes of the others sum to `limit` at most."""
        while self._prefixes and sum(size(prefix.kv) for prefix in self._prefixes) > limit:
            self.drop_oldest()

    def clear(self) -> None:
        """Drop everything."""
        while self.drop_oldest():
            pass

    def _drop(self, prefix: Prefix[KV]) -> None:
        self._prefixes.remove(prefix)
        self._release(prefix.kv)


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """Number of leading elements that are equal."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def serves(snapshot: KVSnapshot, sequence: Sequence, length: int) -> bool:
    """Whether the first `length` tokens of a snapshot are as they would be if `sequence` had computed them itself."""
    request = sequence.request
    if request.fan_out:  # its caches are made from staging blocks, where kept KV is not
        return False
    eviction, captured_rows = request.eviction, request.captured_rows
    rest = len(sequence.ids) - length
    # Rows behind kept KV attend through the store, several times slower than PagedAttention reads a prompt.
    if rest > length:
        return False
    state = snapshot.state
    is_whole = length == snapshot.num_tokens
    if state.num_evicted and (not is_whole or not eviction or eviction.policy != snapshot.policy):
        return False
    # Kept KV is not staged: nothing could be read twice there.
    if eviction and not state.num_choices and eviction.num_read_again(len(sequence.ids)):
        return False
    if eviction and not state.holds(eviction.spans, snapshot.num_tokens):
        return False
    same_rows = captured_rows == snapshot.captured_rows
    return not captured_rows or (same_rows and (is_whole or rest >= captured_rows))
