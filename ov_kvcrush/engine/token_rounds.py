"""Tokens of the rows of a step: drawn and noted round by round, where several rows are of one sequence."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.core.request import FinishReason, Sequence
from ov_kvcrush.engine.grammar import masks as grammar_masks
from ov_kvcrush.engine.sampler import Sampled, sample, sample_rows
from ov_kvcrush.errors import CrushError


@dataclass(eq=False)
class SampledRows:
    """A sequence with the logits (1 + draft, vocabulary) of its rows in a step; num_taken: that gave it a token."""

    sequence: Sequence
    logits: np.ndarray
    draft: tuple[int, ...]
    num_taken: int = 0

    @property
    def next(self) -> Row:
        """The row that gives its next token."""
        return self.sequence, self.logits[self.num_taken]

    @property
    def goes_on(self) -> bool:
        """Whether the next row is one of the sequence, too: what was guessed is what was drawn."""
        is_last = self.sequence.is_finished or self.num_taken > len(self.draft)
        return not is_last and int(self.sequence.ids.view[-1]) == self.draft[self.num_taken - 1]


Row = tuple[Sequence, np.ndarray]  # logits float32 (vocabulary,)


def take_tokens(
    due: Items[SampledRows],
    now: float,
    draw: Callable[[list[Row]], list[Sampled | Exception]],
    fail: Callable[[Sequence, Exception], None],
) -> None:
    """Give each of these its next token, and those behind it as long as they are what was guessed.

    One draw for each round of all sequences: what was drawn before counts, as it does where it is drawn in a step of
    its own. So a guess changes no token, and no draw's distribution. draw: `sample_each`. fail: ends a sequence that
    something broke.
    """
    going_on = list(due)
    while going_on:
        taken = []
        for rows, sampled in zip(going_on, draw([rows.next for rows in going_on]), strict=True):
            try:
                if isinstance(sampled, Exception):
                    raise sampled
                _accept(rows.sequence, sampled, now)
                rows.num_taken += 1
                taken.append(rows)
            except Exception as error:
                fail(rows.sequence, error)
        grammar_masks.advance([rows.sequence for rows in taken])  # while all else happens, up to the next draw
        going_on = [rows for rows in taken if rows.goes_on]


def sample_each(rows: list[Row]) -> list[Sampled | Exception]:
    """The next token of each, or what is wrong with it."""
    try:
        return list(sample_rows(rows))
    except Exception:  # of one of them: which, they tell one by one
        return [_sampled_alone(sequence, row) for sequence, row in rows]


def _sampled_alone(sequence: Sequence, logits: np.ndarray) -> Sampled | Exception:
    try:
        return sample(logits, sequence)
    except Exception as error:
        return error


def _accept(sequence: Sequence, sampled: Sampled, now: float) -> None:
    token, logprob, top = sampled
    if token < 0 and sequence.grammar is not None:
        raise CrushError("logit_bias must leave a token that the grammar allows, got a ban of all of them")
    if token < 0:
        raise FloatingPointError("logits must have a finite maximum, got none: the model or its precision broke")
    sequence.ids.append(token)
    sequence.token_times.append(now)
    sequence.logprobs.append(logprob)
    sequence.cumulative_logprob += logprob
    if top is not None:
        sequence.top_logprobs.append(top)
    sequence.finish_reason = finish_reason(sequence, token)


def finish_reason(sequence: Sequence, token: int) -> ov_genai.GenerationFinishReason:
    """Why `sequence` ends with `token`, NONE if it goes on."""
    params = sequence.request.params
    if sequence.stop_tracker and sequence.stop_tracker.add(token):
        return FinishReason.STOP
    grammar = sequence.grammar
    if token in params.stop_token_ids and (
        sequence.num_generated >= params.min_new_tokens or (grammar is not None and grammar.is_complete)
    ):
        return FinishReason.STOP
    if grammar is not None and grammar.completes(sequence.generated):
        return FinishReason.STOP
    if sequence.num_generated >= params.max_new_tokens:
        return FinishReason.LENGTH
    return FinishReason.NONE
