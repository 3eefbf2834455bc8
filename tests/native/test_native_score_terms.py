"""Soft caps, ALiBi and sinks: attention, scores and prompts equal the numpy reference on every instruction set."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from covering import covering
from native_stores import (
    ISAS,
    PREFILL_BOUND,
    PREFILL_ISAS,
    Array,
    Cache,
    LayerTuple,
    Span,
    gaussian,
    keys_values,
    require_native,
    stage_random,
)

from ov_kvcrush import native
from reference import codec as reference

CAP = 2.0
NO_NUMBERS: tuple[float, ...] = ()
# soft cap, slope of the first head, sink of the first head
TERMS = {"cap": (CAP, 0.0, None), "alibi": (0.0, 0.2, None), "sinks": (0.0, 0.0, 1.0), "all": (CAP, 0.05, 3.0)}
# 128 tokens are behind by more than a float holds as powers
STEEP = {"steep": (0.0, 4.0, None)}


@pytest.fixture(autouse=True)
def _native() -> None:
    require_native()


def layer(terms: str, num_heads: int = 6, num_kv_heads: int = 2, head_size: int = 64, window: int = 0) -> LayerTuple:
    """Each query head has a slope and a sink of its own; scores are some +-3."""
    cap, slope, sink = (TERMS | STEEP)[terms]
    slopes = [slope / (h + 1) for h in range(num_heads)] if slope else NO_NUMBERS
    sinks = [sink - h for h in range(num_heads)] if sink is not None else NO_NUMBERS
    return (num_heads, num_kv_heads, head_size, window, head_size**-0.5, cap, slopes, sinks)


def assert_close(got: Array, expected: Array, rounding: float = 0) -> None:
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * float(np.abs(expected).max()) + rounding)


class Prompt:
    """A prompt of one layer, staged in blocks of NaN: what the store reads of it, and what it must give."""

    def __init__(self, isa: str, shape: LayerTuple, num_tokens: int, staged_as: str) -> None:
        rng = np.random.default_rng(7)
        num_heads, num_kv_heads, size = shape[:3]
        self.cache = Cache(shape, key="f32", value="f32", recent="f32", group_size=16, isa=isa)
        self.k, self.v = keys_values(rng, num_tokens, num_kv_heads * size)
        self.q = gaussian(rng, num_tokens, num_heads * size)
        if staged_as == "bf16":
            self.q, self.k, self.v = (reference.to_float(x, "bf16") for x in (self.q, self.k, self.v))
        self.seq = self.cache.store.create()
        nothing = np.full_like(self.k, np.nan)
        self.cache.attach_prefill(self.seq, [(nothing, nothing)], staged_as)

    def read(self, ends: list[int]) -> Array:
        """In pieces that end there."""
        pieces = [
            self.cache.store.prefill(0, [(self.seq, 0, b - a, a)], self.q[a:b], self.k[a:b], self.v[a:b])
            for a, b in pairwise([0, *ends])
        ]
        self.cache.store.commit_prefill(self.seq)
        return np.concatenate(pieces)

    def expected(self) -> Array:
        return self.cache.attention(0, [(self.seq, 0, len(self.q), 0)], self.q)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("terms", "precision", "head_size", "window"),
    covering(list(TERMS), ["u8/u8", "u4/u2", "f32/f32", "bf16/u8"], [32, 48, 128], [0, 40]),
)
def test_attention_equals_the_reference(isa: str, terms: str, precision: str, head_size: int, window: int) -> None:
    """Decode rows, many rows, and so many tokens that threads share them; a term that is left out would be seen."""
    rng = np.random.default_rng(head_size)
    key, value = precision.split("/")
    shape = layer(terms, head_size=head_size, window=window)
    cache = Cache(shape, key=key, value=value, group_size=16, isa=isa)
    plain = Cache(shape[:5], key=key, value=value, group_size=16, isa=isa)
    spans: list[Span] = [
        (cache.new(rng, 30), 0, 1, 29),
        (cache.new(rng, 150), 1, 20, 130),
        (cache.new(rng, 1500), 21, 2, 1498),
    ]
    q = gaussian(rng, 23, 6 * head_size)
    expected = cache.attention(0, spans, q)
    quantised = "u" in key and "u" in value
    rounding = cache.rounding(0, spans, q) if quantised else 0
    assert_close(cache.store.attend(0, spans, q), expected, rounding)
    cache.layers = plain.layers
    assert np.abs(cache.attention(0, spans, q) - expected).max() > 20 * (1e-4 + rounding)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("staged_as", [None, "f32", "bf16"])
@pytest.mark.parametrize(("terms", "how"), covering(list(TERMS), ["mean", "max", "sum_squares"]))
def test_scores_equal_the_reference(isa: str, terms: str, how: str, staged_as: str | None) -> None:
    rng = np.random.default_rng(4)
    cache = Cache(layer(terms, window=90), isa=isa)
    prompt = keys_values(rng, 111, 2 * 64)
    seq = cache.store.create()
    if staged_as:
        cache.attach_prefill(seq, [prompt], staged_as)
    else:
        assert cache.store.reserve(seq, 111)
        cache.store.append(seq, 0, *prompt, 0)
    q, at = gaussian(rng, 11, 6 * 64), np.arange(100, 111, dtype=np.int32)
    got = cache.store.scores(seq, 0, q, at, how)
    if staged_as:
        cache.store.commit_prefill(seq)
        other = Cache(layer(terms, window=90), key=staged_as, value=staged_as, recent=staged_as, isa=isa)
        kept = other.store.create()
        other.attach_prefill(kept, [prompt], staged_as)
        other.store.commit_prefill(kept)
        expected = other.scores(kept, 0, q, at, how)
    else:
        expected = cache.scores(seq, 0, q, at, how)
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("terms", "staged_as", "window"), covering(["cap", "all"], ["f32", "bf16"], [0, 45]))
def test_prompts_of_capped_layers_are_read_in_pieces(isa: str, terms: str, staged_as: str, window: int) -> None:
    """PagedAttention has no cap: with any instruction set they go through the store's own blocks."""
    prompt = Prompt(isa, layer(terms, window=window), 150, staged_as)
    has_kernel = staged_as == "bf16" and isa in PREFILL_ISAS
    rounding = PREFILL_BOUND * float(np.abs(prompt.v).max()) if has_kernel else 0
    assert_close(prompt.read([70, 71, 150]), prompt.expected(), rounding)


