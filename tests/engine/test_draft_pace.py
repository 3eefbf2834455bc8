"""How many guessed tokens run: next to none where they are wrong, all of them soon after they begin to be right.

Steps are counted, not timed: a guessed token costs `row` of a step. What a text costs without guesses is its tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from ov_kvcrush.core.lookahead_params import LookaheadParams
from ov_kvcrush.core.request import Request
from ov_kvcrush.core.sampling_params import SamplingParams
from ov_kvcrush.engine.lookahead.drafts import Drafts
from ov_kvcrush.engine.lookahead.guess import Guess
from ov_kvcrush.engine.lookahead.prompt_lookup import PromptLookup

ROWS = (0.02, 0.06, 0.15)
WIDTH = 5
PASSAGE = 1000 + np.arange(40)
WRONG = -1


class Unlimited:
    """A cache that any number of guessed tokens may run in."""

    def max_draft(self, sequence: Any, most: int) -> int:
        return most


class AlwaysWrong:
    """kinds: of its guesses, in turns."""

    is_free = True

    def __init__(self, *kinds: int) -> None:
        self._kinds = kinds

    def guess(self, sequences: Any, most: Any) -> list[Guess]:
        kind = self._kinds[len(sequences[0].ids) % len(self._kinds)]
        return [Guess((WRONG,) * most[0], kind)]

    def forget(self, sequence: Any) -> None:
        pass

    def taken(self) -> None:
        pass


class Step(NamedTuple):
    begin: int  # tokens of the text before it
    num_drafted: int
    num_right: int


def steps_of(text: np.ndarray, row: float, guesser: Any = None) -> list[Step]:
    """The steps in which an answer comes to be `text`."""
    request = Request(
        0, np.zeros(1, np.int64), SamplingParams(len(text) + WIDTH + 1), lookahead=LookaheadParams(num_tokens=WIDTH)
    )
    answer, drafts, steps, at = request.root, Drafts(guesser or PromptLookup(), Unlimited()), [], 1  # type: ignore[arg-type]
    answer.ids.extend(text[:1])
    while at < len(text):
        (draft,) = drafts.guess([answer], 512)
        came = text[at : at + len(draft)]
        wrong = np.flatnonzero(came != np.array(draft[: len(came)], np.int64))
        num_right = int(wrong[0]) if len(wrong) else len(came)
        drafts.pace.note(len(draft), 0.03 * (1 + row * len(draft)))
        steps.append(Step(at, len(draft), num_right))
        answer.ids.extend(text[at : at + num_right + 1])
        at += num_right + 1
    return steps


def cost(steps: list[Step], row: float) -> float:
    return len(steps) + row * sum(step.num_drafted for step in steps)


def random_text(kind: str, length: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "zipf":
        weights = 1 / np.arange(1, 2001)
        return rng.choice(2000, length, p=weights / weights.sum())
    return rng.integers(0, int(kind), length)


def test_a_text_of_different_tokens_runs_no_guess() -> None:
    assert all(step.num_drafted == 0 for step in steps_of(np.arange(1, 200), 0.06))


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("kinds", [(1,), (3,), (1, 2, 3)])
def test_guesses_that_are_never_right_stop(kinds: tuple[int, ...], row: float) -> None:
    """A few dozen rows in all, however long the answer."""
    steps = steps_of(np.arange(500), row, AlwaysWrong(*kinds))
    assert sum(step.num_drafted for step in steps) <= 32
    assert not any(step.num_drafted for step in steps[50:])
    assert cost(steps, row) <= 1.01 * len(steps)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("kind", ["20", "50", "300", "zipf"])
def test_a_text_that_repeats_by_chance_costs_no_more_than_a_hundredth(kind: str, row: float) -> None:
    """Its last token was nearly always there before, and what followed says nothing."""
    text = random_text(kind, 600)
    assert cost(steps_of(text, row), row) <= 1.015 * (len(text) - 1)


@pytest.mark.parametrize("row", ROWS)
def test_a_repetition_runs_at_full_width_after_a_few_steps(row: float) -> None:
    """Behind 300 tokens in which guesses were wrong; the passage is there once before it can be found."""
    text = np.concatenate([random_text("50", 300), np.tile(PASSAGE, 6)])
    repeating = [step for step in steps_of(text, row) if step.begin > 300 + len(PASSAGE)]
    full = [step.num_drafted == step.num_right == WIDTH for step in repeating[:-1]]
    assert all(full[8:])
    assert len(full) > 30


@pytest.mark.parametrize("row", ROWS)
def test_the_end_of_a_repetition_is_noticed(row: float) -> None:
    text = np.concatenate([np.tile(PASSAGE, 6), random_text("50", 300)])
    later = [step for step in steps_of(text, row) if step.begin >= 6 * len(PASSAGE)]
    assert cost(later, row) <= 300 + 4


def test_a_repetition_pays() -> None:
    text = np.tile(PASSAGE, 8)
    assert cost(steps_of(text, 0.06), 0.06) < 0.4 * len(text)
