"""Scorers: what every one promises, those with a slow twin in the table, and those that need no attention."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError, fields
from itertools import product
from typing import Any

import numpy as np
import pytest
from covering import covering, rarely
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_states import POLICIES, Row
from scorer_cases import CASES, COVERING, REST, Case, D, assert_scores, layer_of

from ov_kvcrush.errors import CrushError
from ov_kvcrush.policies.base import HeadState, Scorer
from ov_kvcrush.policies.registry import build
from ov_kvcrush.policies.scorers.expected_attention import ExpectedAttention
from ov_kvcrush.policies.scorers.h2o import H2O
from ov_kvcrush.policies.scorers.keydiff import KeyDiff
from ov_kvcrush.policies.scorers.knorm import Knorm
from ov_kvcrush.policies.scorers.kvzip import KVzip
from ov_kvcrush.policies.scorers.random_scores import Random
from ov_kvcrush.policies.scorers.snapkv import SnapKV
from ov_kvcrush.policies.scorers.streaming_llm import StreamingLLM
from ov_kvcrush.policies.scorers.tova import TOVA
from ov_kvcrush.policies.top_scores import TopScores

SCORERS = [SnapKV(), H2O(), TOVA(), StreamingLLM(), Knorm(), KeyDiff(), ExpectedAttention(), Random(), KVzip()]
ALL = pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: scorer.name)


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
    assert isinstance(policy, TopScores)
    expected = [row.slow(head) for head in layer]
    # Cosines near 0 are differences of larger numbers: what rounding leaves of them is absolute.
    assert_scores(policy.scorer.score(layer, 0, case.length), expected, atol=1e-6 if row.name == "keydiff" else 1e-30)


# -- without attention -------------------------------------------------------------------------------------------------


def test_keydiff_keeps_the_key_that_points_elsewhere() -> None:
    keys = np.ones((9, D), np.float32)
    keys[4] = [-1, 1] * (D // 2)
    keys[7] *= 50  # longer, same direction
    head = HeadState(np.arange(9, dtype=np.int32), keys=keys)
    (scores,) = KeyDiff().score((head,), 0, 9)
    assert scores.argmax() == 4
    assert scores[7] == pytest.approx(scores[0])


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
