"""Kernels: codecs, attention and scores equal the numpy reference on every instruction set of this machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from covering import covering, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
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
    score_tokens,
)

from ov_kvcrush import native
from reference import codec as reference

QUANTISED = ["u8", "u4", "u2"]
LENGTHS = [0, 1, 31, 32, 33, 65, 96, 127]


@pytest.fixture(autouse=True)
def _native() -> None:
    require_native()


def assert_close(got: Array, expected: Array, rounding: float = 0) -> None:
    """Error below 1e-4 of the largest number expected and `rounding`; exact where nothing but zeros is."""
    assert got.shape == expected.shape
    assert np.isfinite(got).all()
    largest = float(np.abs(expected).max(initial=0))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * largest + (rounding if largest else 0))


def assert_attends(cache: Cache, spans: list[Span], q: Array, index: int = 0) -> None:
    """`attend` gives what the reference gives; quantised tiles may be off by their rounding."""
    rounding = cache.rounding(index, spans, q) if is_quantised(cache) else 0
    assert_close(cache.store.attend(index, spans, q), cache.attention(index, spans, q), rounding)


def is_quantised(cache: Cache) -> bool:
    """Whether kernels on integers take the tiles."""
    return cache.key in QUANTISED and cache.value in QUANTISED


# -- codecs ------------------------------------------------------------------------------------------------------------


def data(kind: str, n: int = 32, head_size: int = 64) -> Array:
    """Float32 (n, D) of a distribution that is hard for some codec."""
    rng = np.random.default_rng(5)
    x = gaussian(rng, n, head_size)
    if kind == "flat":
        x[:] = gaussian(rng, head_size)
    elif kind == "zero":
        x[:] = 0
    elif kind == "ramp":
        x = np.linspace(-3, 7, n * head_size, dtype=np.float32).reshape(n, head_size)
    elif kind == "outlier":
        x[::7, ::5] *= 1000
    elif kind == "huge":
        x *= 30_000
    elif kind == "offset":
        x = 50_000 + x
    elif kind == "tiny":
        x *= 1e-6
    return x


KINDS = ["flat", "zero", "ramp", "normal", "outlier", "huge", "offset", "tiny"]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("kind", "n"), covering(KINDS, [1, 31, 32]))
def test_codes_equal_the_references(isa: str, kind: str, n: int) -> None:
    for key in PRECISIONS:
        for value in PRECISIONS:
            for group_size in (16, 32, 64):
                k, v = data(kind, n), data(kind, n)[:, ::-1].copy()
                got = native.encode_decode(key, value, group_size, k, v, isa)
                expected = reference.encode_decode(key, value, group_size, k, v)
                for name, mine, theirs in zip("kv", got, expected, strict=True):
                    np.testing.assert_array_equal(mine, theirs, f"{name} of {key}/{value}, groups of {group_size}")


@pytest.mark.parametrize(("isa", "head_size"), covering(ISAS, range(16, 257, 16)))
def test_every_head_size_has_its_codes(isa: str, head_size: int) -> None:
    """Sizes that are no multiple of a vector: no channel is lost, none takes its neighbour's scale."""
    k, v = data("outlier", 32, head_size), data("ramp", 32, head_size)
    for precision in PRECISIONS:
        for group_size in {16, head_size}:
            got = native.encode_decode(precision, precision, group_size, k, v, isa)
            expected = reference.encode_decode(precision, precision, group_size, k, v)
            for mine, theirs in zip(got, expected, strict=True):
                np.testing.assert_array_equal(mine, theirs, f"{precision}, groups of {group_size}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("kind", "precision"), covering(KINDS, QUANTISED))
def test_error_is_at_most_half_a_step(isa: str, kind: str, precision: str) -> None:
    """The bound by definition of the step, (max - min) / levels, widened by what f16 takes from minimum and scale.

    Of values u2 as they are stored, rotated.
    """
    k, v = data(kind), data(kind) * np.float32(0.5)
    back_k, back_v = native.encode_decode(precision, precision, 32, k, v, isa)
    if precision == "u2":
        v, back_v = reference.rotate(np.clip(v, -65504, 65504)), reference.rotate(back_v)
    groups = [(k.T, back_k.T)] + [(v[:, i : i + 32], back_v[:, i : i + 32]) for i in (0, 32)]
    for x, back in groups:
        x, back = np.clip(x.astype(np.float64), -65504, 65504), back.astype(np.float64)
        low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
        lost = np.abs(low) * 2**-10 + 2**-24  # by rounding the minimum down
        step = np.maximum((high - low + lost) / (2 ** reference.BITS[precision] - 1) * (1 + 2**-10), 2**-24) + 2**-24
        rounding = np.abs(x).max(axis=1, keepdims=True) * 1e-6 if precision == "u2" else np.abs(x) * 2e-7
        assert (np.abs(x - back) <= step / 2 * (1 + 1e-4) + rounding).all()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=examples(100), deadline=None)
