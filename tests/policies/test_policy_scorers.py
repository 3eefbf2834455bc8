"""Scorers: each equals a slow, obvious one, whatever the shapes and numbers; bad settings are refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, fields
from itertools import product
from typing import Any

import numpy as np
import pytest
from covering import covering, rarely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from policy_states import POLICIES, Row

from ov_kvcrush.errors import CrushError
from ov_kvcrush.policies.base import HeadState, LayerState, Scorer
from ov_kvcrush.policies.registry import build
from ov_kvcrush.policies.scorers.expected_attention import ExpectedAttention
from ov_kvcrush.policies.scorers.h2o import H2O
from ov_kvcrush.policies.scorers.keydiff import KeyDiff
from ov_kvcrush.policies.scorers.knorm import Knorm
from ov_kvcrush.policies.scorers.kvzip import KVzip
from ov_kvcrush.policies.scorers.random_scores import Random
from ov_kvcrush.policies.scorers.snapkv import SnapKV, pool
from ov_kvcrush.policies.scorers.streaming_llm import StreamingLLM
from ov_kvcrush.policies.scorers.tova import TOVA
from ov_kvcrush.policies.top_scores import Scored

SCORERS = [SnapKV(), H2O(), TOVA(), StreamingLLM(), Knorm(), KeyDiff(), ExpectedAttention(), Random(), KVzip()]
ALL = pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: scorer.name)

D = 8
Slow = Callable[[LayerState], list[list[float]]]


@dataclass(frozen=True)
class Case:
    """A layer to score: cached tokens of each KV head, what their numbers are like, and tokens of the text."""

    sizes: tuple[int, ...]
    kind: str
    length: int = 60
    groups: int = 3
    rows: int = 10

    def __str__(self) -> str:
        return f"{self.kind}-{'x'.join(map(str, self.sizes))}"


KINDS = ["random", "ties", "constant", "zero", "one head dominates", "one token dominates", "large"]
SIZES = [(0,), (1,), (2,), (3, 3), (40, 40), (60, 60), (0, 7, 33), (4, 1)]
CASES = [Case(sizes, kind) for sizes in SIZES for kind in KINDS]
# By default every kind of numbers comes in heads of different sizes, and every size with random numbers.
COVERING = [case for case in CASES if case.sizes == (0, 7, 33) or case.kind == "random"]
REST = [case for case in CASES if case not in COVERING]
EVERY_CASE = pytest.mark.parametrize("case", [*COVERING, *rarely(*REST)], ids=str)


def with_cases(*values: Any) -> list[Any]:
    """Every case with every value: by default the covering cases, with a value each and no value left out."""
    return [*covering(COVERING, values), *rarely(*product(REST, values))]


def numbers(rng: np.random.Generator, kind: str, *shape: int) -> np.ndarray:
    """float32 of the shape; tokens are its next to last axis."""
    x = rng.normal(size=shape)
    if kind == "ties":
        x = np.round(x)
    elif kind == "constant":
        x[:] = rng.normal(size=shape[-1])
    elif kind == "zero":
        x[:] = 0
    elif kind == "one token dominates" and shape[-2]:
        x[..., shape[-2] // 2, :] *= 100
    elif kind == "large":
        x *= 30
    return x.astype(np.float32)


def layer_of(case: Case, *, state: bool = False) -> LayerState:
    """The layer of a case. What a head carries is not 0 for all tokens but the newest 5."""
    rng = np.random.default_rng(3)
    heads = []
    for k, size in enumerate(case.sizes):
        positions = np.sort(rng.choice(case.length, size, replace=False)).astype(np.int32)
        logits = numbers(rng, case.kind, case.groups, size, 1)[..., 0]
        attention = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-1e9))
        attention /= np.maximum(attention.sum(axis=1, keepdims=True), 1e-30)
        if case.kind == "zero":
            attention[:] = 0
        if case.kind == "one head dominates":
            attention *= 1000.0 ** (-k)
        seen = rng.random(size) + 0.1
        seen[max(0, size - 5) :] = 0
        heads.append(
            HeadState(
                positions=positions,
                attention=attention.astype(np.float32),
                keys=numbers(rng, case.kind, size, D),
                values=numbers(rng, case.kind, size, D),
                queries=numbers(rng, case.kind, case.rows, case.groups * D).reshape(case.rows, case.groups, D),
                state=seen.astype(np.float32) if state else np.zeros(size, np.float32),
                replayed=attention[:, ::-1].astype(np.float32),
            )
        )
    return tuple(heads)


def assert_scores(got: list[np.ndarray], expected: list[list[float]], rtol: float = 2e-5, atol: float = 1e-30) -> None:
    assert len(got) == len(expected)
    for mine, slow in zip(got, expected, strict=True):
        assert mine.dtype == np.float32
        assert mine.shape == (len(slow),)
        np.testing.assert_allclose(mine, np.array(slow), rtol=rtol, atol=atol)


# -- every scorer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scorer", "case"), [*covering(SCORERS, COVERING), *rarely(*product(SCORERS, REST))], ids=str)
def test_scores_are_finite_float32_one_a_token_and_the_same_again(scorer: Scorer, case: Case) -> None:
    layer = layer_of(case, state=True)
    before = copy.deepcopy(layer)
    scores = scorer.score(layer, 1, case.length)
    again = scorer.score(layer, 1, case.length)
    assert [s.shape for s in scores] == [(size,) for size in case.sizes]
    for one, two in zip(scores, again, strict=True):
        assert one.dtype == np.float32
        assert np.isfinite(one).all()
        np.testing.assert_array_equal(one, two)
    for head, old in zip(layer, before, strict=True):
        for f in fields(HeadState):
            np.testing.assert_array_equal(getattr(head, f.name), getattr(old, f.name))


@ALL
def test_what_was_not_asked_for_is_not_looked_at(scorer: Scorer) -> None:
    case = Case((40, 33), "random")
    inputs = scorer.inputs
    wanted = {
        "positions": True,
        "attention": inputs.window > 0,
        "keys": inputs.keys,
        "values": inputs.values,
        "queries": inputs.queries,
        "state": inputs.state,
        "replayed": inputs.replay is not None,
    }
    full = layer_of(case, state=True)
    bare = tuple(HeadState(**{n: getattr(h, n) if on else None for n, on in wanted.items()}) for h in full)
    for one, two in zip(scorer.score(full, 0, 60), scorer.score(bare, 0, 60), strict=True):
        np.testing.assert_array_equal(one, two)


@ALL
def test_only_scorers_that_keep_state_update(scorer: Scorer) -> None:
    updated = scorer.update(layer_of(Case((7, 3), "random")), 0, 60)
    assert (updated is not None) == scorer.inputs.state


@pytest.mark.parametrize("scorer", [Knorm(), KeyDiff()], ids=lambda scorer: scorer.name)
@pytest.mark.parametrize("size", [1e-30, 1e18, 1e30])
def test_keys_of_any_size_score_finite(scorer: Scorer, size: float) -> None:
    keys = np.full((4, D), size, np.float32)
    keys[1] *= -1
    keys[2] = 0
    assert np.isfinite(scorer.score((HeadState(np.arange(4, dtype=np.int32), keys=keys),), 0, 4)[0]).all()


def test_settings_are_frozen() -> None:
    for scorer in SCORERS:
        with pytest.raises(FrozenInstanceError):
            scorer.window = 3  # type: ignore[attr-defined]


BAD: list[tuple[type[Scorer], dict[str, Any], str]] = [
    (SnapKV, {"window": 0}, "window must be an integer of at least 1, got 0"),
    (SnapKV, {"window": 2.5}, "window must be an integer of at least 1, got 2.5"),
    (SnapKV, {"kernel": 0}, "kernel must be an integer of at least 1, got 0"),
    (SnapKV, {"kernel": 4}, "kernel must be odd, got 4"),
    (SnapKV, {"kernel": True}, "kernel must be an integer of at least 1, got True"),
    (SnapKV, {"pooling": "agv"}, r"pooling must be one of avg, max, none, got 'agv' \(did you mean 'avg'\?\)"),
    (SnapKV, {"aggregate": "median"}, "aggregate must be one of mean, max, sum, got 'median'"),
    (SnapKV, {"reduce": "sum"}, "reduce must be one of mean, max, sum_squares, got 'sum'"),
    (H2O, {"window": -1}, "window must be an integer of at least 1, got -1"),
    (ExpectedAttention, {"window": "64"}, "window must be an integer of at least 1, got '64'"),
    (Random, {"seed": -1}, "seed must be an integer of at least 0, got -1"),
]


@pytest.mark.parametrize(("scorer", "options", "message"), BAD)
def test_bad_fields_are_refused_with_field_rule_and_value(
    scorer: type[Scorer], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CrushError, match=message):
        scorer(**options)


@pytest.mark.parametrize(
    ("row", "case"),
    [
        pytest.param(row, case, marks=() if case in COVERING else pytest.mark.exhaustive, id=f"{row.name}-{case}")
        for row in POLICIES
        if row.slow
        for case in CASES
    ],
)
def test_equals_the_slow_twin_of_its_row(row: Row, case: Case) -> None:
    layer = layer_of(case)
    assert row.slow is not None
    policy = build(row.name)
    assert isinstance(policy, Scored)
    expected = [row.slow(head) for head in layer]
    # Cosines near 0 are differences of larger numbers: what rounding leaves of them is absolute.
    assert_scores(policy.scorer.score(layer, 0, case.length), expected, atol=1e-6 if row.name == "keydiff" else 1e-30)


# -- SnapKV ------------------------------------------------------------------------------------------------------------


def slow_pool(x: list[float], pooling: str, kernel: int) -> list[float]:
    if pooling == "none":
        return x
    pooled = []
    for i in range(len(x)):
        near = [x[j] for j in range(i - kernel // 2, i + kernel // 2 + 1) if 0 <= j < len(x)]
        pooled.append(sum(near) / kernel if pooling == "avg" else max(near))
    return pooled


def slow_snapkv(layer: LayerState, aggregate: str, pooling: str, kernel: int) -> list[list[float]]:
    scores = []
    for head in layer:
        column = []
        for s in range(len(head)):
            seen = [float(row[s]) for row in head.attention]
            column.append({"mean": sum(seen) / len(seen), "max": max(seen), "sum": sum(seen)}[aggregate])
        scores.append(slow_pool(column, pooling, kernel))
    return scores


@pytest.mark.parametrize(
    ("case", "options"),
    with_cases(*product(["avg", "max", "none"], [1, 5, 63], ["mean", "max", "sum"])),
    ids=str,
)
def test_snapkv_equals_slow(case: Case, options: tuple[str, int, str]) -> None:
    pooling, kernel, aggregate = options
    layer = layer_of(case)
    got = SnapKV(pooling=pooling, kernel=kernel, aggregate=aggregate).score(layer, 0, case.length)
    assert_scores(got, slow_snapkv(layer, aggregate, pooling, kernel))


def test_snapkv_asks_for_what_it_was_told() -> None:
    inputs = SnapKV(window=7, reduce="sum_squares").inputs
    assert (inputs.window, inputs.reduce, inputs.keys, inputs.state) == (7, "sum_squares", False, False)


@settings(deadline=None)
@given(
    x=hnp.arrays(np.float32, st.integers(0, 40), elements=st.integers(-50, 50).map(float)),
    pooling=st.sampled_from(["avg", "max", "none"]),
    half=st.integers(0, 25),
)
def test_pool_equals_slow_exactly_on_small_integers(x: np.ndarray, pooling: str, half: int) -> None:
    kernel = 2 * half + 1
    got = pool(x, pooling, kernel)
    slow = slow_pool(x.tolist(), pooling, kernel)
    np.testing.assert_array_equal(got, np.array(slow, np.float64).astype(np.float32))


@settings(deadline=None)
@given(
    x=hnp.arrays(np.float32, 9, elements=st.floats(0, 1, width=32)),
    before=st.integers(0, 9),
    pooling=st.sampled_from(["avg", "max"]),
)
def test_equal_neighbourhoods_pool_to_equal_scores(x: np.ndarray, before: int, pooling: str) -> None:
    line = np.concatenate([np.full(before, 1e6, np.float32), x, np.full(3, 7, np.float32), x])
    pooled = pool(line, pooling, 5)
    np.testing.assert_array_equal(pooled[before + 2 : before + 7], pooled[before + 14 : before + 19])


# -- H2O ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "options"), with_cases(*product([False, True], [1, 4, 100])), ids=str)
def test_h2o_equals_slow(case: Case, options: tuple[bool, int]) -> None:
    state, window = options
    layer = layer_of(case, state=state)
    expected = []
    for head in layer:
        new = sum(1 for c in head.state if c == 0)
        sums = []
        for s in range(len(head)):
            mean = sum(float(row[s]) for row in head.attention) / len(head.attention)
            sums.append(float(head.state[s]) + mean * min(window, new))
        expected.append(sums)
    scorer = H2O(window=window)
    assert_scores(scorer.score(layer, 0, case.length), expected)
    assert_scores(scorer.update(layer, 0, case.length), expected)


def causal(rng: np.random.Generator, groups: int, length: int) -> np.ndarray:
    """Attention float64 (G, length, length) of each row over the tokens up to it."""
    x = np.exp(2 * rng.normal(size=(groups, length, length))) * np.tri(length)
    return x / x.sum(axis=2, keepdims=True)


def h2o_sums(scorer: H2O, full: np.ndarray, moments: list[int]) -> np.ndarray:
    """What H2O carries after choices at these lengths, if nothing is ever dropped."""
    state = np.zeros(0, np.float32)
    for length in moments:
        state = np.concatenate([state, np.zeros(length - len(state), np.float32)])
        attention = full[:, max(0, length - scorer.window) : length, :length].mean(axis=1).astype(np.float32)
        head = HeadState(np.arange(length, dtype=np.int32), attention, state=state)
        (state,) = scorer.update((head,), 0, length)
    return state


def test_h2o_with_a_window_of_the_prompt_is_the_papers_sum() -> None:
    full = causal(np.random.default_rng(1), 3, 50)
    state = h2o_sums(H2O(window=50), full, [50])
    expected = [sum(full[g, r, s] for g in range(3) for r in range(50)) / 3 for s in range(50)]
    np.testing.assert_allclose(state, expected, rtol=1e-5)


def test_h2o_with_windows_that_touch_is_the_papers_sum() -> None:
    full = causal(np.random.default_rng(2), 2, 64)
    state = h2o_sums(H2O(window=16), full, [16, 32, 40 + 8, 64])
    np.testing.assert_allclose(state, full.sum(axis=1).mean(axis=0), rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(window=st.integers(1, 40), steps=st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_h2o_counts_each_new_row_once_and_at_most_the_window(window: int, steps: list[int]) -> None:
    """The attention of a row sums to 1, so the sums tell how many rows were counted."""
    moments = np.cumsum(steps).tolist()
    full = causal(np.random.default_rng(7), 2, moments[-1])
    state = h2o_sums(H2O(window=window), full, moments)
    assert state.sum() == pytest.approx(sum(min(window, step) for step in steps), rel=1e-4)


def test_h2o_remembers_that_it_saw_a_token_nothing_looked_at() -> None:
    scorer = H2O(window=8)
    positions = np.arange(8, dtype=np.int32)
    attention = np.zeros((2, 8), np.float32)
    attention[:, 0] = 1
    (state,) = scorer.update((HeadState(positions, attention, state=np.zeros(8, np.float32)),), 0, 8)
    assert (state > 0).all()
    (again,) = scorer.update((HeadState(positions, attention, state=state),), 0, 8)
    np.testing.assert_array_equal(again, state)  # no token since then, so no row to count


# -- TOVA --------------------------------------------------------------------------------------------------------------


def slow_tova(layer: LayerState) -> list[list[float]]:
    scores = []
    for head in layer:
        line = []
        for p in head.positions:
            means = []
            for other in layer:
                for s in range(len(other)):
                    if other.positions[s] == p:
                        means.append(sum(float(row[s]) for row in other.attention) / len(other.attention))
            line.append(sum(means) / len(means))
        scores.append(line)
    return scores


@EVERY_CASE
def test_tova_equals_slow(case: Case) -> None:
    layer = layer_of(case)
    assert_scores(TOVA().score(layer, 0, case.length), slow_tova(layer))


def test_tova_looks_at_one_row_and_gives_a_token_one_score_in_all_heads() -> None:
    assert TOVA().inputs.window == 1
    one, two = TOVA().score(layer_of(Case((60, 60), "random")), 0, 60)
    np.testing.assert_array_equal(one, two)


# -- KVzip -------------------------------------------------------------------------------------------------------------


def test_kvzip_asks_for_the_reading_that_it_was_told() -> None:
    inputs = KVzip(chunk=64, sees="all").inputs
    assert inputs.replay is not None
    assert (inputs.replay.chunk, inputs.replay.sees, inputs.window, inputs.state) == (64, "all", 0, False)


# -- without attention -------------------------------------------------------------------------------------------------


def test_keydiff_keeps_the_key_that_points_elsewhere() -> None:
    keys = np.ones((9, D), np.float32)
    keys[4] = [-1, 1] * (D // 2)
    keys[7] *= 50  # longer, same direction
    head = HeadState(np.arange(9, dtype=np.int32), keys=keys)
    (scores,) = KeyDiff().score((head,), 0, 9)
    assert scores.argmax() == 4
    assert scores[7] == pytest.approx(scores[0])


# -- expected attention ------------------------------------------------------------------------------------------------


def slow_expected(head: HeadState, window: int) -> list[float]:
    assert head.queries is not None
    queries = head.queries[-window:].astype(np.float64)
    rows, groups, size = queries.shape
    total = [0.0] * len(head)
    for g in range(groups):
        mean = [sum(queries[w, g, i] for w in range(rows)) / rows for i in range(size)]
        covariance = np.zeros((size, size))
        for w in range(rows):
            for i in range(size):
                for j in range(size):
                    covariance[i, j] += (queries[w, g, i] - mean[i]) * (queries[w, g, j] - mean[j]) / rows
        logits = []
        for key in head.keys.astype(np.float64):
            linear = sum(mean[i] * key[i] for i in range(size)) / math.sqrt(size)
            logits.append(linear + key @ covariance @ key / (2 * size))
        weights = [math.exp(x - max(logits)) for x in logits]
        for s, weight in enumerate(weights):
            total[s] += weight / sum(weights) / groups
    return [t * math.sqrt(sum(float(x) ** 2 for x in value)) for t, value in zip(total, head.values, strict=True)]


@pytest.mark.parametrize(("case", "window"), with_cases(1, 10), ids=str)
def test_expected_attention_equals_slow(case: Case, window: int) -> None:
    layer = layer_of(case)
    expected = [slow_expected(head, window) for head in layer]
    # Logits of large keys have absolute errors of single precision, which the exponential makes relative ones.
    rtol = {"large": 5e-2, "one token dominates": 5e-2}.get(case.kind, 1e-4)
    assert_scores(ExpectedAttention(window=window).score(layer, 0, case.length), expected, rtol)


def test_expected_attention_of_many_keys_does_not_depend_on_blocks() -> None:
    rng = np.random.default_rng(4)
    size = 2500
    keys, values = numbers(rng, "random", size, D), numbers(rng, "random", size, D)
    head = HeadState(np.arange(size, dtype=np.int32), keys=keys, values=values, queries=numbers(rng, "random", 5, 2, D))
    queries = head.queries.astype(np.float64)
    expected = np.zeros(size)
    for g in range(2):
        covariance = np.cov(queries[:, g].T, bias=True)
        logits = keys @ queries[:, g].mean(axis=0) / math.sqrt(D) + ((keys @ covariance) * keys).sum(axis=1) / (2 * D)
        expected += np.exp(logits) / np.exp(logits).sum() / 2
    expected *= np.linalg.norm(values, axis=1)
    (got,) = ExpectedAttention().score((head,), 0, size)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_expected_attention_without_spread_is_softmax_of_the_query() -> None:
    case = Case((33,), "random", rows=1)
    (head,) = layer_of(case)
    weights = np.exp(np.einsum("sd,gd->gs", head.keys, head.queries[0]) / math.sqrt(D))
    weights /= weights.sum(axis=1, keepdims=True)
    (got,) = ExpectedAttention().score((head,), 0, case.length)
    np.testing.assert_allclose(got, weights.mean(axis=0) * np.linalg.norm(head.values, axis=1), rtol=1e-4)


# -- random ------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(seed=st.integers(0, 2**80), layer=st.integers(0, 90), later=st.integers(0, 50), data=st.data())
def test_random_scores_of_a_token_never_change(seed: int, layer: int, later: int, data: st.DataObject) -> None:
    kept = data.draw(st.lists(st.integers(0, 39), unique=True).map(sorted))
    whole = HeadState(np.arange(40, dtype=np.int32))
    rest = HeadState(np.array([*kept, *range(40, 40 + later)], np.int32))
    first = Random(seed=seed).score((whole, whole), layer, 40)
    second = Random(seed=seed).score((rest, rest), layer, 40 + later)
    for one, two in zip(first, second, strict=True):
        np.testing.assert_array_equal(two[: len(kept)], one[kept])


def test_random_scores_differ_by_seed_layer_head_and_token() -> None:
    head = HeadState(np.arange(1000, dtype=np.int32))
    lines = [s for seed in (0, 1) for layer in (0, 1) for s in Random(seed=seed).score((head, head), layer, 1000)]
    together = np.corrcoef(lines) - np.eye(len(lines))
    assert np.abs(together).max() < 0.2
    for line in lines:
        assert 0 <= line.min() < 0.02
        assert 0.98 < line.max() < 1
