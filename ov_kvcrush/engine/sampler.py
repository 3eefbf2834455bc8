"""From logits to tokens. Each sequence has its own random stream, whatever else is in the batch."""

from __future__ import annotations

import numpy as np

from ov_kvcrush.engine.request import Sequence


def sample(logits: np.ndarray, sequence: Sequence) -> tuple[int, float]:
    """Choose the next token of `sequence` from float32 (vocabulary,).

    Returns the token and its log probability after penalties and before temperature; 0.0 where it is not asked for.
    Ties go to the lowest token id.
    """
    params = sequence.request.params
    if params.changes_logits:
        logits = apply_penalties(logits, sequence)
    token = int(logits.argmax()) if sequence.rng is None else _draw(logits, sequence, sequence.rng)
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


def _draw(logits: np.ndarray, sequence: Sequence, rng: np.random.Generator) -> int:
    """Temperature, then top-k, then top-p, then min-p, as Hugging Face orders them; then one draw."""
    params = sequence.request.params
    tokens: np.ndarray | None = None  # candidates; None = the whole vocabulary
    if 0 < params.top_k < len(logits):
        tokens = np.argpartition(logits, -params.top_k)[-params.top_k :]
        tokens.sort()  # the partition's order is not ours to rely on
        logits = logits[tokens]
    probs = softmax((logits - logits.max()).astype(np.float64) / params.temperature)
    if params.top_p < 1:
        order = np.argsort(-probs, kind="stable")
        # Keep the smallest set that reaches top_p: those before which less than top_p is gathered.
        kept = order[: int(np.searchsorted(np.cumsum(probs[order]), params.top_p)) + 1]
        probs = _keep(probs, kept)
    if params.min_p > 0:
        probs = _keep(probs, np.flatnonzero(probs >= params.min_p * probs.max()))
    cumulative = np.cumsum(probs)
    # Less than the total for every draw below 1, so the choice has a probability above 0.
    choice = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    return int(tokens[choice]) if tokens is not None else choice


def _keep(probs: np.ndarray, kept: np.ndarray) -> np.ndarray:
    result = np.zeros_like(probs)
    result[kept] = probs[kept]
    return result


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax of (n,)."""
    e = np.exp(x - x.max())
    return np.asarray(e / e.sum())


def log_softmax_at(logits: np.ndarray, token: int) -> float:
    """Log probability of one token under float32 (vocabulary,) logits."""
    top = logits.max()
    return float(logits[token] - top - np.log(np.exp(logits - top).sum()))
