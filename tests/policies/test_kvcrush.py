"""KVCrush: the whole equals a slow, obvious one; its pages can be openvino_genai's."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
from covering import covering
from hypothesis import given, settings
from hypothesis import strategies as st
from kvcrush_genai import GenaiConfig, GenaiEviction, mersenne_twister
from kvcrush_slow import SlowLayer
from policy_states import KINDS, cache_state

from ov_kvcrush.errors import CrushError
from ov_kvcrush.policies.base import Budget, CacheState, HeadState, Inputs, LayerState, Scorer, Selection
from ov_kvcrush.policies.budgets.uniform import Uniform
from ov_kvcrush.policies.kvcrush import bits as kvcrush_bits
from ov_kvcrush.policies.kvcrush import buckets as kvcrush_buckets
from ov_kvcrush.policies.kvcrush.policy import KVCrush
from ov_kvcrush.policies.registry import ALLOCATORS
from ov_kvcrush.policies.scorers.h2o import H2O
from ov_kvcrush.policies.scorers.knorm import Knorm
from ov_kvcrush.policies.scorers.snapkv import SnapKV
from ov_kvcrush.policies.top_scores import TopScores

MANY = settings(max_examples=150, deadline=None, derandomize=True)
ANCHORS = st.sampled_from(kvcrush_bits.ANCHORS)
# The parts of attention are multiples of 1/64, so that every sum is exact, in whatever order it is taken.
PATTERNS = ("random", "ties", "constant", "one head dominates", "one token dominates", "zeros")


@dataclass(frozen=True)
class Summed(Scorer):
    """Attention summed over the query heads: a host of exact scores."""

    name = "summed"

    @property
    def inputs(self) -> Inputs:
        return Inputs(window=4)

    def score(self, layer: LayerState, index: int, length: int) -> list[np.ndarray]:
        return [head.attention.sum(axis=0) for head in layer if head.attention is not None]


def attention(rng: np.random.Generator, pattern: str, groups: int, tokens: int, head: int) -> np.ndarray:
    """float32 (groups, tokens)"""
    drawn = rng.integers(0, 2 if pattern == "ties" else 4096, (groups, tokens))
    if pattern == "constant":
        drawn[:] = 3
    if pattern == "zeros":
        drawn[:] = 0
    if pattern == "one head dominates" and head == 0:
        drawn *= 1024
    if pattern == "one token dominates" and tokens:
        drawn[:, tokens // 2] = 10**6
    return (drawn / 64).astype(np.float32)


def cache(seed: int, pattern: str, protected: np.ndarray, layers: int, answering: bool) -> CacheState:
    """answering: every head of 2 lacks other tokens."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(layers):
        heads = []
        for k in range(2):
            stays = protected | (rng.random(len(protected)) < (rng.random() if answering else 1))
            positions = np.flatnonzero(stays).astype(np.int32)
            heads.append(HeadState(positions, attention(rng, pattern, 3, len(positions), k)))
        made.append(tuple(heads))
    return CacheState(tuple(made), len(protected), protected)


def policy(**options: Any) -> KVCrush:
    return KVCrush(Budget(min_tokens=8), sink_tokens=2, recent_tokens=4, **{"scorer": Summed(), **options})


def in_text(state: CacheState, kept: list[list[np.ndarray]]) -> list[list[list[int]]]:
    return [
        [head.positions[indices].tolist() for head, indices in zip(layer, of_layer, strict=True)]
        for layer, of_layer in zip(state.layers, kept, strict=True)
    ]


def in_text_both(state: CacheState, selection: Selection) -> list[Any]:
    """[layer] places that each head keeps, and its representatives."""
    assert selection.representatives is not None
    return list(zip(in_text(state, selection.kept), in_text(state, selection.representatives), strict=True))


def slow_select(crush: KVCrush, state: CacheState, tokens: int) -> list[Any]:
    scores = [crush.scorer.score(layer, index, state.length) for index, layer in enumerate(state.layers)]
    counts = crush.allocator.allocate(state, scores, tokens)
    return [SlowLayer(crush, state, i, scores[i], counts[i]).choose() for i in range(len(state.layers))]


# The whole


@st.composite
def cases(draw: st.DrawFn) -> tuple[CacheState, int]:
    length = draw(st.integers(8, 70))
    protected = policy().protected(length, [(begin := draw(st.integers(0, length)), min(length, begin + 3))])
    state = cache(draw(st.integers(0, 2**20)), draw(st.sampled_from(PATTERNS)), protected, 2, draw(st.booleans()))
    return state, draw(st.integers(1, length))


OPTIONS = st.fixed_dictionaries(
    {
        "threshold": st.sampled_from(kvcrush_bits.THRESHOLDS),
        "quantile": st.sampled_from([0.0, 0.3, 0.9, 1.0]),
        "topk": st.integers(1, 20),
        "anchor": ANCHORS,
        "seed": st.integers(0, 3),
        "num_anchors": st.integers(1, 3),
        "representative": st.sampled_from(kvcrush_buckets.REPRESENTATIVES),
        "neighbourhoods": st.sampled_from([1, 1, 4]),
        "share": st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]),
        "share_mode": st.sampled_from(["static", "adaptive"]),
        "mass": st.sampled_from([0.1, 0.5, 0.9, 1.0]),
        "bits": st.sampled_from(["attention", "scores"]),
        "allocator": st.sampled_from([cls() for cls in ALLOCATORS.values()]),
    }
)