@given(
    kind=st.sampled_from(["normal", "uniform", "laplace", "outlier", "few", "offset"]),
    num_tokens=st.integers(1, 32),
    seed=st.integers(0, 2**32 - 1),
)
def test_two_bits_err_no_more_than_over_the_whole_range(isa: str, kind: str, num_tokens: int, seed: int) -> None:
    """The root of the mean squared error of each scale, up to what f16 takes from minimum and step."""
    rng = np.random.default_rng(seed)
    x = gaussian(rng, num_tokens, 32)
    match kind:
        case "uniform":
            x = rng.uniform(-1, 1, x.shape).astype(np.float32)
        case "laplace":
            x = rng.laplace(size=x.shape).astype(np.float32)
        case "outlier":
            x *= np.where(rng.random(x.shape) < 0.05, 100, 1).astype(np.float32)
        case "few":  # numbers that four levels have nearly
            x = (rng.integers(0, 4, x.shape) + 0.01 * x).astype(np.float32)
        case "offset":
            x += 20
    back_k, back_v = native.encode_decode("u2", "u2", 32, x, reference.rotate(x), isa)
    for numbers, back in ((x.T, back_k.T), (x, reference.rotate(back_v))):
        low, high = numbers.min(axis=1, keepdims=True), numbers.max(axis=1, keepdims=True)
        minimum, scale = reference.min_and_scale(low, high, np.float32(3))
        whole = minimum + np.clip(np.rint((numbers - minimum) / scale), 0, 3) * scale
        mine, theirs = (np.sqrt(((numbers - y).astype(np.float64) ** 2).mean(axis=1)) for y in (back, whole))
        lost = (np.abs(low) * 2**-10 + (high - low) * 2**-9 + np.abs(x).max() * 1e-6)[:, 0]
        assert (mine <= theirs + lost).all()
        if kind in ("normal", "uniform", "laplace") and num_tokens == 32:
            assert (mine**2).mean() < (theirs**2).mean()


