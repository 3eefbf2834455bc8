"""Sequences as numbers and bytes: what is loaded cannot be told from what was dumped, and nothing damaged harms."""

from __future__ import annotations

from pathlib import Path
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
    flat,
    gaussian,
    keys_values,
    layer,
    require_native,
    some_precisions,
)

from ov_kvcrush import native
from reference import codec as reference

FLOATS = ["f32", "bf16", "f16"]
SHAPES = [layer(4, 2, 32), layer(3, 1, 48, window=40)]
CAPTURED = 5  # capture_rows of loaded sequences


@pytest.fixture(autouse=True)
def _native() -> None:
    require_native()


def heads_of(cache: Cache) -> list[tuple[int, int]]:
    return [(index, head) for index, shape in enumerate(cache.layers) for head in range(shape.num_kv_heads)]


def next_position(cache: Cache, seq: int) -> int:
    return int(cache.store.dump(seq)[0][0, 3])


def keep_some(cache: Cache, seq: int, rng: np.random.Generator, density: float, by_tile: bool) -> None:
    """Compact to an uneven selection: single tokens, or whole tiles and some single tokens."""
    kept = []
    for index, head in heads_of(cache):
        n = cache.store.num_tokens(seq, index, head)
        chosen = rng.random(n) < density * rng.random() * 2
        if by_tile:
            chosen = np.repeat(rng.random(n // 32 + 1) < density, 32)[:n] ^ (rng.random(n) < 0.01)
        kept.append(np.flatnonzero(chosen))
    cache.store.compact(seq, *flat(kept))


def random_sequence(cache: Cache, rng: np.random.Generator, steps: list[str], n: int) -> int:
    seq = cache.new(rng, n, settle=bool(rng.integers(2)))
    for step in steps:
        position = next_position(cache, seq)
        if step == "append":
            cache.append(seq, rng, int(rng.integers(1, 70)), position)
        elif step == "jump":  # positions with a gap, that no contiguous tile can hold
            cache.append(seq, rng, int(rng.integers(1, 9)), position + int(rng.integers(1, 1000)))
        elif step == "settle":
            cache.store.quantize_aged(seq)
        elif step == "fork":
            seq = cache.store.fork(seq)
        elif step == "precisions":
            cache.store.set_precisions(seq, some_precisions(rng, cache.num_heads))
        else:
            keep_some(cache, seq, rng, density=0.7, by_tile=step == "tiles")
    return seq


def assert_same(cache: Cache, seq: int, other: Cache, twin: int, rng: np.random.Generator) -> None:
    """Two sequences, maybe in two stores, cannot be told apart; `seq` has nothing reserved."""
    at = next_position(cache, seq)
    assert other.store.nbytes_of(twin) == cache.store.nbytes_of(seq)
    for index, shape in enumerate(cache.layers):
        q = gaussian(rng, 3, shape.num_heads * shape.head_size)
        mine = cache.store.attend(index, [(seq, 0, 3, at)], q)
        np.testing.assert_array_equal(other.store.attend(index, [(twin, 0, 3, at)], q), mine)
        places = np.arange(at, at + 3, dtype=np.int32)
        scores = cache.store.scores(seq, index, q, places, "mean")
        np.testing.assert_array_equal(other.store.scores(twin, index, q, places, "mean"), scores)
    np.testing.assert_array_equal(other.store.precisions(twin), cache.store.precisions(seq))
    for index, head in heads_of(cache):
        assert other.store.num_tokens(twin, index, head) == cache.store.num_tokens(seq, index, head)
        for got, expected in zip(other.tokens(twin, index, head), cache.tokens(seq, index, head), strict=True):
            np.testing.assert_array_equal(got, expected)
    for got, expected in zip(other.store.dump(twin), cache.store.dump(seq), strict=True):
        np.testing.assert_array_equal(got, expected)


def go_on(pairs: list[tuple[Cache, int]], seed: int) -> list[tuple[Cache, int]]:
    """The same on each: tokens more, some dropped, settled, forked. Returns the forks."""
    forks = []
    for cache, seq in pairs:
        rng = np.random.default_rng(seed)
        cache.append(seq, rng, 37, next_position(cache, seq))
        keep_some(cache, seq, rng, density=0.8, by_tile=True)
        cache.append(seq, rng, 2, next_position(cache, seq))
        cache.store.quantize_aged(seq)
        forks.append((cache, cache.store.fork(seq)))
    return forks


steps_of = st.lists(st.sampled_from(["append", "jump", "settle", "fork", "precisions", "tiles", "tokens"]), max_size=6)


@settings(max_examples=examples(60), deadline=None)
@given(
    precisions=st.tuples(*[st.sampled_from(PRECISIONS)] * 2, st.sampled_from(FLOATS)),
    recent_tokens=st.sampled_from([0, 1, 32, 40]),
    n=st.sampled_from([0, 1, 31, 32, 33, 200]),
    steps=steps_of,
    seed=st.integers(0, 2**32 - 1),
)
def test_loaded_is_as_dumped(
    precisions: tuple[str, str, str], recent_tokens: int, n: int, steps: list[str], seed: int
) -> None:
    key, value, recent = precisions
    options = {"key": key, "value": value, "recent": recent, "recent_tokens": recent_tokens}
    mine, other = Cache(*SHAPES, **options), Cache(*SHAPES, **options)
    rng = np.random.default_rng(seed)
    seq = mine.store.fork(random_sequence(mine, rng, steps, n))  # a fork has nothing reserved
    heads, tiles = mine.store.dump(seq)
    assert tiles.nbytes <= 1.02 * mine.store.nbytes_of(seq)
    for array in (heads, tiles):
        array.setflags(write=False)

    twin, here = other.store.load(heads, tiles), mine.store.load(heads, tiles)
    assert other.store.nbytes == mine.store.nbytes_of(seq)
    assert_same(mine, seq, other, twin, rng)
    assert_same(mine, seq, mine, here, rng)
    forks = go_on([(mine, seq), (other, twin), (mine, here)], seed)
    for cache, fork in forks[1:]:
        assert_same(*forks[0], cache, fork, rng)
    for cache, held in [*forks, (mine, here), (other, twin)]:
        cache.store.release(held)
    assert other.store.nbytes == 0


@pytest.mark.parametrize("shared", [True, False], ids=["twin gone", "original gone"])
def test_forks_are_dumped_each_for_itself(shared: bool) -> None:
    cache = Cache(*SHAPES)
    rng = np.random.default_rng(1)
    seq = cache.new(rng, 150)
    fork = cache.store.fork(seq)
    first, second = cache.store.dump(seq), cache.store.dump(fork)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    cache.append(fork, rng, 10, 150)
    cache.store.release(fork if shared else seq)
    np.testing.assert_array_equal(cache.store.dump(cache.store.load(*first))[1], first[1])


def test_same_content_gives_same_bytes() -> None:
    """Whatever lay in the memory before, whether at once or bit by bit, whether adopted or appended."""
    dumps = []
    for each in (1, 7, 90):
        cache = Cache(*SHAPES)
        cache.store.release(cache.new(np.random.default_rng(each), 300))
        rng = np.random.default_rng(5)
        tokens = [keys_values(rng, 90, shape.num_kv_heads * shape.head_size) for shape in cache.layers]
        tokens = [(reference.to_float(k, "bf16"), reference.to_float(v, "bf16")) for k, v in tokens]
        seq = cache.store.create()
        for first in range(0, 90, each):
            assert cache.store.reserve(seq, min(each, 90 - first))
            for index, (k, v) in enumerate(tokens):
                cache.store.append(seq, index, k[first : first + each], v[first : first + each], first)
        cache.store.quantize_aged(seq)
        dumps.append(cache.store.dump(seq))
        staged = cache.store.create()
        cache.attach_prefill(staged, tokens)
        cache.store.commit_prefill(staged)
        if each == 90:
            dumps.append(cache.store.dump(staged))
    for heads, tiles in dumps[1:]:
        np.testing.assert_array_equal(heads, dumps[0][0])
        np.testing.assert_array_equal(tiles, dumps[0][1])


def test_what_was_reserved_is_not_dumped() -> None:
    cache = Cache(*SHAPES)
    seq = cache.new(np.random.default_rng(2), 40)
    before, bare = cache.store.dump(seq), cache.store.nbytes_of(seq)
    assert cache.store.reserve(seq, 500)
    after = cache.store.dump(seq)
    np.testing.assert_array_equal(after[1], before[1])
    assert cache.store.nbytes_of(cache.store.load(*after)) == bare


def test_loaded_sequences_capture_queries_when_asked() -> None:
    cache = Cache(*SHAPES)
    dump = cache.store.dump(cache.new(np.random.default_rng(3), 40))
    for rows in (0, CAPTURED):
        assert cache.store.captured(cache.store.load(*dump, capture_rows=rows), 0)[1].size == 0
    with pytest.raises(ValueError, match=r"capture_rows must be in 0\.\.65536, got -1"):
        cache.store.load(*dump, capture_rows=-1)


def test_a_staged_sequence_is_refused() -> None:
    cache = Cache(*SHAPES)
    rng = np.random.default_rng(4)
    seq = cache.store.create()
    cache.attach_prefill(seq, [keys_values(rng, 20, shape.num_kv_heads * shape.head_size) for shape in cache.layers])
    with pytest.raises(ValueError, match="must be committed before it is dumped"):
        cache.store.dump(seq)


def test_loads_from_a_map_of_a_file(tmp_path: Path) -> None:
    cache = Cache(*SHAPES)
    heads, tiles = cache.store.dump(cache.new(np.random.default_rng(6), 100))
    (tmp_path / "tiles").write_bytes(b"odd" + tiles.tobytes())
    mapped = np.memmap(tmp_path / "tiles", np.uint8, "r")[3:]
    np.testing.assert_array_equal(cache.store.dump(cache.store.load(heads, mapped))[1], tiles)


def test_the_limit_holds_and_failures_leave_nothing() -> None:
    rng = np.random.default_rng(7)
    roomy = Cache(*SHAPES)
    seq = roomy.new(rng, 200)
    dump, size = roomy.store.dump(seq), roomy.store.nbytes_of(seq)
    tight = Cache(*SHAPES, max_bytes=2 * size + 100)
    held = [tight.store.load(*dump), tight.store.load(*dump)]
    with pytest.raises(native.StoreFull, match=f"max_bytes must leave room for {size} bytes"):
        tight.store.load(*dump)
    tight.store.release(held.pop())
    with pytest.raises(native.StoreFull, match="101 promised"):
        tight.store.load(*dump, promised=101)
    with pytest.raises(ValueError, match="scales"):
        tight.store.load(dump[0], changed(dump[1], slice(8 + 32 * 32, 8 + 32 * 32 + 2), 0))
    assert tight.store.nbytes == size
    assert tight.store.num_sequences == 1
    held.append(tight.store.load(*dump, promised=100))
    for sequence in held:
        tight.store.release(sequence)
    assert tight.store.nbytes == 0


def unrotated(cache: Cache, seq: int, num_tiles: int) -> tuple[Array, Array]:
    """A dump of one head, D = 32, u8/u2, as it was written before values u2 were rotated: without the flag."""
    heads, tiles = cache.store.dump(seq)
    size = 8 + 32 * 32 + 2 * 64 + 32 * 32 // 4 + 2 * 64  # of the record of a full tile
    kinds = slice(2, size * num_tiles, size)
    assert (tiles[kinds] == 2).all()
    return heads, changed(tiles, kinds, 0)


@pytest.mark.parametrize("isa", ISAS)
def test_files_of_before_values_were_rotated_are_read_as_they_were_meant(isa: str) -> None:
    """Their tiles stay as they are, through forks and further files, beside ones that are rotated."""
    rng = np.random.default_rng(14)
    options = {"key": "u8", "value": "u2", "group_size": 32, "isa": isa}
    cache, other = Cache(layer(4, 1, 32), **options), Cache(layer(4, 1, 32), **options)
    seq = cache.new(rng, 200)
    old = unrotated(cache, seq, 5)
    twin = other.store.load(*old)
    k, v, positions = cache.tokens(seq, 0, 0)
    back_k, back_v, back_positions = other.tokens(twin, 0, 0)
    np.testing.assert_array_equal(back_k, k)
    np.testing.assert_array_equal(back_positions, positions)
    np.testing.assert_allclose(back_v[:160], reference.rotate(v[:160]), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(back_v[160:], v[160:])
    np.testing.assert_array_equal(other.store.dump(other.store.fork(twin))[1], old[1])

    other.append(twin, rng, 100, 200)
    other.store.quantize_aged(twin)
    kept = np.concatenate([np.arange(64), np.arange(70, 300)])
    other.store.compact(twin, *flat([kept]))
    np.testing.assert_array_equal(other.store.read(twin, 0, 0)[1][:64], back_v[:64])
    for first in (100, 150, 297):  # rows that see only old tiles, and ones of each kind
        q = gaussian(rng, 3, 4 * 32)
        spans: list[Span] = [(twin, 0, 3, first)]
        expected = other.attention(0, spans, q)
        atol = 1e-4 * float(np.abs(expected).max()) + other.rounding(0, spans, q)
        np.testing.assert_allclose(other.store.attend(0, spans, q), expected, rtol=0, atol=atol)
    again = other.store.load(*other.store.dump(twin))
    assert_same(other, other.store.fork(twin), other, again, rng)


# -- damage ------------------------------------------------------------------------------------------------------------


def changed(array: Array, where: Any, value: Any) -> Array:
    array = array.copy()
    array[where] = value
    return array


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (0, -1, "tokens of a head must be in"),
        (0, 2**40, "tokens of a head must be in"),
        (0, 91, "positions must be at least 0 and below 90, got 90"),
        (0, 89, "tiles must hold nothing beyond"),
        (1, -1, "target tiles of a head must be in"),
        (1, 99, "target tiles of a head must be in"),
        (1, 0, "codec of a recent tile must be this store's"),
        (2, -1, "bytes of a head must be in"),
        (2, 2**62, "bytes of a head must be in"),
        (3, 5, "next_position must be"),
        (3, 2**31, "next_position must be"),
        (4, 6, r"precisions of a head must be codecs in 0\.\.5, got 6"),
        (4, -1, r"precisions of a head must be codecs in 0\.\.5, got -1"),
        (5, 2**40, r"precisions of a head must be codecs in 0\.\.5"),
    ],
)
def test_wrong_numbers_of_a_head_are_named(column: int, value: int, message: str) -> None:
    cache = Cache(*SHAPES)
    heads, tiles = cache.store.dump(cache.new(np.random.default_rng(8), 90))
    with pytest.raises(ValueError, match=message):
        cache.store.load(changed(heads, (1, column), value), tiles)
    assert cache.store.num_sequences == 1


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 6, r"key codec of a tile must be in 0\.\.5, got 6"),
        (1, 255, r"value codec of a tile must be in 0\.\.5, got 255"),
        (0, 0, "must"),  # one of another size: what follows is no tile
        (2, 200, "kind of a tile must be"),
        (2, 2, r"kind of a tile must be in 0\.\.1, got 2"),  # rotated, which values u8 are not
        (3, 3, "bytes of a position must be 0, 1, 2 or 4, got 3"),
        (7, 0x80, "positions must be at least 0 and below 90"),
        (4, 89, "positions must be at least 0 and below 90, got 90"),
        (8 + 32 * 32, [0, 0], "scales must be finite and above 0, got 0"),
        (8 + 32 * 32, [0, 0x7C], "scales must be finite and above 0, got 31744"),
        (8 + 32 * 32 + 1, 0x80, "scales must be finite and above 0"),
        (8 + 32 * 32 + 64, [1, 0xFC], "minima must be finite"),
    ],
)
def test_wrong_bytes_of_a_tile_are_named(at: int, value: Any, message: str) -> None:
    cache = Cache(*SHAPES)
    heads, tiles = cache.store.dump(cache.new(np.random.default_rng(9), 90))
    where = slice(at, at + len(value)) if isinstance(value, list) else at
    with pytest.raises(ValueError, match=message):
        cache.store.load(heads, changed(tiles, where, value))
    assert cache.store.num_sequences == 1