@settings(MANY, max_examples=300)
@given(case=cases(), options=OPTIONS)
def test_select_equals_the_slow_one(case: tuple[CacheState, int], options: dict[str, Any]) -> None:
    state, tokens = case
    crush = policy(**options)
    assert in_text_both(state, crush.select(state, tokens)) == slow_select(crush, state, tokens)


@settings(MANY, max_examples=200)
@given(case=cases(), options=OPTIONS, page=st.sampled_from([1, 4, 8, 32]))
def test_select_of_pages_equals_the_slow_one(case: tuple[CacheState, int], options: dict[str, Any], page: int) -> None:
    state, tokens = case
    crush = policy(**options, page=page)
    assert in_text_both(state, crush.select(state, tokens)) == slow_select(crush, state, tokens)


@pytest.mark.parametrize("pattern", ["random", "ties"])
def test_pages_of_one_token_are_tokens(pattern: str) -> None:
    state = cache(5, pattern, policy().protected(400), 3, answering=False)
    tokens, pages = policy(), policy(page=1)
    assert in_text_both(state, tokens.select(state, 100)) == in_text_both(state, pages.select(state, 100))


@pytest.mark.parametrize(
    ("kind_and_options", "allocator", "answering"),
    covering(
        product(KINDS, [{}, {"page": 16}, {"page": 16, "page_rule": "genai"}]),
        [*ALLOCATORS, "uniform"],  # 7: each comes with every kind
        [False, True],
    ),
)
def test_the_budget_is_met(kind_and_options: tuple[str, dict[str, Any]], allocator: str, answering: bool) -> None:
    kind, options = kind_and_options
    crush = policy(scorer=SnapKV(), allocator=ALLOCATORS[allocator](), **options)
    state = cache_state(9, crush.inputs, kind, crush.protected(300, [(40, 60)]), (2, 2, 3), answering=answering)
    cached = [len(head) for layer in state.layers for head in layer]
    protected = sum(int(state.is_protected(head).sum()) for layer in state.layers for head in layer)
    for tokens in (1, 26, 27, 50, 131, 299, 300):
        kept = [len(indices) for layer in crush.select(state, tokens).kept for indices in layer]
        assert sum(kept) == max(protected, min(sum(cached), tokens * len(cached)))