@pytest.mark.parametrize("head_size", range(16, 257, 16))
def test_rotation_is_orthonormal_and_its_own_inverse(head_size: int) -> None:
    """The reference's, which codes are compared with: products with its blocks are those with Hadamard's matrix."""
    x = gaussian(np.random.default_rng(head_size), 32, head_size)
    block = head_size & -head_size
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    expected = (x.reshape(32, -1, block) @ matrix / np.sqrt(block)).reshape(32, head_size)
    np.testing.assert_allclose(reference.rotate(x), expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(reference.rotate(reference.rotate(x)), x, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("isa", "head_size"), covering(ISAS, [64, 96, 128]))
def test_channels_that_stand_out_cost_values_of_two_bits_little(isa: str, head_size: int) -> None:
    """As real values have them: unrotated, one of them widens the steps of its whole group."""
    rng = np.random.default_rng(4)
    v = gaussian(rng, 32, head_size)
    v[:, 5::32] *= 8
    back = native.encode_decode("u8", "u2", 32, v, v, isa)[1]
    plain = reference.round_trip(v.reshape(32, -1, 32), "u2").reshape(v.shape)
    mine, theirs = (float(((v - x).astype(np.float64) ** 2).mean()) for x in (back, plain))
    assert mine < 0.6 * theirs


NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=examples(100), deadline=None)
@given(
    drawn=st.integers(1, 32).flatmap(lambda n: hnp.arrays(np.float32, (n, 16), elements=NUMBERS)),
    factor=st.sampled_from([1.0, 1e-3, 1e-30]),
    key=st.sampled_from(QUANTISED),
    value=st.sampled_from(QUANTISED),
)
def test_any_numbers_have_the_references_codes(isa: str, drawn: Array, factor: float, key: str, value: str) -> None:
    """Also what no f16 can hold: it is clamped, so that one wild number leaves finite ones behind."""
    x = (drawn * np.float32(factor)).astype(np.float32)
    got = native.encode_decode(key, value, 16, x, x, isa)
    for mine, theirs in zip(got, reference.encode_decode(key, value, 16, x, x), strict=True):
        assert np.isfinite(mine).all()
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=examples(100), deadline=None)
@given(
    x=hnp.arrays(np.float32, (3, 16), elements=st.floats(-60_000, 60_000, width=32, allow_subnormal=False)),
    precision=st.sampled_from(["f32", "bf16", "f16"]),
)
def test_float_codecs_round_to_nearest_even(isa: str, x: Array, precision: str) -> None:
    for mine in native.encode_decode(precision, precision, 16, x, x, isa):
        np.testing.assert_array_equal(mine, reference.to_float(x, precision))


def test_bytes_of_a_tile_follow_the_formula() -> None:
    for key in PRECISIONS:
        for value in PRECISIONS:
            for head_size in range(16, 257, 16):
                for group_size in [g for g in range(16, head_size + 1, 16) if head_size % g == 0]:
                    for listed in (False, True):
                        args = (key, value, head_size, group_size, listed)
                        assert native.tile_bytes(*args) == reference.tile_bytes(*args), args


# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("precision", "head_size"), covering(PRECISIONS[::-1], [32, 48, 64, 80, 96, 112, 128, 256]))
def test_attention_equals_the_reference(isa: str, precision: str, head_size: int) -> None:
    """One decode row of sequences of ragged lengths; old tokens in tiles of the precision, the newest in bf16."""
    rng = np.random.default_rng(head_size)
    values = PRECISIONS[PRECISIONS.index(precision) - head_size // 16 % 3]
    cache = Cache(layer(6, 2, head_size), key=precision, value=values, group_size=16, isa=isa)
    lengths = [*LENGTHS, 500]
    spans: list[Span] = [(cache.new(rng, n), row, 1, max(0, n - 1)) for row, n in enumerate(lengths)]
    q = gaussian(rng, len(spans), 6 * head_size)
    assert_attends(cache, spans, q)


@pytest.mark.parametrize(("isa", "group"), covering(ISAS, range(1, 17)))
def test_any_group_of_query_heads_reads_its_kv_head(isa: str, group: int) -> None:
    rng = np.random.default_rng(group)
    cache = Cache(layer(3 * group, 3, 32), key="u8", value="u4", isa=isa)
    seq = cache.new(rng, 77)
    q = gaussian(rng, 5, 3 * group * 32)
    spans: list[Span] = [(seq, 0, 5, 72)]
    assert_attends(cache, spans, q)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("window", "precisions"), covering([0, 1, 31, 32, 33, 100], ["u8/u4", "u4/u2", "u2/u8", "bf16/f16"])
)
def test_rows_see_what_came_before_within_the_window(isa: str, window: int, precisions: str) -> None:
    """Rows from the first to the last of a sequence in one call: more than a kernel takes at once."""
    rng = np.random.default_rng(window)
    key, value = precisions.split("/")
    cache = Cache(layer(4, 2, 64, window), key=key, value=value, isa=isa)
    seq = cache.new(rng, 150)
    q = gaussian(rng, 150, 4 * 64)
    spans: list[Span] = [(seq, 0, 150, 0)]
    assert_attends(cache, spans, q)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sharpness", [1, 20])