def test_arrays_of_another_kind_are_refused() -> None:
    cache = Cache(*SHAPES)
    heads, tiles = cache.store.dump(cache.new(np.random.default_rng(10), 90))
    before = cache.store.nbytes
    wrong = [
        (heads[:, :4].copy(), tiles, "heads must have shape"),
        (heads.astype(np.int32), tiles, "heads must be an array of int64"),
        (heads[:-1], tiles, "heads must have a row for each of the 3 KV heads"),
        (heads[:0], tiles[:0], "heads must have a row for each of the 3 KV heads"),
        (heads, tiles[:-1], "bytes of a head must be in"),
        (heads, np.append(tiles, tiles[:1]), "tiles must have"),
        (heads, tiles.view(np.int8), "tiles must be an array of uint8"),
    ]
    for some_heads, some_tiles, message in wrong:
        with pytest.raises(ValueError, match=message):
            cache.store.load(some_heads, some_tiles)
    assert cache.store.num_sequences == 1
    assert cache.store.nbytes == before


@pytest.mark.parametrize(
    "options",
    [{"recent": "f16"}, {"recent": "f32", "key": "u4"}, {"group_size": 16}],
    ids=str,
)
def test_a_store_of_another_recent_precision_or_group_size_refuses(options: dict[str, Any]) -> None:
    cache, other = Cache(*SHAPES), Cache(*SHAPES, **options)
    dump = cache.store.dump(cache.new(np.random.default_rng(11), 120))
    with pytest.raises(ValueError, match="must"):
        other.store.load(*dump)
    assert other.store.nbytes == other.store.num_sequences == 0


