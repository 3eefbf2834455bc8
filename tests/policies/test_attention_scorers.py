"""Scorers of attention: each equals a slow, obvious one, whatever its settings."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scorer_cases import EVERY_CASE, Case, D, assert_scores, layer_of, numbers, with_cases

from ov_kvcrush.policies.base import HeadState, LayerState
from ov_kvcrush.policies.scorers.expected_attention import ExpectedAttention
from ov_kvcrush.policies.scorers.h2o import H2O
from ov_kvcrush.policies.scorers.kvzip import KVzip
from ov_kvcrush.policies.scorers.snapkv import SnapKV, pool
from ov_kvcrush.policies.scorers.tova import TOVA

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


def test_h2o_s_state_tells_a_token_without_attention_from_a_new_one() -> None:
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
