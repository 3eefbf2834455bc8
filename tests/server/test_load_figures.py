"""Figures of a load run follow from the moments of its answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from load.summary import Answer, summarise


def steady(begin: float, ttft: float, tpot: float, tokens: int) -> Answer:
    return Answer(begin, 200, [begin + ttft + i * tpot for i in range(tokens)], tokens)


@given(st.floats(0.01, 5), st.floats(0.001, 0.5), st.integers(2, 50), st.integers(1, 20))
def test_equal_answers_have_one_ttft_and_one_tpot(ttft: float, tpot: float, tokens: int, number: int) -> None:
    answers = [steady(i * 0.1, ttft, tpot, tokens) for i in range(number)]
    end = answers[-1].times[-1] + 1
    found = summarise(answers, 0, end)
    assert found.ttft_ms == pytest.approx([1e3 * ttft] * 3)
    assert found.tpot_ms == pytest.approx([1e3 * tpot] * 3)
    assert found.tokens_per_s == pytest.approx(number * tokens / end)
    assert (found.answers, found.refused, found.errors) == (number, 0, 0)


def test_only_what_came_within_the_time_counts() -> None:
    found = summarise([steady(0, 1, 1, 10)], 3.5, 6.5)  # tokens at 1, 2, ... 10
    assert found.tokens_per_s == pytest.approx(1)
    assert found.ttft_ms is None
    assert found.tpot_ms is None


def test_tokens_of_pieces_that_came_together_are_shared() -> None:
    found = summarise([Answer(0, 200, [1.0, 3.0], tokens=8)], 0, 2)
    assert found.tokens_per_s == pytest.approx(2)


def test_every_request_ends_in_one_way() -> None:
    broken = Answer(0, 200, [1.0], 1, error="the stream broke off")
    found = summarise([steady(0, 1, 1, 3), Answer(0, 429), Answer(0, 500, error="status 500"), Answer(0), broken], 0, 9)
    assert (found.answers, found.refused, found.errors) == (1, 1, 3)
