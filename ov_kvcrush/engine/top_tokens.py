"""Log probabilities of a vocabulary, the most probable tokens of it, and those that would repeat an n-gram; numpy."""

from __future__ import annotations

import numpy as np

_CHUNK = 64  # logits whose maximum is looked at first


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Log softmax of float32 (vocabulary,). Raises FloatingPointError without a finite maximum."""
    top = logits.max()
    if not np.isfinite(top):
        raise FloatingPointError("logits must have a finite maximum, got none: the model or its precision broke")
    logprobs = np.subtract(logits, top, dtype=np.float32)
    total = np.exp(logprobs).sum(dtype=np.float64)
    logprobs -= np.float32(np.log(total))
    return logprobs


def top_tokens(logprobs: np.ndarray, count: int) -> list[tuple[int, np.float32]]:
    """The `count` most probable tokens of float32 (vocabulary,) and their log probabilities, the best first.

    Ties go to the lower token id; impossible tokens, of -inf, are left out. A partition of 152k logits takes 1 ms or
    more; that of the maxima of their chunks takes 20 us, and nearly all chunks have nothing of the best.
    """
    candidates = np.arange(len(logprobs))
    num_chunks = len(logprobs) // _CHUNK
    if count < num_chunks:
        maxima = logprobs[: num_chunks * _CHUNK].reshape(num_chunks, _CHUNK).max(1)
        least = np.partition(maxima, -count)[-count]  # so many chunks have a token of at least this
        candidates = np.flatnonzero(logprobs >= least)
    if count < len(candidates):
        values = logprobs[candidates]
        least = values[np.argpartition(values, -count)[-count]]
        candidates = candidates[values >= least]
    best = candidates[np.argsort(-logprobs[candidates], kind="stable")][:count]
    return [(int(token), logprobs[token]) for token in best if logprobs[token] > -np.inf]


def repeated_ngrams(ids: np.ndarray, size: int) -> np.ndarray:
    """Tokens that followed the last `size` - 1 of int64 (S,) somewhere in it; of size 1 all of it, of 0 none."""
    if size == 0 or len(ids) < max(size, 2):
        return ids[:0]
    num_starts = len(ids) - size + 1
    tail = ids[len(ids) - size + 1 :]
    is_equal = np.ones(num_starts, np.bool_)
    for offset, token in enumerate(tail):
        is_equal &= ids[offset : offset + num_starts] == token
    return ids[size - 1 :][is_equal]
