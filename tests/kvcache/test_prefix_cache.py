"""The prefix cache: what is found, what replaces what, and what is dropped for room."""

from __future__ import annotations

import weakref
from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ov_kvcrush.core.eviction import EvictionState
from ov_kvcrush.core.snapshot import KVSnapshot
from ov_kvcrush.kvcache.prefix_cache import PrefixCache, common_length, serves_all_of
from ov_kvcrush.policies.registry import build

IDS = st.lists(st.integers(0, 2), min_size=1, max_size=8)


class Slow:
    """The laws in a few lines: every prefix is looked at."""

    def __init__(self, replaces: Any) -> None:
        self.replaces, self.prefixes = replaces, {}

    def put(self, ids: list[int], kv: int) -> None:
        for old, held in list(self.prefixes.items()):
            if ids[: len(held)] == held and self.replaces(old, kv):
                del self.prefixes[old]
        self.prefixes[kv] = ids

    def lengths(self, ids: list[int], usable: Any) -> dict[int, int]:
        found = {kv: min(common_length(np.array(x), np.array(ids)), len(ids) - 1) for kv, x in self.prefixes.items()}
        return {kv: length for kv, length in found.items() if length and usable(kv, length)}


@given(st.lists(st.tuples(IDS, st.booleans()), max_size=24), st.integers(1, 4), st.integers(0, 3))
def test_a_search_finds_what_looking_at_all_of_them_finds(
    calls: list[tuple[list[int], bool]], modulo: int, salt: int
) -> None:
    def replaces(old: int, new: int) -> bool:
        return (old * 7 + new + salt) % modulo == 0

    def usable(kv: int, length: int) -> bool:
        return (kv + length + salt) % modulo != 1

    released: list[int] = []
    cache: PrefixCache[int] = PrefixCache(released.append, replaces=replaces)
    slow, numbers = Slow(replaces), count()
    order: list[int] = []
    for ids, is_put in calls:
        if is_put:
            kv = next(numbers)
            slow.put(ids, kv)
            cache.put(np.array(ids), kv)
            order = [x for x in [*order, kv] if x in slow.prefixes]
        else:
            lengths = slow.lengths(ids, usable)
            found = cache.match(np.array(ids), usable)
            if found is None:
                assert not lengths
            else:
                kv, length = found
                assert lengths[kv] == length == max(lengths.values())
                order = [*(x for x in order if x != kv), kv]
                assert cache.match(np.array(ids), usable, least=length + 1) is None
        assert cache.kept() == order
        assert sorted([*released, *order]) == list(range(len(released) + len(order)))
    cache.clear()
    assert len(cache) == 0


def test_a_search_looks_at_few_of_many() -> None:
    """No more prefixes are asked than share as much as the one that is found."""
    cache: PrefixCache[int] = PrefixCache(lambda kv: None)
    rng = np.random.default_rng(0)
    texts = rng.integers(0, 50_000, (2000, 40))
    for kv, ids in enumerate(texts):
        cache.put(ids, kv)
    asked: list[int] = []

    def usable(kv: int, length: int) -> bool:
        asked.append(kv)
        return True

    for kv in (0, 777, 1999):
        assert cache.match(np.append(texts[kv], 5), usable) == (kv, 40)
    assert asked == [0, 777, 1999]


@given(st.lists(st.integers(0, 5), max_size=8), st.integers(0, 30))
def test_as_few_are_dropped_as_help_and_none_if_they_do_not(sizes: list[int], needed: int) -> None:
    cache: PrefixCache[int] = PrefixCache(lambda kv: None)
    for start, size in enumerate(sizes):
        cache.put(np.array([start]), size)
    helped = cache.drop_until(lambda dropped: sum(dropped) >= needed)
    assert helped == (sum(sizes) >= needed)
    num_dropped = len(sizes) - len(cache)
    assert cache.kept() == sizes[num_dropped:]
    if helped:
        assert sum(sizes[:num_dropped]) >= needed
        assert not num_dropped or sum(sizes[: num_dropped - 1]) < needed
    else:
        assert num_dropped == 0


class Owner:
    """Never asked."""


WHOLE = EvictionState()
CHOSEN = EvictionState(30, 1, [[np.arange(10)]])
POLICY = build("snapkv")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ((WHOLE, 40, 0), (WHOLE, 50, 0), True),
        ((WHOLE, 40, 0), (CHOSEN, 50, 0), False),
        ((WHOLE, 40, 0), (CHOSEN, 40, 0), False),
        ((CHOSEN, 40, 0), (CHOSEN, 50, 0), False),
        ((CHOSEN, 40, 0), (CHOSEN, 40, 0), True),
        ((CHOSEN, 40, 0), (WHOLE, 50, 0), False),
        ((WHOLE, 40, 8), (WHOLE, 40, 8), True),
        ((WHOLE, 40, 8), (WHOLE, 50, 8), False),
        ((WHOLE, 40, 8), (WHOLE, 40, 4), False),
        ((WHOLE, 40, 0), (WHOLE, 40, 8), True),
    ],
)
def test_only_what_serves_all_the_same_replaces(old: Any, new: Any, expected: bool) -> None:
    owner: Any = weakref.ref(Owner())

    def snapshot(state: EvictionState, num_tokens: int, captured_rows: int) -> KVSnapshot:
        return KVSnapshot(owner, 0, state, POLICY if state.num_choices else None, num_tokens, captured_rows)

    assert serves_all_of(snapshot(*old), snapshot(*new)) is expected
