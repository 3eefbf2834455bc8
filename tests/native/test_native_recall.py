"""Recall: steps read the tiles that brute force finds, what is left out changes nothing else, all is as without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from covering import covering, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from native_stores import (
    ISAS,
    PRECISIONS,
    Array,
    Cache,
    flat,
    gaussian,
    keys_values,
    layer,
    require_native,
    some_ladders,
    stage_random,
)

from reference import codec as reference
from reference.clusters import group_tiles
from reference.codec import TILE
from reference.recall import ROWS, recalled

SHAPES = [layer(6, 2, 64), layer(3, 3, 48, window=90), layer(4, 1, 32)]


@pytest.fixture(autouse=True)
def _native() -> None:
    require_native()


def read_prompt(cache: Cache, num_tokens: int, seed: int = 0, kept: list[Array] | None = None) -> int:
    """A sequence with a random prompt, of which `kept` was chosen."""
    seq = stage_random(cache, np.random.default_rng(seed), num_tokens)
    cache.store.commit_prefill(seq, *(() if kept is None else flat(kept)))
    return seq


def decode(cache: Cache, seq: int, first: int, count: int, seed: int = 1) -> list[list[Array]]:
    """Append rows one by one as decoding does, with what each layer's attention gives."""
    rng = np.random.default_rng(seed)
    out = []
    for position in range(first, first + count):
        if not cache.store.free_slots(seq):
            cache.store.quantize_aged(seq)
            assert cache.store.reserve(seq, 1)
        row = []
        for index, shape in enumerate(cache.layers):
            cache.store.append(seq, index, *keys_values(rng, 1, shape.num_kv_heads * shape.head_size), position)
            q = gaussian(rng, 1, shape.num_heads * shape.head_size)
            row.append(cache.store.attend(index, [(seq, 0, 1, position)], q))
        out.append(row)
    return out


def assert_same(a: list[list[Array]], b: list[list[Array]]) -> None:
    for mine, theirs in zip(a, b, strict=True):
        for x, y in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("key", "recall", "num_rows"), covering(PRECISIONS, [64, 200, 0.1, 0.5], [1, 2, ROWS]))
def test_the_tiles_that_are_read_are_those_of_brute_force(isa: str, key: str, recall: float, num_rows: int) -> None:
    cache = Cache(*SHAPES, isa=isa, key=key, recall_tokens=recall)
    seq = read_prompt(cache, 1200)
    decode(cache, seq, 1200, 70)
    rng = np.random.default_rng(5)
    for index, shape in enumerate(cache.layers):
        q = gaussian(rng, num_rows, shape.num_heads * shape.head_size)
        group = shape.num_heads // shape.num_kv_heads
        rows = q.reshape(num_rows, shape.num_kv_heads, group, -1)
        at = np.arange(1270, 1270 + num_rows)
        chosen = cache.store.recalled(index, (seq, 0, num_rows, 1270), q)
        for head, mine in enumerate(chosen):
            keys, _, positions = cache.tokens(seq, index, head)
            expected = recalled(
                keys, positions, rows[:, head], at,
                scale=shape.scale, window=shape.window, recall_tokens=recall, recent_tokens=32,
            )  # fmt: skip
            if len(expected.ranked) <= expected.num_read:
                assert len(mine) == 0
            else:
                assert expected.accepts(mine, 1e-5)
        assert shape.window or any(len(mine) for mine in chosen)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("key", PRECISIONS)
