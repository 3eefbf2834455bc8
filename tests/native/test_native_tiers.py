"""Tiers of tokens in a head: a token has the bits of its tier at least, a tile those of its best token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from covering import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from native_stores import (
    ISAS,
    PRECISIONS,
    Array,
    Cache,
    Span,
    codecs_of,
    flat,
    gaussian,
    layer,
    require_native,
    some_ladders,
    stage_random,
)

from ov_kvcrush import native
from reference.codec import BITS, TILE, num_target_tiles

SHAPES = [layer(6, 3, 32), layer(2, 1, 48, window=50)]
HEADS = [(0, 0), (0, 1), (0, 2), (1, 0)]
NUM_BITS = np.array([BITS[name] for name in PRECISIONS])
PAIRS = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def _native() -> None:
    require_native()


def random_tiers(rng: np.random.Generator, kept: list[Array], num_tiers: int) -> list[Array]:
    """Any share of the tokens of each head in any tier."""
    return [
        np.searchsorted(np.sort(rng.random(num_tiers - 1)), rng.random(len(x))).astype(np.uint8)  # 0 .. num_tiers - 1
        for x in kept
    ]


def some_kept(rng: np.random.Generator, numbers: list[int]) -> list[Array]:
    return [np.flatnonzero(rng.random(n) < rng.random() * 2) for n in numbers]


def num_tokens(cache: Cache, seq: int) -> list[int]:
    return [cache.store.num_tokens(seq, *head) for head in HEADS]


def asked(ladders: Array, of: list[Array]) -> list[Array]:
    """Bits of keys and values (n, 2) that the tokens of each head are to have."""
    return [NUM_BITS[ladder[tiers]] for ladder, tiers in zip(ladders, of, strict=True)]


def held(cache: Cache, seq: int) -> list[Array]:
    """Bits of keys and values (n, 2) of the tile that each token of each head is in."""
    return [
        np.repeat(NUM_BITS[np.array(codecs, int).reshape(-1, 2)], TILE, axis=0)[:n]
        for n, codecs in zip(num_tokens(cache, seq), codecs_of(cache, seq), strict=True)
    ]


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=examples(60), deadline=None)
@given(n=st.integers(1, 250), num_tiers=st.integers(1, 4), seed=PAIRS)
def test_tiers_attend_as_the_reference(isa: str, n: int, num_tiers: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cache = Cache(*SHAPES, isa=isa)
    seq = stage_random(cache, rng, n)
    kept = some_kept(rng, [n] * 4)
    of = np.concatenate(random_tiers(rng, kept, num_tiers))
    cache.store.commit_prefill(seq, *flat(kept), precisions=some_ladders(rng, 4, num_tiers), tiers=of)
    cache.append(seq, rng, 40, n)
    cache.store.quantize_aged(seq)
    kept = some_kept(rng, num_tokens(cache, seq))
    of = np.concatenate(random_tiers(rng, kept, num_tiers))
    cache.store.compact(seq, *flat(kept), some_ladders(rng, 4, num_tiers), of)
    spans: list[Span] = [(seq, 0, 5, n + 35)]
    for index, shape in enumerate(cache.layers):
        q = gaussian(rng, 5, shape.num_heads * shape.head_size)
        expected = cache.attention(index, spans, q)
        rounding = cache.rounding(index, spans, q)
        atol = 1e-4 * float(np.abs(expected).max(initial=0)) + rounding
        np.testing.assert_allclose(cache.store.attend(index, spans, q), expected, rtol=0, atol=atol)


@settings(max_examples=examples(100), deadline=None)
@given(n=st.integers(1, 400), recent_tokens=st.sampled_from([0, 32, 70]), num_tiers=st.integers(1, 4), seed=PAIRS)
def test_a_commit_gives_tokens_their_bits_and_takes_the_bytes_told(
    n: int, recent_tokens: int, num_tiers: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    cache = Cache(*SHAPES, recent_tokens=recent_tokens)
    seq = stage_random(cache, rng, n)
    kept = some_kept(rng, [n] * 4)
    of, ladders = random_tiers(rng, kept, num_tiers), some_ladders(rng, 4, num_tiers)
    cache.store.commit_prefill(seq, *flat(kept), precisions=ladders, tiers=np.concatenate(of))
    np.testing.assert_array_equal(cache.store.precisions(seq), ladders[:, 0])
    counts = np.zeros((4, num_tiers), np.int64)
    for h, (bits, wanted) in enumerate(zip(held(cache, seq), asked(ladders, of), strict=True)):
        positions = cache.store.positions(seq, *HEADS[h])
        num_old = TILE * num_target_tiles(len(positions), recent_tokens)
        np.testing.assert_array_equal(positions[num_old:], kept[h][num_old:])
        assert sorted(positions[:num_old]) == kept[h][:num_old].tolist()
        assert all((np.diff(positions[i : i + TILE]) > 0).all() for i in range(0, num_old, TILE))
        place = np.searchsorted(kept[h], positions[:num_old])
        tiers = of[h][place].reshape(-1, TILE)
        assert (tiers.max(axis=1)[:-1] <= tiers.min(axis=1)[1:]).all()  # tiles are in the order of their tiers
        assert (bits[:num_old] >= wanted[place]).all()
        np.testing.assert_array_equal(bits[:num_old:TILE], NUM_BITS[ladders[h]][tiers.min(axis=1)])
        counts[h] = np.bincount(of[h][:num_old], minlength=num_tiers)
        counts[h, 0] += len(positions) - num_old
    assert cache.store.nbytes == cache.store.bytes_for(counts, ladders)


@settings(max_examples=examples(100), deadline=None)
@given(n=st.integers(1, 400), num_tiers=st.integers(1, 4), more=st.integers(0, 100), seed=PAIRS)
def test_compact_sorts_what_is_left_into_tiers(n: int, num_tiers: int, more: int, seed: int) -> None:
    """The order that it returns is true, the newest tokens are recent, and the same again changes nothing."""
    rng = np.random.default_rng(seed)
    cache = Cache(*SHAPES)
    ladders = some_ladders(rng, 4, num_tiers)
    seq = stage_random(cache, rng, n)
    kept = [np.arange(n)] * 4
    of = random_tiers(rng, kept, num_tiers)
    cache.store.commit_prefill(seq, *flat(kept), precisions=ladders, tiers=np.concatenate(of))
    cache.append(seq, rng, more, n)
    cache.store.quantize_aged(seq)
    before = [cache.tokens(seq, *head) for head in HEADS]
    bits_before = held(cache, seq)
    kept = some_kept(rng, num_tokens(cache, seq))
    of = random_tiers(rng, kept, num_tiers)
    order = cache.store.compact(seq, *flat(kept), ladders, np.concatenate(of))
    of_head = np.split(order, np.cumsum([len(x) for x in kept])[:-1])
    for h, (bits, wanted) in enumerate(zip(held(cache, seq), asked(ladders, of), strict=True)):
        assert sorted(of_head[h]) == kept[h].tolist()
        k, v, positions = cache.tokens(seq, *HEADS[h])
        np.testing.assert_array_equal(positions, before[h][2][of_head[h]])
        place = np.searchsorted(kept[h], of_head[h])
        num_target = int(cache.store.dump(seq)[0][h, 1])
        if len(kept[h]) < len(before[h][2]):
            assert num_target >= num_target_tiles(len(positions), 32)
            newest = positions[TILE * num_target :]
            assert (np.diff(newest) > 0).all()
            # Bits are those asked for, or those that there were: nothing gets worse than both.
            least = np.minimum(wanted[place], bits_before[h][of_head[h]])
            assert (bits[: TILE * num_target] >= least[: TILE * num_target]).all()
        exact = (bits == bits_before[h][of_head[h]]).all(axis=1) & (bits > 8).all(axis=1)
        np.testing.assert_allclose(k[exact], before[h][0][of_head[h]][exact], rtol=2**-7, atol=1e-6)
        np.testing.assert_allclose(v[exact], before[h][1][of_head[h]][exact], rtol=2**-7, atol=1e-6)


@settings(max_examples=examples(40), deadline=None)
@given(n=st.integers(1, 300), seed=PAIRS)
def test_one_tier_is_none(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cache = Cache(*SHAPES)
    ladders, lower = some_ladders(rng, 4, 1), some_ladders(rng, 4, 1)
    kept, prompt_seed = some_kept(rng, [n] * 4), int(rng.integers(1000))
    dumps = []
    for tiers in (None, np.zeros(sum(map(len, kept)), np.uint8)):
        of: dict[str, Any] = {} if tiers is None else {"tiers": tiers}
        first, second = (x[:, 0].copy() if tiers is None else x for x in (ladders, lower))
        seq = stage_random(cache, np.random.default_rng(prompt_seed), n)
        cache.store.commit_prefill(seq, *flat(kept), precisions=first, **of)
        dumps.append(cache.store.dump(seq))
        less = [np.flatnonzero(np.arange(len(x)) // 32 % 3 != 1) for x in kept]
        of = {} if tiers is None else {"tiers": tiers[: sum(map(len, less))]}
        cache.store.compact(seq, *flat(less), second, **of)
        dumps.append(cache.store.dump(seq))
    for mine, theirs in ((0, 2), (1, 3)):
        for x, y in zip(dumps[mine], dumps[theirs], strict=True):
            np.testing.assert_array_equal(x, y)


def test_whole_tiles_of_one_tier_stay_as_they_are() -> None:
    """Of 2-bit tokens that stay in their tier no code is written again, however often the others are chosen anew."""
    rng = np.random.default_rng(1)
    cache = Cache(layer(2, 1, 32))
    ladders = np.array([[[3, 3], [5, 5]]], np.uint8)
    seq = stage_random(cache, rng, 32 * 20)
    of = (np.arange(640) % 2).astype(np.uint8)
    cache.store.commit_prefill(seq, *flat([np.arange(640)]), precisions=ladders, tiers=of)
    k, v, positions = cache.tokens(seq, 0, 0)
    low = (positions % 2 == 1) & (np.arange(640) < 608)
    kept = np.flatnonzero(low | (rng.random(640) < 0.7))
    order = cache.store.compact(seq, *flat([kept]), ladders, (positions[kept] % 2).astype(np.uint8))
    new_k, new_v, new_positions = cache.tokens(seq, 0, 0)
    whole = np.isin(new_positions, positions[low][32:])  # but for the tile in which the tiers meet
    assert whole.sum() >= 32 * 8
    np.testing.assert_array_equal(new_k[whole], k[order][whole])
    np.testing.assert_array_equal(new_v[whole], v[order][whole])


def test_a_store_that_is_full_leaves_tokens_in_their_tiers() -> None:
    rng = np.random.default_rng(2)
    low, high = np.full((4, 2, 2), 5, np.uint8), np.zeros((4, 2, 2), np.uint8)
    kept = [np.arange(300)] * 4
    of = np.concatenate(random_tiers(rng, kept, 2))
    cache = Cache(*SHAPES, max_bytes=Cache(*SHAPES).store.bytes_for(300, low[:, 0].copy()) + 1000)
    seq = stage_random(cache, rng, 300)
    with pytest.raises(native.StoreFull):
        cache.store.commit_prefill(seq, *flat(kept), precisions=high, tiers=of)
    assert cache.store.nbytes == 0
    cache.store.commit_prefill(seq, *flat(kept), precisions=low, tiers=of)
    twin = cache.store.fork(seq)
    before = [cache.store.nbytes, *cache.store.dump(twin)]
    fewer = [np.arange(0, 300, 2)] * 4
    with pytest.raises(native.StoreFull):
        cache.store.compact(twin, *flat(fewer), high, np.concatenate(random_tiers(rng, fewer, 2)))
    for was, now in zip(before, [cache.store.nbytes, *cache.store.dump(twin)], strict=True):
        np.testing.assert_array_equal(was, now)
