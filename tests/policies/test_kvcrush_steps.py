"""KVCrush step by step: bits, distances, orders and picks equal slow, obvious ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from kvcrush_slow import anchors_of, bits_of, distance, majority, order_of, pick

from ov_kvcrush.policies.kvcrush import bits as kvcrush_bits
from ov_kvcrush.policies.kvcrush import buckets as kvcrush_buckets

MANY = settings(max_examples=150, deadline=None, derandomize=True)
ANCHORS = st.sampled_from(kvcrush_bits.ANCHORS)


@st.composite
def rows(draw: st.DrawFn) -> np.ndarray:
    shape = (draw(st.integers(1, 4)), draw(st.integers(0, 12)))
    few, any_float = st.sampled_from([0.0, 0.25, 1.0]), st.floats(-8, 8, width=16)
    return draw(arrays(np.float32, shape, elements=draw(st.sampled_from([few, any_float]))))


@st.composite
def signatures(draw: st.DrawFn, widest: int = 9) -> np.ndarray:
    return draw(arrays(bool, (draw(st.integers(1, widest)), draw(st.integers(1, 24)))))


def columns(bits: np.ndarray) -> list[list[int]]:
    return bits.T.astype(int).tolist()


@MANY
@given(values=rows(), rule=st.sampled_from(kvcrush_bits.THRESHOLDS), quantile=st.floats(0, 1), topk=st.integers(1, 13))
def test_bits_equal_the_slow_ones(values: np.ndarray, rule: str, quantile: float, topk: int) -> None:
    bits = kvcrush_bits.threshold_bits(values, rule, quantile, topk)
    assert bits.dtype == bool
    assert bits.astype(int).tolist() == [bits_of(row, rule, quantile, topk) for row in values.tolist()]


@pytest.mark.parametrize("n", [1, 2, 7, 8, 500])
def test_half_of_different_values_have_the_median_s_bit(n: int) -> None:
    values = np.random.default_rng(n).permutation(n).astype(np.float32)[None]
    assert kvcrush_bits.threshold_bits(values, "median").sum() == n // 2
    assert kvcrush_bits.threshold_bits(values, "topk", topk=min(3, n)).sum() == min(3, n)


@MANY
@given(bits=signatures(), data=st.data())
def test_hamming_and_majority_equal_the_slow_ones(bits: np.ndarray, data: st.DataObject) -> None:
    other = data.draw(arrays(bool, len(bits)))
    assert kvcrush_bits.hamming(bits, other[:, None]).tolist() == [
        distance(column, other.astype(int).tolist()) for column in columns(bits)
    ]
    among = np.flatnonzero(data.draw(arrays(bool, bits.shape[1])))
    if len(among):
        slow = majority([columns(bits)[i] for i in among])
        assert kvcrush_bits.majority(bits, among).astype(int).tolist() == slow


@pytest.mark.parametrize("width", [1, 255, 256, 300, 70000])
def test_distances_as_large_as_the_signature_are_counted(width: int) -> None:
    assert kvcrush_bits.hamming(np.ones((width, 2), bool), np.zeros((width, 1), bool)).tolist() == [width, width]


@MANY
@given(bits=signatures(), data=st.data(), kind=ANCHORS, count=st.integers(1, 5))
def test_distances_and_order_equal_the_slow_ones(bits: np.ndarray, data: st.DataObject, kind: str, count: int) -> None:
    among = np.flatnonzero(data.draw(arrays(bool, bits.shape[1]).filter(np.any)))
    chosen = [columns(bits)[i] for i in among]
    distances = kvcrush_bits.anchor_distances(bits, among, kind, count, (3, 1))
    anchors = anchors_of(chosen, kind, count, (3, 1))
    assert distances.tolist() == [[distance(bits, anchor) for bits in chosen] for anchor in anchors]
    for runs in (1, 3, 7):
        assert kvcrush_buckets.order_by_distance(distances, runs).tolist() == order_of(chosen, anchors, runs)


@MANY
@given(bits=signatures(), data=st.data(), rule=st.sampled_from(kvcrush_buckets.REPRESENTATIVES))
def test_picks_equal_the_slow_ones(bits: np.ndarray, data: st.DataObject, rule: str) -> None:
    items = bits.shape[1]
    buckets = data.draw(st.integers(0, items))
    scores = data.draw(arrays(np.float64, items, elements=st.sampled_from([0.0, 0.5, 2.0])))
    order = np.array(data.draw(st.permutations(range(items))))
    if rule == "even":
        picks = kvcrush_buckets.even_picks(order, buckets)
    elif rule == "best":
        picks = kvcrush_buckets.best_picks(scores, order, buckets)
    else:
        picks = kvcrush_buckets.centroid_picks(bits, scores, order, buckets)
    assert picks.tolist() == pick(columns(bits), scores.tolist(), order.tolist(), buckets, rule)


def test_buckets_of_hundreds_are_counted_right() -> None:
    """More members than a byte counts to."""
    bits = np.random.default_rng(0).random((5, 700)) < 0.5
    order = np.arange(700)
    for buckets in (1, 2, 3, 5, 699, 700):
        picks = kvcrush_buckets.centroid_picks(bits, np.zeros(700), order, buckets)
        assert picks.tolist() == pick(columns(bits), [0.0] * 700, list(order), buckets, "centroid")


@pytest.mark.parametrize(("items", "buckets"), [(1, 1), (7, 3), (10, 5), (8192, 513)])
def test_buckets_are_equal_and_cover_all(items: int, buckets: int) -> None:
    sizes = np.diff(np.append(kvcrush_buckets.bucket_starts(items, buckets), items))
    assert sizes.sum() == items
    assert sizes.max() - sizes.min() <= 1
    assert sizes.min() >= 1
