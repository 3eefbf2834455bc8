"""From logits to tokens. A draw depends on the seed, the sequence and the position, whatever else is in the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Items
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

from ov_kvcrush.core.request import Sequence
from ov_kvcrush.engine.draw import Drawn, DrawParams, draw_rows, noise_key
from ov_kvcrush.engine.penalties import apply_penalties, changed


class Sampled(NamedTuple):
    """The next token of a sequence.

    logprob: after penalties and before temperature; where it is not asked for, the one that it was drawn with, 0.0 if
    nothing was drawn. top_logprobs: {token: log probability} of the most probable ones, where more than the token's own
    are asked for. token = -1 where none is possible: the largest logit is not finite.
    """

    token: int
    logprob: float = 0.0
    top_logprobs: dict[int, float] | None = None


def sample_rows(rows: Items[tuple[Sequence, np.ndarray]]) -> list[Sampled]:
    """Choose the next token of each sequence from its logits, float32 (vocabulary,): all of a step in one call.

    Ties go to the lowest token id. The logits are as before when it returns.
    """
    logits = [np.ascontiguousarray(row, np.float32) for _, row in rows]
    masks = [sequence.grammar.mask() if sequence.grammar else None for sequence, _ in rows]
    owners = Counter(row.ctypes.data for row in logits)
    with ExitStack() as stack:
        for i, (sequence, _) in enumerate(rows):
            if not sequence.request.params.changes_logits:
                continue
            if logits[i].flags.writeable and owners[logits[i].ctypes.data] == 1:
                stack.enter_context(changed(logits[i], sequence))
            else:
                logits[i] = apply_penalties(logits[i], sequence)
        params = [_draw_params(sequence) for sequence, _ in rows]
        drawn = draw_rows(logits, params, masks if any(mask is not None for mask in masks) else ())
    return [_sampled(d, sequence) for d, (sequence, _) in zip(drawn, rows, strict=True)]


def sample(logits: np.ndarray, sequence: Sequence) -> Sampled:
    """`sample_rows` of one sequence."""
    return sample_rows([(sequence, logits)])[0]


def _draw_params(sequence: Sequence) -> DrawParams:
    params = sequence.request.params
    if params.is_greedy:
        return DrawParams(0.0, 0, 1.0, 0.0, 0, params.logprobs)
    key = noise_key(params.seed, sequence.index, sequence.num_generated)
    return DrawParams(params.temperature, params.top_k, params.top_p, params.min_p, key, params.logprobs)


def _sampled(drawn: Drawn, sequence: Sequence) -> Sampled:
    if sequence.request.params.logprobs <= 1:
        return Sampled(drawn.token, drawn.logprob)
    # Fewer than asked for where a grammar or a ban leaves fewer.
    return Sampled(drawn.token, drawn.logprob, {token: x for token, x in drawn.top if x > -np.inf})
