"""R-KV: equals a slow, obvious one; of duplicates the newest stays; its memory does not grow with the square."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from covering import covering

from ov_kvcrush.errors import CrushError
from ov_kvcrush.policies.base import HeadState
from ov_kvcrush.policies.registry import build
from ov_kvcrush.policies.scorers.rkv import RKV, newest_duplicate

SETTINGS = [RKV(), RKV(lam=0.9, kernel=1), RKV(lam=0, duplicate=0.9), RKV(window=64, lam=1)]


def cosines_of(keys: np.ndarray) -> np.ndarray:
    """float64 (S, S), 0 on the diagonal."""
    keys = keys.astype(np.float64)
    unit = keys / (np.linalg.norm(keys, axis=1, keepdims=True) + 1e-8)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, 0)
    return cosines


def slow_newest(cosines: np.ndarray, duplicate: float) -> list[int]:
    return [max(np.flatnonzero(row > duplicate), default=-1) for row in cosines]


def slow_scores(scorer: RKV, head: HeadState, length: int) -> np.ndarray:
    """float64 (S,), as the paper's code goes: the whole matrix, with entries set to 0."""
    assert head.attention is not None
    assert head.keys is not None
    size = len(head)
    attention = [max(float(row[s]) for row in head.attention) for s in range(size)]
    before = sum(a for a, place in zip(attention, head.positions, strict=True) if place < length - scorer.window)
    half = scorer.kernel // 2
    pooled = np.array([max(attention[max(0, s - half) : s + half + 1]) for s in range(size)])
    cosines = cosines_of(head.keys)
    for row, column in enumerate(slow_newest(cosines, scorer.duplicate)):
        if column >= 0:
            cosines[row, column] = 0
    powers = np.exp(cosines.mean(axis=0))
    importance = np.minimum(pooled / max(before, 1e-30), 1)
    return scorer.lam * importance - (1 - scorer.lam) * powers / powers.sum()


def head_of(size: int, seed: int, copies: int = 1) -> HeadState:
    """A head of keys that come `copies` times, with some noise, and gaps between the positions."""
    rng = np.random.default_rng(seed)
    ideas = rng.normal(size=(-(-size // copies), 16))
    keys = ideas[rng.permutation(np.arange(size) % len(ideas))] + 0.05 * rng.normal(size=(size, 16))
    weights = rng.exponential(size=(3, size)) ** 3
    weights /= weights.sum(axis=1, keepdims=True)
    positions = np.sort(rng.choice(size + 20, size, replace=False)).astype(np.int32)
    return HeadState(
        positions, (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32), keys.astype(np.float32)
    )


@pytest.mark.parametrize(
    ("size", "scorer", "copies"), covering([1, 2, 5, 31, 32, 33, 95, 96, 97, 300], SETTINGS, [1, 3, 20]), ids=repr
)
def test_equals_the_slow_one(scorer: RKV, size: int, copies: int) -> None:
    head = head_of(size, seed=size, copies=copies)
    (scores,) = scorer.score((head,), 0, size + 20)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, slow_scores(scorer, head, size + 20), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("size", [1, 63, 64, 1500, 2600])
def test_newest_duplicates_are_found_across_blocks(size: int) -> None:
    keys = head_of(size, seed=1, copies=2).keys
    assert keys is not None
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    cosines = cosines_of(keys)
    duplicate = 0.9
    assert not np.any(np.abs(cosines - duplicate) < 1e-6), "a case where rounding decides says nothing"
    assert newest_duplicate(unit, duplicate).tolist() == slow_newest(cosines, duplicate)


def test_of_duplicates_the_newest_stays() -> None:
    """Thirty tokens that matter the same say three things, ten times each."""
    rng = np.random.default_rng(0)
    keys = np.eye(16, dtype=np.float32)[np.arange(30) % 3] + 0.01 * rng.normal(size=(30, 16)).astype(np.float32)
    head = HeadState(np.arange(30, dtype=np.int32), np.full((2, 30), 1 / 30, np.float32), keys)
    (scores,) = RKV(window=1).score((head,), 0, 30)
    assert sorted(np.argsort(scores)[-3:]) == [27, 28, 29]


def test_keys_of_zero_and_attention_of_zero_have_finite_scores() -> None:
    head = HeadState(np.arange(9, dtype=np.int32), np.zeros((2, 9), np.float32), np.zeros((9, 4), np.float32))
    (scores,) = RKV().score((head,), 0, 9)
    np.testing.assert_allclose(scores, np.full(9, -0.9 / 9), rtol=1e-6)


def test_memory_is_bounded_where_no_key_has_a_duplicate() -> None:
    size = 6000
    unit = np.random.default_rng(0).normal(size=(size, 16)).astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    tracemalloc.start()
    newest = newest_duplicate(unit, 1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(newest) == size
    assert peak < size * size / 4


def test_choices_come_every_128_tokens_as_in_the_paper() -> None:
    assert build("rkv").stride == 128
    assert build("rkv", stride=7).stride == 7


@pytest.mark.parametrize("field", [{"window": 0}, {"kernel": 4}, {"kernel": 0}, {"lam": 1.1}, {"duplicate": 0}])
def test_bad_fields_are_refused(field: dict[str, float]) -> None:
    with pytest.raises(CrushError, match=f"{next(iter(field))} must be .*, got {next(iter(field.values()))}"):
        RKV(**field)  # type: ignore[arg-type]