def test_thousands_of_tokens(isa: str, sharpness: int) -> None:
    """Enough to be split among threads, with attention spread wide and gathered on few tokens."""
    rng = np.random.default_rng(0)
    cache = Cache(layer(8, 2, 64), layer(2, 2, 128, window=1000), key="u8", value="u4", isa=isa)
    seq = cache.new(rng, 5003)
    for index, shape in enumerate(cache.layers):
        q = sharpness * gaussian(rng, 3, shape.num_heads * shape.head_size)
        spans: list[Span] = [(seq, 0, 3, 5000)]
        assert_attends(cache, spans, q, index)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", QUANTISED)
def test_sums_of_the_largest_codes_do_not_overflow(isa: str, precision: str) -> None:
    """Nearly all codes are the largest, over as many channels as there can be; and all rows' numbers are."""
    cache = Cache(layer(1, 1, 256), key=precision, value=precision, group_size=256, isa=isa)
    seq = cache.store.create()
    assert cache.store.reserve(seq, 700)
    k, v = np.ones((2, 700, 256), np.float32)
    k[::32] = -1  # the least of its channel in each tile
    v[:, 0] = -1  # the least of its token
    cache.store.append(seq, 0, k, v, 0)
    cache.store.quantize_aged(seq)
    q = np.repeat(np.float32([[0], [0.05], [-0.05], [10], [-10]]), 256, axis=1)
    spans: list[Span] = [(seq, 0, 5, 695)]
    assert_attends(cache, spans, q)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("precision", "num_rows"), covering(PRECISIONS, [1, 4, 30]))
def test_channels_of_any_size_keep_their_precision(isa: str, precision: str, num_rows: int) -> None:
    """Queries with a channel that is a hundred times the others, and keys with another one."""
    rng = np.random.default_rng(3)
    cache = Cache(layer(4, 2, 64), key=precision, value=precision, isa=isa)
    seq = cache.store.create()
    assert cache.store.reserve(seq, 300)
    k, v = keys_values(rng, 300, 2 * 64)
    k[:, ::64] /= 100
    k[:, 1::64] *= 100
    q = gaussian(rng, num_rows, 4 * 64)
    q[:, ::64] *= 100
    q[:, 1::64] /= 100
    cache.store.append(seq, 0, k, v, 0)
    cache.store.quantize_aged(seq)
    spans: list[Span] = [(seq, 0, num_rows, 300 - num_rows)]
    assert_attends(cache, spans, q)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [1e-6, 1e4])
def test_values_of_any_size_keep_their_precision(isa: str, value: float) -> None:
    rng = np.random.default_rng(1)
    cache = Cache(layer(2, 1, 32), isa=isa)
    seq = cache.store.create()
    assert cache.store.reserve(seq, 90)
    k, v = keys_values(rng, 90, 32)
    cache.store.append(seq, 0, k, v * np.float32(value), 0)
    cache.store.quantize_aged(seq)
    q = gaussian(rng, 1, 64)
    assert_attends(cache, [(seq, 0, 1, 89)], q)


