"""Which parameters a law is tested with by default, and which only with `pytest --exhaustive`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("default-run", max_examples=25, deadline=None)
settings.register_profile("exhaustive", max_examples=100, deadline=None)


def covering(*values: Iterable[Any]) -> list[Any]:
    """Return the product of all `values` as pytest.params, in its usual order.

    By default run those that cover: every value of every parameter at least once. The others are marked exhaustive.
    """
    lists = [list(each) for each in values]
    # Shifted after each round, so that two lists of the same length do not always pair the same values.
    covered = {
        tuple((row + row // len(each) * shift) % len(each) for shift, each in enumerate(lists))
        for row in range(max(map(len, lists)))
    }
    return [
        pytest.param(*chosen, marks=() if where in covered else pytest.mark.exhaustive)
        for where, chosen in zip(product(*(range(len(each)) for each in lists)), product(*lists), strict=True)
    ]


def rarely(*values: Any) -> list[Any]:
    """Return pytest.params of one parameter, or of several where values are tuples, that only `--exhaustive` runs."""
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.exhaustive) for v in values]


def examples(full: int) -> int:
    """Return `full` for the exhaustive profile of Hypothesis, and for another its share of them: at least 5."""
    return max(min(full, 5), full * settings.default.max_examples // 100)
