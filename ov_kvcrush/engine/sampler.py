"""From logits to tokens. A draw depends on the seed, the sequence and the position, whatever else is in the batch."""

from __future__ import annotations

import numpy as np

from ov_kvcrush.core.request import Sequence

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def sample(logits: np.ndarray, sequence: Sequence) -> tuple[int, float]:
    """Choose the next token of `sequence` from float32 (vocabulary,).

    Returns the token and its log probability after penalties and before temperature; 0.0 where it is not asked for.
    Ties go to the lowest token id.
    """
    params = sequence.request.params
    if params.changes_logits:
        logits = apply_penalties(logits, sequence)
    token = int(logits.argmax()) if params.is_greedy else _draw(logits, sequence)
    return token, log_softmax_at(logits, token) if params.logprobs else 0.0


def apply_penalties(logits: np.ndarray, sequence: Sequence) -> np.ndarray:
    """Repetition penalty over prompt and answer (CTRL, arXiv 1909.05858); presence and frequency over the answer.

    Presence and frequency are subtracted whatever the sign of the logit (openvino_genai adds them to negative logits),
    and an end that comes too early is impossible rather than a logit of 0.
    """
    params = sequence.request.params
    logits = logits.copy()
    if params.repetition_penalty != 1:
        seen = np.unique(sequence.ids[:])
        at = logits[seen]
        logits[seen] = np.where(at > 0, at / params.repetition_penalty, at * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and sequence.num_generated:
        tokens, counts = np.unique(sequence.generated, return_counts=True)
        logits[tokens] -= (params.presence_penalty + params.frequency_penalty * counts).astype(np.float32)
    if sequence.num_generated < params.min_new_tokens and params.stop_token_ids:
        logits[list(params.stop_token_ids)] = -np.inf
    return logits


def _draw(logits: np.ndarray, sequence: Sequence) -> int:
    """Temperature, then top-k, then top-p, then min-p, as Hugging Face orders them; then one draw."""
    params = sequence.request.params
    if 0 < params.top_k < len(logits):
        tokens = np.argpartition(logits, -params.top_k)[-params.top_k :]
        tokens.sort()  # the partition's order is not ours to rely on
        logits = logits[tokens]
    else:
        tokens = np.arange(len(logits))
    probs = softmax((logits - logits.max()).astype(np.float64) / params.temperature)
    if params.top_p < 1:
        kept = nucleus(probs, params.top_p)
        tokens, probs = tokens[kept], probs[kept]
    if params.min_p > 0:
        likely = probs >= params.min_p * probs.max()
        tokens, probs = tokens[likely], probs[likely]
    # A race: each token arrives after an exponential time with its probability as the rate; the first one wins.
    # Inverting the cumulative distribution draws the same, but there rounding in one logit moves the borders of all
    # later tokens: 1e-5 of it changed an answer on a vocabulary of 288, here it must hit two that arrive together.
    with np.errstate(divide="ignore"):
        arrivals = exponential_noise(params.seed, sequence.index, sequence.num_generated, tokens) / probs
    return int(tokens[arrivals.argmin()])


def nucleus(probs: np.ndarray, top_p: float) -> np.ndarray:
    """Indices, ascending, of the smallest set of most probable tokens that reaches `top_p` (arXiv 1904.09751).

    The set is nearly always among a few hundred, and sorting a vocabulary of 152k takes several milliseconds.
    """
    candidates = np.arange(len(probs))
    for count in (256, 4096):
        if count < len(probs):
            top = np.argpartition(probs, -count)[-count:]
            if probs[top].sum() > top_p:
                candidates = np.sort(top)
                break
    order = candidates[np.argsort(-probs[candidates])]
    # Those before which less than top_p is gathered.
    kept = order[: int(np.searchsorted(np.cumsum(probs[order]), top_p)) + 1]
    return np.sort(kept)


def exponential_noise(seed: int, index: int, position: int, tokens: np.ndarray) -> np.ndarray:
    """Exponential variates float64 (n,), a pure function of the seed, the sequence, the position and each token id.

    SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014) of a key and the token.
    """
    key = np.zeros(1, np.uint64)
    for part in (seed, index, position):
        key = _mix(key + np.uint64(part & _MASK))
    bits = _mix(key + tokens.astype(np.uint64) * _GOLDEN) >> np.uint64(11)
    return np.asarray(-np.log((bits + 0.5) * 2.0**-53))


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax of (n,)."""
    e = np.exp(x - x.max())
    return np.asarray(e / e.sum())


def log_softmax_at(logits: np.ndarray, token: int) -> float:
    """Log probability of one token under float32 (vocabulary,) logits."""
    top = logits.max()
    return float(logits[token] - top - np.log(np.exp(logits - top).sum()))