@pytest.mark.parametrize(
    ("allocator", "options"),
    covering(ALLOCATORS, [{}, {"page": 8}, {"page": 8, "page_rule": "genai"}, {"bits": "scores"}]),
)
def test_at_the_prompt_s_end_all_heads_of_a_layer_have_the_same_representatives(
    options: dict[str, Any], allocator: str
) -> None:
    crush = policy(scorer=SnapKV(), allocator=ALLOCATORS[allocator](), **options)
    state = cache_state(4, crush.inputs, "random", crush.protected(500), (2, 3), answering=False)
    selection = crush.select(state, 125)
    assert selection.representatives is not None
    for layer in selection.representatives:
        assert all(np.array_equal(layer[0], head) for head in layer)
    if allocator == "uniform":
        size = options.get("page", 1)
        assert {len(layer[0]) for layer in selection.representatives} == {31 // size * size}


def test_representatives_are_of_different_kinds() -> None:
    """The host drops two kinds of tokens: each gets one."""
    protected = np.zeros(40, bool)
    weights = np.zeros((4, 40), np.float32)
    weights[:, :10] = 9  # the host's choice
    weights[:2, 10:25] = 1  # what only the first two heads look at
    weights[2:, 25:40] = 1
    head = HeadState(np.arange(40, dtype=np.int32), weights)
    crush = policy(share=2 / 12, threshold="quantile", quantile=0.3)
    selection = crush.select(CacheState(((head,),), 40, protected), 12)
    assert selection.representatives is not None
    assert selection.representatives[0][0].tolist() == [10, 25]
    assert selection.kept[0][0].tolist() == [*range(10), 10, 25]


@pytest.mark.parametrize(("pattern", "answering"), covering(PATTERNS, [False, True]))
def test_without_a_share_it_is_its_host(pattern: str, answering: bool) -> None:
    crush = policy(scorer=SnapKV(), share=0)
    host = TopScores(crush.budget, 2, 4, scorer=SnapKV(), allocator=Uniform())
    state = cache(1, pattern, crush.protected(200), 3, answering)
    assert in_text(state, crush.select(state, 60).kept) == in_text(state, host.select(state, 60).kept)


# openvino_genai's rules


def test_the_transcription_s_random_numbers_are_those_of_the_c_plus_plus_standard() -> None:
    twister = mersenne_twister(5489)
    assert [twister.getrandbits(32) for _ in range(10000)][-1] == 4123659995


@st.composite
def genai_cases(draw: st.DrawFn) -> tuple[GenaiConfig, CacheState]:
    size = draw(st.sampled_from([4, 8, 16, 32]))
    evicted, evictable = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    config = GenaiConfig(
        block_size=size,
        start_size=size * draw(st.integers(1, 2)),
        evictable_size=size * evictable,
        recent_size=max(8, size) * draw(st.integers(1, 2)),
        budget=draw(st.integers(0, evicted)),
        anchor=draw(st.sampled_from(["random", "zeros", "ones", "mean", "alternating"])),
        rng_seed=draw(st.integers(0, 2**32 - 1)),
    )
    length = config.start_size + config.evictable_size + evicted * size + config.recent_size
    rest = draw(st.integers(0, size - 1))  # of a block that is not full yet
    protected = np.zeros(length + rest, bool)
    protected[: config.start_size] = protected[length - config.recent_size :] = True
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    layers = []
    for _ in range(3):
        pattern = draw(st.sampled_from(PATTERNS))
        weights = [attention(rng, pattern, 2, length + rest, head) for head in range(2)]
        layers.append(tuple(HeadState(np.arange(length + rest, dtype=np.int32), row) for row in weights))
    return config, CacheState(tuple(layers), length + rest, protected)


@settings(MANY, max_examples=200)
@given(case=genai_cases(), bits=st.sampled_from(["attention", "scores"]))
def test_the_genai_rule_keeps_the_pages_that_openvino_genai_keeps(
    case: tuple[GenaiConfig, CacheState], bits: str
) -> None:
    config, state = case
    summed = [sum(head.attention.sum(axis=0) for head in layer).tolist() for layer in state.layers]
    evicted = GenaiEviction(config).evict_logical_blocks(summed)
    always, crushed = int(state.protected.sum()), config.budget * config.block_size
    tokens = always + config.evictable_size + crushed
    crush = KVCrush(
        Budget(kept_tokens=tokens),
        sink_tokens=config.start_size,
        recent_tokens=always - config.start_size,
        scorer=SnapKV(window=8, pooling="none"),
        share=crushed / tokens,
        anchor=config.anchor,
        seed=config.rng_seed,
        page=config.block_size,
        page_rule="genai",
        bits=bits,
    )
    selection = crush.select(state, tokens)
    for layer, gone in zip(in_text(state, selection.kept), evicted, strict=True):
        expected = [p for p in range(state.length) if p // config.block_size not in gone]
        assert layer == [expected, expected]


# Settings


def test_inputs_are_those_of_the_components_and_the_attention_of_the_bits() -> None:
    assert policy(scorer=SnapKV(window=8, reduce="max")).inputs == Inputs(window=8, reduce="max")
    assert policy(scorer=Knorm()).inputs == Knorm().inputs | Inputs(window=16)
    assert policy(scorer=Knorm(), bits="scores").inputs == Knorm().inputs
    assert policy(scorer=H2O()).inputs.state


def test_the_state_of_the_host_is_passed_on() -> None:
    crush = policy(scorer=H2O())
    state = cache_state(2, crush.inputs, "random", crush.protected(50), (2, 2), answering=True)
    seen = crush.update(state)
    assert seen is not None
    for index, layer in enumerate(state.layers):
        expected = crush.scorer.update(layer, index, state.length)
        assert expected is not None
        for one, two in zip(seen[index], expected, strict=True):
            np.testing.assert_array_equal(one, two)
    assert policy().update(state) is None


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"threshold": "medium"}, r"threshold must be one of .* got 'medium' \(did you mean 'median'\?\)"),
        ({"quantile": 1.5}, r"quantile must be a fraction in \[0, 1\], got 1.5"),
        ({"topk": 0}, "topk must be an integer of at least 1, got 0"),
        ({"anchor": "middle"}, "anchor must be one of"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"num_anchors": 0}, "num_anchors must be an integer of at least 1"),
        ({"representative": "first"}, "representative must be one of"),
        ({"neighbourhoods": 0}, "neighbourhoods must be an integer of at least 1"),
        ({"share": -0.1}, r"share must be a fraction in \[0, 1\]"),
        ({"share_mode": "dynamic"}, "share_mode must be one of static, adaptive"),
        ({"mass": 0}, r"mass must be a fraction in \(0, 1\]"),
        ({"page": -1}, "page must be an integer of at least 0"),
        ({"page_rule": "paper"}, "page_rule must be one of crush, genai"),
        ({"bits": "keys"}, "bits must be one of attention, scores"),
        ({"page_rule": "genai"}, 'page must be at least 1 with page_rule="genai", got 0'),
        ({"page_rule": "genai", "page": 32, "threshold": "mean"}, "threshold must be 'median' with page_rule"),
        ({"page_rule": "genai", "page": 32, "num_anchors": 2}, "num_anchors must be 1 with page_rule"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_option_is_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises(CrushError, match=error):
        policy(**options)