@pytest.mark.parametrize("isa", ISAS)
def test_logits_far_apart_are_no_overflow(isa: str) -> None:
    """Keys that give logits of some +-1000: all weight is on one token, also when the largest comes first or last."""
    cache = Cache(layer(1, 1, 16), key="f32", value="f32", recent="f32", group_size=16, isa=isa)
    seq = cache.store.create()
    k = np.zeros((70, 16), np.float32)
    k[:, 0] = np.linspace(-4000, 4000, 70)
    v = gaussian(np.random.default_rng(0), 70, 16)
    assert cache.store.reserve(seq, 70)
    cache.store.append(seq, 0, k, v, 0)
    for sign, token in ((1, 69), (-1, 0)):
        q = np.zeros((1, 16), np.float32)
        q[0, 0] = sign
        np.testing.assert_allclose(cache.store.attend(0, [(seq, 0, 1, 69)], q)[0], v[token], rtol=1e-6)


def test_rows_of_no_span_and_rows_that_see_nothing_are_zero() -> None:
    rng = np.random.default_rng(2)
    cache = Cache(layer())
    full, empty = cache.new(rng, 40), cache.store.create()
    out = cache.store.attend(0, [(full, 1, 1, 39), (empty, 2, 1, 0)], gaussian(rng, 4, 128))
    assert (out[[0, 2, 3]] == 0).all()
    assert (out[1] != 0).any()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=examples(50), deadline=None)
@given(case=st.data(), seed=st.integers(0, 2**32 - 1))
def test_any_batch_equals_the_reference(isa: str, case: Any, seed: int) -> None:
    """Sequences with holes of their own in every head, forks, turns of many rows: one call serves them all."""
    draw, rng = case.draw, np.random.default_rng(seed)
    kv_heads, group, head_size = draw(st.integers(1, 3)), draw(st.integers(1, 16)), 16 * draw(st.integers(2, 16))
    cache = Cache(
        layer(kv_heads * group, kv_heads, head_size, draw(st.sampled_from([0, 0, 1, 40]))),
        key=draw(st.sampled_from(PRECISIONS)),
        value=draw(st.sampled_from(PRECISIONS)),
        recent=draw(st.sampled_from(["f32", "bf16", "f16"])),
        recent_tokens=draw(st.sampled_from([0, 1, 32, 50])),
        group_size=16,
        isa=isa,
    )
    spans: list[Span] = []
    begin = 0
    for _ in range(draw(st.integers(1, 3))):
        num_tokens, num_rows = draw(st.integers(0, 140)), draw(st.integers(1, 12))
        seq = cache.new(rng, num_tokens, settle=draw(st.booleans()))
        if draw(st.booleans()):
            kept = [np.flatnonzero(rng.random(num_tokens) < rng.random()) for _ in range(kv_heads)]
            cache.store.compact(seq, *flat(kept))
        for twin in [seq, cache.store.fork(seq)][: draw(st.integers(1, 2))]:
            cache.append(twin, rng, num_rows, num_tokens)
            spans.append((twin, begin, num_rows, num_tokens))
            begin += num_rows
    q = gaussian(rng, begin, kv_heads * group * head_size)
    assert_attends(cache, spans, q)