@pytest.mark.parametrize("isa", PREFILL_ISAS)
@pytest.mark.parametrize(
    ("terms", "head_size", "num_kv_heads", "window"),
    covering(["cap", "alibi", "sinks", "all", "steep"], [32, 64, 256], [1, 2, 6], [0, 45, 200]),
)
def test_kernels_of_prompts_have_all_terms(
    isa: str, terms: str, head_size: int, num_kv_heads: int, window: int
) -> None:
    """In pieces or at once, bit by bit; a term that is left out would be seen."""
    shape = layer(terms, num_kv_heads=num_kv_heads, head_size=head_size, window=window)
    assert native.can_prefill([shape], "bf16", isa)
    prompt = Prompt(isa, shape, 400, "bf16")
    got, expected = prompt.read([400]), prompt.expected()
    bound = PREFILL_BOUND * float(np.abs(prompt.v).max())
    np.testing.assert_allclose(got, expected, rtol=0, atol=bound)
    prompt.cache.layers = Cache(shape[:5]).layers
    assert np.abs(prompt.expected() - expected).max() > 5 * bound
    np.testing.assert_array_equal(Prompt(isa, shape, 400, "bf16").read([70, 71, 130, 400]), got)


@pytest.mark.parametrize("isa", PREFILL_ISAS)
@pytest.mark.parametrize("sink", [-1e30, -1e4, 1e4, 1e30])
def test_sinks_of_prompts_take_all_or_nothing(isa: str, sink: float) -> None:
    shape = (2, 1, 32, 0, 0.2)
    plain, prompt = Prompt(isa, shape, 40, "bf16"), Prompt(isa, (*shape, 0.0, (), (sink, sink)), 40, "bf16")
    np.testing.assert_array_equal(prompt.read([40]), plain.read([40]) if sink < 0 else np.zeros((40, 64)))


def test_capped_prompts_are_not_for_paged_attention() -> None:
    for isa in ISAS:
        for staging in ("f32", "bf16"):
            assert native.can_prefill([layer("cap"), layer("all")], staging, isa)
            for terms in ("alibi", "sinks"):
                has_kernel = staging == "bf16" and isa in PREFILL_ISAS
                assert native.can_prefill([layer(terms)], staging, isa) == has_kernel


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ((-1.0, (), ()), "soft_cap must be 0, or finite"),
        ((float("nan"), (), ()), "soft_cap must be 0, or finite"),
        ((0.0, (1.0,), ()), "slopes must be none, or one for each of 2 heads"),
        ((0.0, (), (1.0, 2.0, 3.0)), "sinks must be none, or one for each of 2 heads"),
        ((0.0, (1.0, float("inf")), ()), "slopes must be finite"),
        ((0.0, (), (float("nan"), 0.0)), "sinks must be finite"),
    ],
)
def test_wrong_terms_are_refused(terms: tuple[float, tuple[float, ...], tuple[float, ...]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Cache((2, 1, 32, 0, 0.2, *terms))


def test_a_sink_takes_what_tokens_do_not_get() -> None:
    """A sink far above all scores leaves nothing, one far below changes nothing."""
    rng = np.random.default_rng(0)
    q, outputs = gaussian(rng, 1, 64), []
    for sink in (-1e4, 1e4):
        cache = Cache((2, 1, 32, 0, 0.2, 0.0, (), (sink, sink)), key="f32", value="f32", recent="f32")
        seq = stage_random(cache, np.random.default_rng(1), 40)
        cache.store.commit_prefill(seq)
        outputs.append(cache.store.attend(0, [(seq, 0, 1, 39)], q))
    assert (outputs[1] == 0).all()
    assert np.abs(outputs[0]).max() > 0.1
