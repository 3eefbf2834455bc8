"""What changes logits before a token is chosen: biases, penalties for what was said, and a ban on ending too early."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ov_kvcrush.core.request import Sequence
from ov_kvcrush.core.token_counts import TokenCounts


def apply_penalties(logits: np.ndarray, sequence: Sequence) -> np.ndarray:
    """A changed copy of float32 (vocabulary,).

    First biases are added; then the repetition penalty over prompt and answer (CTRL, arXiv 1909.05858), and presence
    and frequency over the answer. Those are subtracted whatever the sign of the logit (openvino_genai adds them to
    negative logits), and an end that comes too early is impossible rather than a logit of 0.
    """
    logits = logits.copy()
    _change(logits, sequence)
    return logits


@contextmanager
def changed(logits: np.ndarray, sequence: Sequence) -> Iterator[None]:
    """`apply_penalties` in place, and undone at the end: a copy of 152k logits costs as much as a draw."""
    touched = _touched(sequence, len(logits))
    before = logits[touched]
    try:
        _change(logits, sequence)
        yield
    finally:
        logits[touched] = before


def _change(logits: np.ndarray, sequence: Sequence) -> None:
    params = sequence.request.params
    if params.logit_bias:
        tokens, biases = zip(*params.logit_bias, strict=True)
        logits[list(tokens)] += np.array(biases, np.float32)
    if params.penalises:
        counts = _counts(sequence, len(logits))
        if params.repetition_penalty != 1:
            at = logits[counts.seen]
            penalty = np.float32(params.repetition_penalty)
            logits[counts.seen] = np.where(at > 0, at / penalty, at * penalty)
        if params.presence_penalty or params.frequency_penalty:
            written, times = counts.written()
            logits[written] -= (params.presence_penalty + params.frequency_penalty * times).astype(np.float32)
    if _must_go_on(sequence):
        logits[list(params.stop_token_ids)] = -np.inf


def _touched(sequence: Sequence, num_tokens: int) -> np.ndarray:
    """Tokens whose logits `_change` may change, int64 (n,); some may be there more than once."""
    params = sequence.request.params
    parts = [np.array([token for token, _ in params.logit_bias], np.int64)]
    if params.penalises:
        counts = _counts(sequence, num_tokens)
        parts.append(counts.seen if params.repetition_penalty != 1 else counts.written()[0])
    if _must_go_on(sequence):
        parts.append(np.array(list(params.stop_token_ids), np.int64))
    return np.concatenate(parts)


def _counts(sequence: Sequence, num_tokens: int) -> TokenCounts:
    if sequence.token_counts is None:
        sequence.token_counts = TokenCounts(num_tokens)
    sequence.token_counts.update(sequence.ids.view, sequence.request.num_prompt_tokens)
    return sequence.token_counts


def _must_go_on(sequence: Sequence) -> bool:
    params = sequence.request.params
    if sequence.grammar is not None and sequence.grammar.is_complete:  # nothing but an end can follow
        return False
    return bool(params.stop_token_ids) and sequence.num_generated < params.min_new_tokens