@pytest.mark.parametrize("isa", ISAS)
def test_a_request_alone_equals_the_same_in_a_batch(isa: str) -> None:
    rng = np.random.default_rng(9)
    cache = Cache(layer(8, 2, 64), key="u8", value="u4", isa=isa)
    lengths = [1, 700, 33, 2000, 64, 5, 129, 300]
    spans: list[Span] = []
    begin = 0
    for i, n in enumerate(lengths):
        rows = min(n, 1 + 5 * (i % 3))
        spans.append((cache.new(rng, n), begin, rows, n - rows))
        begin += rows
    q = gaussian(rng, begin, 8 * 64)
    together = cache.store.attend(0, spans, q)
    backwards = cache.store.attend(0, spans[::-1], q)
    for seq, start, rows, first in spans:
        alone = cache.store.attend(0, [(seq, 0, rows, first)], q[start : start + rows])
        for other in (together, backwards):
            np.testing.assert_allclose(other[start : start + rows], alone, rtol=0, atol=1e-6 * np.abs(alone).max())


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("how", "window"), covering(["mean", "max", "sum_squares"], [0, 20]))
def test_scores_equal_the_reference(isa: str, how: str, window: int) -> None:
    rng = np.random.default_rng(4)
    cache = Cache(layer(6, 2, 64, window), key="u4", value="u2", isa=isa)
    for num_tokens in [*LENGTHS, 1500]:
        seq = cache.new(rng, num_tokens)
        for num_rows in (1, 3, 8, 40):
            at = np.arange(num_tokens - num_rows, num_tokens, dtype=np.int32).clip(0)
            q = 2 * gaussian(rng, num_rows, 6 * 64)
            assert_close(cache.store.scores(seq, 0, q, at, how), cache.scores(seq, 0, q, at, how))


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=examples(30), deadline=None)
@given(case=st.data(), seed=st.integers(0, 2**32 - 1))
def test_scores_of_heads_with_holes(isa: str, case: Any, seed: int) -> None:
    """Heads of different lengths, rows at positions in any order: one probability per query head and kept token."""
    draw, rng = case.draw, np.random.default_rng(seed)
    kv_heads, group, head_size = draw(st.integers(1, 3)), draw(st.integers(1, 16)), 16 * draw(st.integers(2, 16))
    key = draw(st.sampled_from(PRECISIONS))
    cache = Cache(layer(kv_heads * group, kv_heads, head_size), key=key, value="u8", group_size=16, isa=isa)
    num_tokens, num_rows = draw(st.integers(1, 200)), draw(st.integers(1, 20))
    seq = cache.new(rng, num_tokens)
    kept = [np.flatnonzero(rng.random(num_tokens) < rng.random()) for _ in range(kv_heads)]
    cache.store.compact(seq, *flat(kept))
    q, at = gaussian(rng, num_rows, kv_heads * group * head_size), rng.integers(0, num_tokens + 5, num_rows)
    how = draw(st.sampled_from(["mean", "max", "sum_squares"]))
    got = cache.store.scores(seq, 0, q, at.astype(np.int32), how)
    assert_close(got, cache.scores(seq, 0, q, at, how))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("staged_as", ["f32", "bf16", "f16"])
def test_scores_of_a_staged_prompt_are_those_of_its_keys(isa: str, staged_as: str) -> None:
    """Before it is adopted: from the staging blocks, rounded as the recent window is."""
    rng = np.random.default_rng(6)
    shape = layer(4, 2, 48, window=50)
    cache = Cache(shape, key="u2", recent=staged_as, group_size=16, isa=isa)
    for num_tokens in (1, 31, 32, 33, 100):
        seq, (k, v) = cache.store.create(), keys_values(rng, num_tokens, 2 * 48)
        cache.attach_prefill(seq, [(k, v)], staged_as)
        num_rows = min(num_tokens, 9)
        q, at = gaussian(rng, num_rows, 4 * 48), np.arange(num_tokens - num_rows, num_tokens, dtype=np.int32)
        keys = reference.to_float(k, staged_as).reshape(num_tokens, 2, 48)
        heads = [(keys[:, h], keys[:, h], np.arange(num_tokens)) for h in range(2)]
        expected = score_tokens(cache.layers[0], heads, q, at, "mean")
        assert_close(cache.store.scores(seq, 0, q, at, "mean"), expected)


LAST_ROWS = [1, 7, 16, 31, 32, 40, 64]
STAGED_LENGTHS = [1, 15, 31, 32, 33, 100, 1000]
REDUCTIONS = ["mean", "max", "sum_squares"]


