"""Layers to score, with numbers of all kinds, and how scores are compared."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
from covering import covering, rarely

from ov_kvcrush.policies.base import HeadState, LayerState

D = 8


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