def test_means_are_those_of_the_keys_as_they_decode(isa: str, key: str) -> None:
    cache = Cache(*SHAPES, isa=isa, key=key, recent="f16", recall_tokens=64)
    seq = read_prompt(cache, 300)
    decode(cache, seq, 300, 100)
    for index, shape in enumerate(cache.layers):
        for head in range(shape.num_kv_heads):
            keys, _ = cache.store.read(seq, index, head)
            means = cache.store.means(seq, index, head)
            assert len(means) == (400 - 32) // TILE
            expected = keys[: TILE * len(means)].reshape(len(means), TILE, -1).mean(axis=1)
            np.testing.assert_allclose(means, expected, rtol=2**-10, atol=2e-3)


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_computed_is_attention_over_what_is_read(isa: str) -> None:
    cache = Cache(*SHAPES, isa=isa, recall_tokens=128)
    seq = read_prompt(cache, 1000)
    rng = np.random.default_rng(2)
    for index, shape in enumerate(cache.layers):
        q = gaussian(rng, 1, shape.num_heads * shape.head_size)
        chosen = cache.store.recalled(index, (seq, 0, 1, 1000), q)
        rows, expected = q.reshape(shape.num_heads, -1), np.zeros((shape.num_heads, shape.head_size))
        group = shape.num_heads // shape.num_kv_heads
        for h in range(shape.num_heads):
            k, v, positions = cache.tokens(seq, index, h // group)
            tiles = chosen[h // group]
            if len(tiles):
                read = (TILE * tiles[:, None] + np.arange(TILE)).ravel()
                read = read[read < len(k)]
                k, v, positions = k[read], v[read], positions[read]
            p = reference.probabilities(shape, h, rows[h : h + 1], k, positions, np.array([1000]))
            expected[h] = p @ v
        got = cache.store.attend(index, [(seq, 0, 1, 1000)], q)
        tolerance = 2e-4 + cache.rounding(index, [(seq, 0, 1, 1000)], q)
        np.testing.assert_allclose(got[0], expected.ravel(), atol=tolerance)


@pytest.mark.parametrize("kept", [None, 0.5])
def test_recall_of_all_is_the_same_to_the_bit(kept: float | None) -> None:
    """Also of caches that a policy chose from, and behind a compaction."""
    outputs = []
    for recall in (0, 4000):
        cache = Cache(*SHAPES, recall_tokens=recall)
        rng = np.random.default_rng(3)
        some = None if kept is None else [np.flatnonzero(rng.random(900) < kept) for _ in range(cache.num_heads)]
        seq = read_prompt(cache, 900, kept=some)
        out = decode(cache, seq, 900, 100)
        lengths = [len(cache.store.positions(seq, i, h)) for i, s in enumerate(SHAPES) for h in range(s[1])]
        cache.store.compact(seq, *flat([np.flatnonzero(rng.random(n) < 0.7) for n in lengths]))
        outputs.append(out + decode(cache, seq, 1000, 40, seed=4))
    assert_same(*outputs)


def test_steps_of_many_rows_read_everything() -> None:
    cache = Cache(*SHAPES, recall_tokens=64)
    seq = read_prompt(cache, 1000)
    rng = np.random.default_rng(2)
    for index, shape in enumerate(cache.layers):
        q = gaussian(rng, ROWS + 1, shape.num_heads * shape.head_size)
        span = (seq, 0, ROWS + 1, 1000)
        assert all(len(tiles) == 0 for tiles in cache.store.recalled(index, span, q))
        tolerance = 2e-4 + cache.rounding(index, [span], q)
        expected = cache.attention(index, [span], q)
        np.testing.assert_allclose(cache.store.attend(index, [span], q), expected, atol=tolerance)


def test_a_request_gives_the_same_bits_alone_and_in_a_batch() -> None:
    cache = Cache(*SHAPES, recall_tokens=96)
    lengths = [70, 500, 1000, 1700]
    spans = [(read_prompt(cache, n, seed=n), i, 1, n) for i, n in enumerate(lengths)]
    rng = np.random.default_rng(2)
    for index, shape in enumerate(cache.layers):
        q = gaussian(rng, len(spans), shape.num_heads * shape.head_size)
        together = cache.store.attend(index, spans, q)
        for seq, i, _, n in spans:
            alone = cache.store.attend(index, [(seq, 0, 1, n)], q[i : i + 1])
            np.testing.assert_array_equal(together[i : i + 1], alone)


def test_a_fork_goes_on_as_a_copy_does() -> None:
    cache = Cache(*SHAPES, recall_tokens=96)
    seq, copy = read_prompt(cache, 900), read_prompt(cache, 900)
    fork = cache.store.fork(seq)
    expected = decode(cache, copy, 900, 100)
    assert_same(decode(cache, fork, 900, 100), expected)
    assert_same(decode(cache, seq, 900, 100), expected)


@pytest.mark.parametrize("num_tokens", [1, 40, 700, 899, 900])
def test_a_fork_of_the_first_tokens_has_just_these(num_tokens: int) -> None:
    """Keys and values are encoded anew where tiles are: within a step of their codes."""
    cache = Cache(*SHAPES, recall_tokens=96)
    seq = read_prompt(cache, 900)
    before, bytes_before = cache.store.nbytes, cache.store.nbytes_of(seq)
    fork = cache.store.fork(seq, num_tokens)
    for index, shape in enumerate(cache.layers):
        for head in range(shape.num_kv_heads):
            old, new = cache.tokens(seq, index, head), cache.tokens(fork, index, head)
            old_order, new_order = np.argsort(old[2]), np.argsort(new[2])
            np.testing.assert_array_equal(new[2][new_order], np.arange(num_tokens))
            for a, b in zip(old[:2], new[:2], strict=True):
                np.testing.assert_allclose(b[new_order], a[old_order][:num_tokens], atol=0.1)
    cache.store.release(fork)
    assert cache.store.nbytes == before == bytes_before


@pytest.mark.parametrize(("mine", "theirs"), [(96, 96), (96, 0), (0, 96)])
def test_files_are_the_same_with_and_without(mine: float, theirs: float) -> None:
    """A dump has tiles in the order that they have; means are of what is there, so they are the same again."""
    cache, other = Cache(*SHAPES, recall_tokens=mine), Cache(*SHAPES, recall_tokens=theirs)
    seq = read_prompt(cache, 900)
    decode(cache, seq, 900, 50)
    heads, tiles = cache.store.dump(seq)
    loaded = other.store.load(heads, tiles)
    for a, b in zip(other.store.dump(loaded), (heads, tiles), strict=True):
        np.testing.assert_array_equal(a, b)
    if theirs:
        for index, shape in enumerate(cache.layers):
            for head in range(shape.num_kv_heads):
                keys = other.store.read(loaded, index, head)[0]
                means = other.store.means(loaded, index, head)
                expected = keys[: TILE * len(means)].reshape(len(means), TILE, -1).mean(axis=1)
                np.testing.assert_allclose(means, expected, rtol=2**-10, atol=2e-3)
    if mine == theirs:
        assert_same(decode(other, loaded, 950, 60), decode(cache, seq, 950, 60))


def test_rows_that_follow_together_are_grouped_among_themselves() -> None:
    """Those of a turn or an extension, when they leave the recent window; the others stay where they are."""
    cache = Cache(*SHAPES, recent="bf16", key="f32", value="f32", recall_tokens=96)
    seq, rng = read_prompt(cache, 600), np.random.default_rng(4)
    before = [cache.tokens(seq, index, 0) for index in range(len(SHAPES))]
    cache.append(seq, rng, 300, 600)
    appended = [cache.tokens(seq, index, 0) for index in range(len(SHAPES))]
    cache.store.quantize_aged(seq)
    first, last = 600 // TILE * TILE - TILE, (900 - 32) // TILE * TILE
    for index, shape in enumerate(cache.layers):
        k, v, positions = cache.tokens(seq, index, 0)
        order = np.argsort(positions, kind="stable")
        for a, b in zip((k, v, positions), appended[index], strict=True):
            np.testing.assert_array_equal(a[order], b[np.argsort(appended[index][2], kind="stable")])
        np.testing.assert_array_equal(positions[:first], before[index][2][:first])
        np.testing.assert_array_equal(positions[last:], np.arange(last, 900))
        moved = positions[first:last]
        np.testing.assert_array_equal(np.sort(moved), np.arange(first, last))
        assert (np.diff(moved) > 0).all() == bool(shape.window)


def test_bytes_are_those_of_means_and_of_positions() -> None:
    """Each tile has its mean; what a prompt takes is at most what was said before it came."""
    plain, cache = Cache(*SHAPES), Cache(*SHAPES, recall_tokens=96)
    with_means = [plain.store.nbytes_of(read_prompt(plain, n)) for n in (100, 900)]
    with_means = [
        n + sum(-(-m // TILE) * s[1] * -(-2 * s[2] // 64) * 64 for s in SHAPES)
        for n, m in zip(with_means, (100, 900), strict=True)
    ]
    short, long = (cache.store.nbytes_of(read_prompt(cache, n)) for n in (100, 900))
    assert short == with_means[0] == cache.store.bytes_for(100)
    assert with_means[1] <= long <= cache.store.bytes_for(900)
    seq = cache.new(np.random.default_rng(0), 100)
    assert cache.store.nbytes_of(seq) == with_means[0]


@settings(max_examples=examples(30), deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_prompts_are_grouped_as_the_reference_groups_them(data: Any, seed: int) -> None:
    """Keys that are alike, equal ones among them, stand together; in a layer with a window nothing moves."""
    rng = np.random.default_rng(seed)
    n, width = data.draw(st.integers(200, 900)), 16 * data.draw(st.integers(1, 5))
    cache = Cache(layer(1, 1, width), layer(1, 1, width, window=100), key="f32", recall_tokens=64)
    centers = 3 * gaussian(rng, data.draw(st.integers(1, 12)), width)
    noise = data.draw(st.sampled_from([0.0, 0.3, 2.0]))
    keys = centers[rng.integers(len(centers), size=n)] + np.float32(noise) * gaussian(rng, n, width)
    seq = cache.store.create()
    cache.attach_prefill(seq, [(keys, gaussian(rng, n, width))] * 2)
    if data.draw(st.booleans()):
        ladders = some_ladders(rng, 2, 2)
        tiers = np.sort(rng.integers(0, 2, (2, n), dtype=np.uint8))[:, ::-1]
        everything = flat([np.arange(n)] * 2)
        cache.store.commit_prefill(seq, *everything, precisions=ladders, tiers=np.ascontiguousarray(tiers.ravel()))
        assert sorted(cache.store.positions(seq, 0, 0)) == list(range(n))
        return
    cache.store.commit_prefill(seq)
    order = group_tiles(np.arange(n), np.zeros(n, np.uint8), keys, (n - 32) // TILE)
    np.testing.assert_array_equal(cache.store.positions(seq, 0, 0), order)
    np.testing.assert_array_equal(cache.store.positions(seq, 1, 0), np.arange(n))


@pytest.mark.parametrize("recall", [-1, 1, 63, 64.5, 2.0**40, float("nan")])
def test_a_wrong_recall_is_refused(recall: float) -> None:
    with pytest.raises(ValueError, match="recall_tokens must be"):
        Cache(layer(), recall_tokens=recall)
