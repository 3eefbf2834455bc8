"""Prompts without PagedAttention: rows are written to the staging blocks and attend to them, as the reference does."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from covering import covering, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from native_stores import (
    BF16_EMULATED,
    DEFAULTS,
    ISAS,
    PREFILL_BOUND,
    PREFILL_ISAS,
    Array,
    Cache,
    LayerTuple,
    Span,
    gaussian,
    keys_values,
    layer,
    require_native,
)

from ov_kvcrush import native
from reference import codec as reference

each_kernel = pytest.mark.parametrize("isa", PREFILL_ISAS)


@pytest.fixture(autouse=True)
def _native() -> None:
    require_native()


def bf16(x: Array) -> Array:
    return reference.to_float(x, "bf16")


class Prompts:
    """Prompts of one layer in staging blocks that hold nothing but NaN, and the rows that are to be read."""

    def __init__(self, isa: str, shape: LayerTuple, lengths: list[int], sharpness: float = 1.0, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.cache = Cache(shape, key="bf16", value="bf16", group_size=16, isa=isa)
        self.store = self.cache.store
        num_heads, num_kv_heads, size = shape[:3]
        blocks = sum(-(-n // 32) for n in lengths)
        empty = np.full(blocks * 32 * num_kv_heads * size, 0x7FC1, np.uint16).view(np.uint8)
        self.keys, self.values = empty.copy(), empty.copy()
        self.store.set_staging(0, self.keys, self.values, blocks, "bf16")
        table = rng.permutation(blocks).astype(np.int32)
        self.rows = []
        for n in lengths:
            mine, table = table[: -(-n // 32)], table[-(-n // 32) :]
            seq = self.store.create()
            self.store.attach_prefill(seq, mine, n)
            k, v = (bf16(x) for x in keys_values(rng, n, num_kv_heads * size))
            self.rows.append((seq, bf16(sharpness * gaussian(rng, n, num_heads * size)), k, v))

    def read(self, parts: list[tuple[int, int, int]]) -> list[Array]:
        """One call for these (prompt, from, to); what each gives."""
        spans: list[Span] = []
        begin = 0
        for index, start, end in parts:
            spans.append((self.rows[index][0], begin, end - start, start))
            begin += end - start
        q, k, v = (np.concatenate([self.rows[i][what][a:b] for i, a, b in parts]) for what in (1, 2, 3))
        out = self.store.prefill(0, spans, q, k, v)
        return np.split(out, [end for end in accumulate(b - a for _, a, b in parts)][:-1])

    def expected(self, index: int) -> Array:
        """Of the whole prompt, from what the store has adopted."""
        seq, q = self.rows[index][:2]
        self.store.commit_prefill(seq)
        return self.cache.attention(0, [(seq, 0, len(q), 0)], q)

    def assert_close(self, index: int, got: Array) -> None:
        values = np.abs(self.rows[index][3]).max()
        np.testing.assert_allclose(got, self.expected(index), rtol=0, atol=PREFILL_BOUND * values)


@each_kernel
@pytest.mark.parametrize(
    ("head_size", "group", "window"), covering([32, 64, 96, 128, 256], [1, 3, 7, 16], [0, 1, 45, 300])
)
def test_a_prompt_attends_as_the_reference_says(isa: str, head_size: int, group: int, window: int) -> None:
    prompts = Prompts(isa, layer(2 * group, 2, head_size, window), [333])
    prompts.assert_close(
        0, np.concatenate([prompts.read([(0, a, b)])[0] for a, b in ((0, 130), (130, 131), (131, 333))])
    )


@each_kernel
@pytest.mark.parametrize(("length", "sharpness"), covering([1, 2, 31, 32, 33, 127, 128, 129, 700], [0.1, 1, 30]))
def test_prompts_of_any_length_and_sharpness(isa: str, length: int, sharpness: float) -> None:
    prompts = Prompts(isa, layer(6, 2, 64), [length], sharpness)
    prompts.assert_close(0, prompts.read([(0, 0, length)])[0])


@each_kernel
def test_logits_that_rise_along_the_prompt(isa: str) -> None:
    """Each step of tokens outweighs all before by more than floats can hold: the reference of a row follows."""
    prompts = Prompts(isa, layer(2, 1, 32), [600])
    _, q, k, _ = prompts.rows[0]
    k[:, 0], q[:, 0] = bf16(np.linspace(0, 4000, 600, dtype=np.float32)), 4
    q[::2, 0] = -4
    prompts.assert_close(0, prompts.read([(0, 0, 600)])[0])


@each_kernel
@settings(max_examples=examples(40), deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_neither_pieces_nor_neighbours_change_a_bit(isa: str, data: Any, seed: int) -> None:
    """However prompts are cut and whoever is read beside them, each row is what it is alone."""
    draw = data.draw
    group, window = draw(st.integers(1, 16)), draw(st.sampled_from([0, 0, 1, 33, 140]))
    lengths = draw(st.lists(st.integers(1, 400), min_size=1, max_size=3))
    shape = layer(2 * group, 2, 32 * draw(st.integers(1, 3)), window)
    whole, cut = (
        Prompts(isa, shape, lengths, sharpness=draw(st.sampled_from([1.0, 8.0])), seed=seed) for _ in range(2)
    )
    for (_, q, *_), mine in zip(whole.rows, cut.rows, strict=True):
        mine[1][:] = q
    alone = [whole.read([(i, 0, n)])[0] for i, n in enumerate(lengths)]
    done = [0] * len(lengths)
    got: list[list[Array]] = [[] for _ in lengths]
    while parts := [
        (i, a, draw(st.integers(a + 1, n))) for i, (a, n) in enumerate(zip(done, lengths, strict=True)) if a < n
    ]:
        for (i, _, end), out in zip(parts, cut.read(parts), strict=True):
            done[i] = end
            got[i].append(out)
    for expected, pieces in zip(alone, got, strict=True):
        np.testing.assert_array_equal(np.concatenate(pieces), expected)
    for index, expected in enumerate(alone):
        whole.assert_close(index, expected)


@each_kernel
def test_rows_are_staged_as_the_nearest_bf16(isa: str) -> None:
    prompts = Prompts(isa, layer(2, 2, 32), [50])
    seq, _, k, v = prompts.rows[0]
    k += 1e-3 * np.abs(k)
    v -= 1e-3
    prompts.read([(0, 0, 50)])
    prompts.store.commit_prefill(seq)
    for head in range(2):
        got_k, got_v, _ = prompts.cache.tokens(seq, 0, head)
        np.testing.assert_array_equal(got_k, bf16(k[:, 32 * head : 32 * head + 32]))
        np.testing.assert_array_equal(got_v, bf16(v[:, 32 * head : 32 * head + 32]))


@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_only_what_is_staged_as_bf16_does_without_paged_attention(precision: str) -> None:
    cache = Cache(layer())
    seq = cache.store.create()
    rows = keys_values(np.random.default_rng(0), 9, 64)
    cache.attach_prefill(seq, [rows], precision)
    assert not native.can_prefill([layer()], precision)
    with pytest.raises(ValueError, match="prompts must go through PagedAttention"):
        cache.store.prefill(0, [(seq, 0, 9, 0)], gaussian(np.random.default_rng(1), 9, 128), *rows)


def test_only_products_of_bf16_have_the_kernel() -> None:
    can = {isa: native.can_prefill([layer()], "bf16", isa) for isa in ISAS}
    assert can == {isa: isa in ("avx512bf16", "amx") for isa in ISAS}
    assert native.can_prefill([layer()], "bf16") == can[ISAS[-1]]


def test_emulated_products_are_for_who_asks_for_them() -> None:
    assert BF16_EMULATED not in ISAS
    assert (BF16_EMULATED in PREFILL_ISAS) == ("avx512" in ISAS)
    assert native.Store(layers=[layer()], **DEFAULTS).isa == ISAS[-1]
    if "avx512" not in ISAS:
        with pytest.raises(ValueError, match="isa must be"):
            native.can_prefill([layer()], "bf16", BF16_EMULATED)


def test_one_layer_that_tiles_do_not_fit_lets_all_go_through_paged_attention() -> None:
    assert not native.can_prefill([layer(), layer(head_size=48)], "bf16")
    assert not native.can_prefill([(*layer()[:4], -1.0)], "bf16")


@pytest.mark.parametrize(
    ("shape", "staging", "isa", "message"),
    [
        (layer(), "u8", "", "staging must be"),
        (layer(), "bf16", "fast", "isa must be"),
        (layer(5, 2), "bf16", "", "num_heads must be"),
        (layer(4, 0), "bf16", "", "num_heads must be"),
    ],
)
def test_what_cannot_be_asked_is_refused(shape: LayerTuple, staging: str, isa: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.can_prefill([shape], staging, isa)


@each_kernel
@pytest.mark.parametrize(
    ("span", "message"),
    [
        ((0, 0, 9, 32), "rows must end within the 40 staged tokens, got 41"),
        ((7, 0, 9, 0), "sequence must be"),
        ((0, 3, 9, 0), "must"),
        ((0, 0, 9, -1), "must"),
    ],
)
def test_wrong_rows_are_refused(isa: str, span: Span, message: str) -> None:
    prompts = Prompts(isa, layer(), [40])
    seq, q, k, v = prompts.rows[0]
    with pytest.raises(ValueError, match=message):
        prompts.store.prefill(0, [(seq + span[0], *span[1:])], q[:9], k[:9], v[:9])
    with pytest.raises(ValueError, match="k must"):
        prompts.store.prefill(0, [(seq, 0, 9, 0)], q[:9], k[:9, :32], v[:9])
    prompts.assert_close(0, prompts.read([(0, 0, 40)])[0])


@each_kernel
def test_a_sequence_that_is_not_staged_is_refused(isa: str) -> None:
    prompts = Prompts(isa, layer(), [40])
    _, q, k, v = prompts.rows[0]
    with pytest.raises(ValueError, match="rows must end within the 0 staged tokens, got 9"):
        prompts.store.prefill(0, [(prompts.store.create(), 0, 9, 0)], q[:9], k[:9], v[:9])