@pytest.mark.parametrize("options", [{"key": "u4"}, {"value": "bf16"}, {"key": "u4", "value": "u2"}], ids=str)
def test_a_store_of_other_target_precisions_goes_on_in_those_of_the_dump(options: dict[str, Any]) -> None:
    cache, other = Cache(*SHAPES), Cache(*SHAPES, **options)
    rng = np.random.default_rng(13)
    seq = cache.new(rng, 120)
    twin = other.store.load(*cache.store.dump(seq))
    assert_same(cache, seq, other, twin, rng)
    assert_same(*go_on([(cache, seq), (other, twin)], 5)[0], other, twin, rng)


def test_a_store_of_other_shapes_refuses() -> None:
    cache = Cache(*SHAPES)
    dump = cache.store.dump(cache.new(np.random.default_rng(12), 120))
    for shapes in ([SHAPES[0]], [layer(4, 2, 48), SHAPES[1]], [layer(4, 4, 32), SHAPES[1]], SHAPES[::-1]):
        other = Cache(*shapes)
        with pytest.raises(ValueError, match="must"):
            other.store.load(*dump)
        assert other.store.nbytes == 0


def damaged(rng: np.random.Generator, heads: Array, tiles: Array) -> tuple[Array, Array]:
    """One to four changes: bits, numbers, lengths, rows, pieces moved about. Mostly where the structure is."""
    heads, tiles = heads.copy(), tiles.copy()
    begins = np.concatenate([[0], np.cumsum(heads[:, 2])])
    for _ in range(rng.integers(1, 5)):
        row, column = rng.integers(len(heads)), rng.integers(heads.shape[1])
        match rng.integers(8):
            case 0:
                heads[row, column] ^= np.int64(1) << np.int64(rng.integers(0, 63))
            case 1:
                heads[row, column] += rng.integers(-40, 40)
            case 2:
                heads[:, 3] = rng.choice([0, 1, 50, 2**31 - 1, 2**31, -1])
            case 3:
                heads = heads[rng.permutation(len(heads))]
            case 4 if len(tiles):
                tiles[rng.integers(len(tiles))] ^= 1 << rng.integers(8)
            case 5 if len(tiles):  # heads of records
                at = min(begins[row] + rng.integers(40), len(tiles) - 1)
                tiles[at] = rng.integers(256)
            case 6 if len(tiles):
                cut = rng.integers(len(tiles))
                heads[-1, 2] -= len(tiles) - cut
                tiles = tiles[:cut]
            case _:
                tiles = np.concatenate([tiles[rng.integers(len(tiles) + 1) :], tiles])[: len(tiles)]
    return heads, tiles


