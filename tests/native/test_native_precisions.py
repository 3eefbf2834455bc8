"""Precisions of each KV head and sequence: what is written follows them, what is there goes down but never up."""

from __future__ import annotations

import numpy as np
import pytest
from covering import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from native_stores import (
    DEFAULTS,
    ISAS,
    PRECISIONS,
    Array,
    Cache,
    Span,
    codecs_of,
    flat,
    gaussian,
    keys_values,
    layer,
    names_of,
    require_native,
    some_precisions,
    stage_random,
)

from ov_kvcrush import native
from reference import codec as reference
from reference.store import ReferenceStore

SHAPES = [layer(6, 3, 32), layer(2, 1, 48, window=50)]
NUM_HEADS = 4
BITS = np.array([reference.BITS[name] for name in PRECISIONS])
SLAB = 2 << 20  # bytes


@pytest.fixture(autouse=True)
def _native() -> None:
    require_native()


def kept_of(rng: np.random.Generator, num_tokens: int) -> list[Array]:
    """Another share of the tokens in each head."""
    return [np.flatnonzero(rng.random(num_tokens) < rng.random()) for _ in range(NUM_HEADS)]


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=examples(60), deadline=None)
@given(n=st.integers(1, 200), recent=st.sampled_from(["f32", "bf16"]), seed=st.integers(0, 2**32 - 1))
def test_heads_of_any_precisions_attend_as_the_reference(isa: str, n: int, recent: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cache = Cache(*SHAPES, recent=recent, isa=isa)
    seq = stage_random(cache, rng, n)
    cache.store.commit_prefill(seq, *flat(kept_of(rng, n)), precisions=some_precisions(rng, NUM_HEADS))
    cache.append(seq, rng, 40, n)
    cache.store.quantize_aged(seq)
    numbers = [cache.store.num_tokens(seq, i, h) for i, s in enumerate(cache.layers) for h in range(s.num_kv_heads)]
    kept = [np.sort(rng.permutation(m)[: m - m // 5]) for m in numbers]
    cache.store.compact(seq, *flat(kept), some_precisions(rng, NUM_HEADS))
    spans: list[Span] = [(seq, 0, 5, n + 35)]
    for index, shape in enumerate(cache.layers):
        q = gaussian(rng, 5, shape.num_heads * shape.head_size)
        expected = cache.attention(index, spans, q)
        rounding = cache.rounding(index, spans, q)
        atol = 1e-4 * float(np.abs(expected).max(initial=0)) + rounding
        np.testing.assert_allclose(cache.store.attend(index, spans, q), expected, rtol=0, atol=atol)


@settings(max_examples=examples(60), deadline=None)
@given(
    n=st.integers(1, 300), recent_tokens=st.sampled_from([0, 1, 32, 100]), own=st.booleans(), seed=st.integers(0, 99)
)
def test_bytes_for_ragged_heads_are_what_a_commit_takes(n: int, recent_tokens: int, own: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cache = Cache(*SHAPES, recent_tokens=recent_tokens)
    theirs = ReferenceStore(layers=SHAPES, **{**DEFAULTS, "recent_tokens": recent_tokens})
    precisions = some_precisions(rng, NUM_HEADS) if own else None
    numbers = rng.integers(0, n + 1, NUM_HEADS)
    seq = stage_random(cache, rng, n)
    cache.store.commit_prefill(seq, *flat([np.arange(m) for m in numbers]), precisions=precisions)
    names = None if precisions is None else names_of(precisions)
    expected = cache.store.bytes_for(numbers, precisions)
    assert cache.store.nbytes == expected == theirs.bytes_for(numbers.tolist(), names)
    assert cache.store.bytes_for(n, precisions) == cache.store.bytes_for(np.full(NUM_HEADS, n), precisions)


def test_everything_that_writes_follows_the_precisions_and_forks_inherit_them() -> None:
    rng = np.random.default_rng(0)
    cache = Cache(*SHAPES)
    wanted = np.array([[3, 4], [5, 5], [1, 1], [0, 2]], np.uint8)
    pairs = [(int(key), int(value)) for key, value in wanted]
    whole = stage_random(cache, rng, 150, precisions=wanted)
    cache.store.commit_prefill(whole)
    grown = cache.store.create(0, wanted)
    cache.append(grown, rng, 150, 0)
    cache.store.quantize_aged(grown)
    cut = cache.store.fork(whole, 70)
    for seq, num_target, num_recent in ((whole, 3, 2), (grown, 3, 2), (cut, 2, 1), (cache.store.fork(grown), 3, 2)):
        np.testing.assert_array_equal(cache.store.precisions(seq), wanted)
        assert codecs_of(cache, seq) == [[pair] * num_target + [(1, 1)] * num_recent for pair in pairs]
        cache.append(seq, rng, 64, 200)
        cache.store.quantize_aged(seq)
        assert [head[num_target] for head in codecs_of(cache, seq)] == pairs


@settings(max_examples=examples(60), deadline=None)
@given(share=st.sampled_from([1.0, 0.9, 0.5]), seed=st.integers(0, 2**32 - 1))
def test_compact_takes_bits_away_and_gives_none(share: float, seed: int) -> None:
    """Tiles that keep all tokens and have too many bits come in the wanted codecs; with few enough, untouched."""
    rng = np.random.default_rng(seed)
    cache = Cache(*SHAPES)
    seq = stage_random(cache, rng, 200)
    first, wanted = some_precisions(rng, NUM_HEADS), some_precisions(rng, NUM_HEADS)
    cache.store.commit_prefill(seq, precisions=first)
    before = [[cache.tokens(seq, i, h) for h in range(s.num_kv_heads)] for i, s in enumerate(cache.layers)]
    stays = [np.repeat(rng.random(7) < share, reference.TILE)[:200] for _ in range(NUM_HEADS)]
    kept = [np.flatnonzero(s) for s in stays]
    size = cache.store.nbytes
    order = cache.store.compact(seq, *flat(kept), wanted)
    assert share < 1 or cache.store.nbytes <= size
    np.testing.assert_array_equal(cache.store.precisions(seq), wanted)
    heads = [(i, h) for i, s in enumerate(cache.layers) for h in range(s.num_kv_heads)]
    lower = np.where(BITS[first] > BITS[wanted], wanted, first)
    for number, ((index, head), codecs) in enumerate(zip(heads, codecs_of(cache, seq), strict=True)):
        num_whole = int(stays[number][:160:32].sum())
        assert codecs[:num_whole] == [tuple(map(int, lower[number]))] * num_whole
        k, v, positions = cache.tokens(seq, index, head)
        begin, num_tokens = sum(map(len, kept[:number])), len(positions)
        old_k, old_v, old_positions = before[index][head]
        old = order[begin : begin + num_tokens]
        np.testing.assert_array_equal(positions, old_positions[old])
        if (lower[number] == first[number]).all():
            np.testing.assert_array_equal(k[: 32 * num_whole], old_k[old[: 32 * num_whole]])
            np.testing.assert_array_equal(v[: 32 * num_whole], old_v[old[: 32 * num_whole]])
    size, dump = cache.store.nbytes, cache.store.dump(seq)
    numbers = [cache.store.num_tokens(seq, *head) for head in heads]
    cache.store.compact(seq, *flat([np.arange(n) for n in numbers]))
    assert cache.store.nbytes == size
    np.testing.assert_array_equal(cache.store.dump(seq)[1], dump[1])


def test_a_store_that_is_full_keeps_the_old_precisions() -> None:
    rng = np.random.default_rng(2)
    low, high = np.full((NUM_HEADS, 2), 5, np.uint8), np.zeros((NUM_HEADS, 2), np.uint8)
    roomy = Cache(*SHAPES)
    limit = roomy.store.bytes_for(300, low) + 1000
    cache = Cache(*SHAPES, max_bytes=limit)
    seq = stage_random(cache, rng, 300, precisions=low)
    with pytest.raises(native.StoreFull):
        cache.store.commit_prefill(seq, precisions=high)
    np.testing.assert_array_equal(cache.store.precisions(seq), low)
    assert cache.store.nbytes == 0
    cache.store.commit_prefill(seq)
    assert cache.store.nbytes == cache.store.bytes_for(300, low)
    twin = cache.store.fork(seq)  # what is written anew lies beside what they share
    before = [cache.store.nbytes, *cache.store.dump(twin)]
    with pytest.raises(native.StoreFull):
        cache.store.compact(twin, *flat([np.arange(0, 300, 2)] * NUM_HEADS), high)
    for was, now in zip(before, [cache.store.nbytes, *cache.store.dump(twin)], strict=True):
        np.testing.assert_array_equal(was, now)


def test_memory_stays_within_the_limit_with_many_pairs_in_use() -> None:
    """Slabs hold 1.05 times the limit and 2 MiB for each size of tile that there is, whatever there was before."""
    rng = np.random.default_rng(3)
    limit = 8 << 20
    cache = Cache(layer(8, 4, 64), max_bytes=limit)
    store, held = cache.store, []
    sizes = {(k, v, x): reference.tile_bytes(k, v, 64, 32, x) for k in PRECISIONS for v in PRECISIONS for x in (0, 1)}
    for _ in range(150):
        seq = store.create(0, some_precisions(rng, 4))
        held.append(seq)
        n = int(rng.integers(30, 1500))
        while not store.reserve(seq, n):
            store.release(held.pop(int(rng.integers(len(held) - 1))))
        store.append(seq, 0, *keys_values(rng, n, 256), 0)
        store.quantize_aged(seq)
        if rng.random() < 0.3:
            seq = held[int(rng.integers(len(held)))]
            numbers = [store.num_tokens(seq, 0, h) for h in range(4)]
            kept = [np.flatnonzero(rng.random(m) < 0.7) for m in numbers]
            store.compact(seq, *flat(kept), some_precisions(rng, 4))
        assert store.nbytes <= limit
        pairs = {pair for s in held for head in codecs_of(cache, s) for pair in head}
        in_use = {sizes[PRECISIONS[k], PRECISIONS[v], x] for k, v in pairs for x in (0, 1)}
        assert store.reserved_bytes <= 1.05 * limit + len(in_use) * SLAB
    for seq in held:
        store.release(seq)
    assert store.nbytes == 0
    assert store.reserved_bytes <= 8 * SLAB