def check_staged(cache: Cache, prompt: list[tuple[Array, Array]], q: list[Array], staged_as: str) -> None:
    """Scores of the last rows of a prompt in all layers, every reduction."""
    seq, num_tokens, num_rows = cache.store.create(), len(prompt[0][0]), len(q[0])
    cache.attach_prefill(seq, prompt, staged_as)
    at = np.arange(num_tokens - num_rows, num_tokens, dtype=np.int32)
    for index, (shape, (k, _)) in enumerate(zip(cache.layers, prompt, strict=True)):
        keys = reference.to_float(k, staged_as).reshape(num_tokens, shape.num_kv_heads, shape.head_size)
        heads = [(keys[:, h], keys[:, h], np.arange(num_tokens)) for h in range(shape.num_kv_heads)]
        for how in REDUCTIONS:
            expected = score_tokens(shape, heads, q[index], at, how)
            assert_close(cache.store.scores(seq, index, q[index], at, how), expected)
    cache.store.release(seq)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("staged_as", "group"), covering(["f32", "bf16", "f16"], range(1, 9)))
def test_staged_prompts_of_any_shape_have_scores(isa: str, staged_as: str, group: int) -> None:
    """Any number of last rows, more than there are tokens too, and windows that hide the first tokens.

    All with all where a kernel of its own takes them, that of AMX.
    """
    rng = np.random.default_rng(group)
    head_sizes, kv_heads = (64, [16, 32, 48, 80, 96, 112, 128, 256][group - 1]), 1 + group % 3
    shapes = [layer(kv_heads * group, kv_heads, head_sizes[i], window) for i, window in enumerate((0, 20))]
    cache = Cache(*shapes, isa=isa)
    for i, num_tokens in enumerate(STAGED_LENGTHS):
        prompt = [keys_values(rng, num_tokens, kv_heads * head_size) for head_size in head_sizes]
        for num_rows in LAST_ROWS if (isa, staged_as) == ("amx", "bf16") else LAST_ROWS[(i + group) % 7 :][:1]:
            q = [2 * gaussian(rng, num_rows, kv_heads * group * head_size) for head_size in head_sizes]
            check_staged(cache, prompt, q, staged_as)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("scale", "kept_bits"), covering([-0.3, 0.0, 0.125], [8, 16, 24]))
def test_scores_of_staged_keys_are_exact_for_queries_of_any_precision(isa: str, scale: float, kept_bits: int) -> None:
    """Also where a channel of the queries is a hundred times the others, and another one of the keys."""
    rng = np.random.default_rng(kept_bits)
    cache = Cache((6, 2, 64, 0, scale), isa=isa)
    k, v = keys_values(rng, 300, 2 * 64)
    k[:, ::64] /= 100
    k[:, 1::64] *= 10
    q = gaussian(rng, 20, 6 * 64)
    q[:, ::64] *= 100
    q[:, 1::64] /= 10
    q = (q.view(np.uint32) & np.uint32(2**32 - 2 ** (24 - kept_bits))).view(np.float32)
    check_staged(cache, [(k, v)], [q], "bf16")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("staged_as", "sign"), covering(["f32", "bf16"], [1, -1]))
def test_staged_logits_far_apart_are_no_overflow(isa: str, staged_as: str, sign: int) -> None:
    """Each block of keys has logits that are hundreds above (or below) those of the block before."""
    cache = Cache(layer(2, 1, 32), isa=isa)
    k = np.zeros((300, 32), np.float32)
    k[:, 0] = np.arange(300) * 64
    q = np.zeros((20, 64), np.float32)
    q[:, ::32] = sign
    check_staged(cache, [(k, k)], [q], staged_as)


# -- instruction sets --------------------------------------------------------------------------------------------------


def test_the_machine_runs_what_info_says() -> None:
    info = native.info()
    assert info["isa"] == info["isas"][-1]
    assert info["isas"][0] == "scalar"
    for isa in info["isas"]:
        assert Cache(layer(), isa=isa).store.isa == isa
    assert Cache(layer()).store.isa == info["isa"]


def test_an_unknown_instruction_set_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"isa must be .*scalar.*, got .*sse9"):
        Cache(layer(), isa="sse9")
    with pytest.raises(ValueError, match="isa must be"):
        native.encode_decode("u8", "u8", 16, np.zeros((1, 16), np.float32), np.zeros((1, 16), np.float32), "sse9")