def load_or_none(cache: Cache, heads: Array, tiles: Array) -> int | None:
    try:
        return int(cache.store.load(heads, tiles))
    except ValueError:
        return None


@settings(max_examples=examples(40), deadline=None)
@given(
    precisions=st.tuples(*[st.sampled_from(PRECISIONS)] * 2, st.sampled_from(FLOATS)),
    steps=steps_of,
    seed=st.integers(0, 2**32 - 1),
)
def test_damage_is_refused_or_harmless(precisions: tuple[str, str, str], steps: list[str], seed: int) -> None:
    """A damaged dump that loads is a sequence as good as any: it attends, goes on and goes away."""
    key, value, recent = precisions
    origin, cache = (Cache(*SHAPES, key=key, value=value, recent=recent) for _ in range(2))
    rng = np.random.default_rng(seed)
    dump = origin.store.dump(random_sequence(origin, rng, steps, 100))
    with np.errstate(all="ignore"):
        for _ in range(25):
            seq = load_or_none(cache, *damaged(rng, *dump))
            if seq is None:
                assert cache.store.nbytes == cache.store.num_sequences == 0
                continue
            again = cache.store.load(*cache.store.dump(seq))
            for got, expected in zip(cache.store.dump(again), cache.store.dump(seq), strict=True):
                np.testing.assert_array_equal(got, expected)
            position = next_position(cache, seq)
            for index, shape in enumerate(cache.layers):
                q = gaussian(rng, 1, shape.num_heads * shape.head_size)
                cache.store.attend(index, [(seq, 0, 1, min(position, 2**31 - 2))], q)
            if position < 2**31 - 100:
                cache.append(seq, rng, 3, position)
            keep_some(cache, seq, rng, density=0.5, by_tile=False)
            cache.store.quantize_aged(seq)
            cache.store.release(seq)
            cache.store.release(again)
    assert cache.store.nbytes == cache.store.num_sequences == 0
