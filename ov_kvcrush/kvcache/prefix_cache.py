"""KV of ended requests, kept so that a prompt which begins with the same tokens need not compute it again."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeVar

import numpy as np

from ov_kvcrush.core.eviction import EvictionState
from ov_kvcrush.core.request import Sequence
from ov_kvcrush.core.snapshot import KVSnapshot
from ov_kvcrush.policies.budgets.planned import chooses_alike

KV = TypeVar("KV")
_LAST = 1 << 62  # behind every key


@dataclass(frozen=True, eq=False)
class Prefix(Generic[KV]):
    """Tokens int64 (S,) and what holds their keys and values. salt: of the requests that it may serve."""

    ids: np.ndarray
    kv: KV
    salt: str = ""

    def common(self, ids: np.ndarray, salt: str) -> int:
        """Leading tokens that it has in common with those of a request."""
        return common_length(self.ids, ids) if self.salt == salt else 0


class PrefixCache(Generic[KV]):
    """Prefixes from the least to the most recently used. Sharing is by token: a common prefix may end anywhere.

    They lie in the order of their tokens, too. There, those that share most with a prompt are the neighbours of its own
    place, and the further away one is, the less it shares: a search costs the prompt's length and what it refuses.
    Those of one salt lie together, and share nothing with those of others.

    release: gives back the KV of a prefix that is dropped. replaces: whether the second serves whatever the first does,
    which holds the tokens that the second begins with.
    """

    def __init__(
        self,
        release: Callable[[KV], None],
        max_prefixes: int | None = None,
        replaces: Callable[[KV, KV], bool] = lambda old, new: True,
    ) -> None:
        self._release = release
        self._max_prefixes = max_prefixes
        self._replaces = replaces
        self._by_use: OrderedDict[int, Prefix[KV]] = OrderedDict()
        self._by_ids: list[tuple[bytes, int]] = []  # tokens as bytes that compare as they do, key of _by_use
        self._keys = count()

    def __len__(self) -> int:
        return len(self._by_use)

    def kept(self) -> list[KV]:
        """What is kept, the least recently used first; still the cache's."""
        return [prefix.kv for prefix in self._by_use.values()]

    def put(self, ids: np.ndarray, kv: KV, salt: str = "") -> None:
        """Keep `kv`, which now belongs to the cache, as that of `ids`. Prefixes that it replaces are dropped."""
        for key in list(self._contained_in(ids, salt)):
            if self._replaces(self._by_use[key].kv, kv):
                self._drop(key)
        key = next(self._keys)
        self._by_use[key] = Prefix(ids.copy(), kv, salt)
        insort(self._by_ids, (_sortable(ids, salt), key))
        if self._max_prefixes is not None and len(self) > self._max_prefixes:
            self.drop_oldest()

    def match(
        self,
        ids: np.ndarray,
        usable: Callable[[KV, int], bool] = lambda kv, length: True,
        least: int = 1,
        salt: str = "",
    ) -> tuple[KV, int] | None:
        """Find the longest common prefix with `ids`, short of its last token, whose logits are needed.

        usable: whether the first `length` tokens of what is kept can serve. least: the fewest tokens that are worth it.
        Returns what holds them, still the cache's, and their number; None if there are none.
        """
        for key, length in self._by_common(ids[:-1], salt):
            if length < least:
                return None
            if usable(self._by_use[key].kv, length):
                self._by_use.move_to_end(key)
                return self._by_use[key].kv, length
        return None

    def drop_oldest(self) -> bool:
        """Drop the least recently used prefix; False if there is none."""
        if self._by_use:
            self._drop(next(iter(self._by_use)))
            return True
        return False

    def drop_until(self, enough: Callable[[list[KV]], bool]) -> bool:
        """Drop as few of the least recently used as are `enough`, which more of them are too; none if all are not."""
        kept = self.kept()
        num_dropped = bisect_left(range(len(kept) + 1), True, key=lambda n: enough(kept[:n]))
        if num_dropped > len(kept):
            return False
        for _ in range(num_dropped):
            self.drop_oldest()
        return True

    def clear(self) -> None:
        """Drop everything."""
        while self.drop_oldest():
            pass

    def _by_common(self, ids: np.ndarray, salt: str) -> Iterator[tuple[int, int]]:
        """Keys and their tokens in common with `ids`, the most first."""
        after = bisect_left(self._by_ids, (_sortable(ids, salt), -1))
        before = after - 1

        def common(place: int) -> int:
            if not 0 <= place < len(self._by_ids):
                return 0
            return self._by_use[self._by_ids[place][1]].common(ids, salt)

        left, right = common(before), common(after)
        while left or right:
            if left >= right:
                yield self._by_ids[before][1], left
                before -= 1
                left = common(before)
            else:
                yield self._by_ids[after][1], right
                after += 1
                right = common(after)

    def _contained_in(self, ids: np.ndarray, salt: str) -> Iterator[int]:
        """Keys of prefixes that `ids` begins with, the longest first."""
        longest = len(ids)
        place = len(self._by_ids)
        while longest:
            place = bisect_right(self._by_ids, (_sortable(ids[:longest], salt), _LAST), hi=place) - 1
            if place < 0:
                return
            key = self._by_ids[place][1]
            # Nothing lies between it and ids[:longest]: no contained prefix is longer than what they share.
            longest = self._by_use[key].common(ids[:longest], salt)
            if longest == len(self._by_use[key].ids):
                yield key
            else:
                place += 1

    def _drop(self, key: int) -> None:
        prefix = self._by_use.pop(key)
        del self._by_ids[bisect_left(self._by_ids, (_sortable(prefix.ids, prefix.salt), key))]
        self._release(prefix.kv)


def _sortable(ids: np.ndarray, salt: str) -> bytes:
    """Tokens as bytes in the order of the tokens, which are not negative; those of one salt one behind the other."""
    group = hashlib.blake2b(salt.encode(), digest_size=16).digest() if salt else bytes(16)
    return group + ids.astype(">i8").tobytes()


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
    if length < least_common(sequence):
        return False
    state = snapshot.state
    is_whole = length == snapshot.num_tokens
    if state.num_evicted and (not is_whole or not eviction or not chooses_alike(eviction.policy, snapshot.policy)):
        return False
    # Kept KV is not staged: nothing could be read twice there.
    if eviction and not state.num_choices and eviction.num_read_again(len(sequence.ids)):
        return False
    if eviction and not state.holds(eviction.spans, snapshot.num_tokens):
        return False
    same_rows = captured_rows == snapshot.captured_rows
    return not captured_rows or (same_rows and (is_whole or rest >= captured_rows))


def least_common(sequence: Sequence) -> int:
    """The fewest cached tokens that pay: half of them.

    Rows behind kept KV attend through the store, several times slower than PagedAttention reads a prompt.
    """
    return max(-(-len(sequence.ids) // 2), 1)


def serves_all_of(old: KVSnapshot, new: KVSnapshot) -> bool:
    """Whether `new`, whose tokens begin with those of `old`, serves every sequence that `old` serves; see `serves`."""
    same_end = old.num_tokens == new.num_tokens and old.captured_rows == new.captured_rows
    if old.state.num_choices:
        return same_end and old.policy == new.policy and _same_choice(old.state, new.state)
    return not new.state.num_evicted and (same_end or not old.captured_rows)


def _same_choice(old: EvictionState, new: EvictionState) -> bool:
    if old.num_evicted != new.num_evicted or old.positions is None or new.positions is None:
        return False
    pairs = zip(old.positions, new.positions, strict=True)
    return all(np.array_equal(a, b) for mine, others in pairs for a, b in zip(mine, others, strict=True))
