"""The log probabilities that tokens were drawn with: after temperature, among what top-k, top-p and min-p left."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np

from ov_kvcrush.engine.draw import Drawn, DrawParams, draw_rows, softmax

_USUALLY_ENOUGH = 256  # most probable tokens: a nucleus is nearly always among them


def drawn_logprobs(draws: Items[tuple[np.ndarray, DrawParams, int]]) -> list[float]:
    """Of each (logits float32 (vocabulary,), parameters, token drawn by them).

    What the scores of sampled sequences are sums of in openvino_genai. The sum over a vocabulary and its largest come
    from `draw_rows`, which is compiled.
    """
    scaled = [_scaled(row, p.temperature) for row, p, _ in draws]
    asked = [DrawParams(0.0, 0, 1.0, 0.0, 0, _num_needed(p, len(row))) for row, p, _ in draws]
    found = draw_rows(scaled, asked) if draws else []
    return [_logprob(row, p, token, d) for row, (_, p, token), d in zip(scaled, draws, found, strict=True)]


def _scaled(row: np.ndarray, temperature: float) -> np.ndarray:
    """Logits over temperature, the largest of them 0."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray((row - row.max()) * np.float32(min(1 / max(temperature, 1e-30), 1e30)))


def _num_needed(params: DrawParams, size: int) -> int:
    if 0 < params.top_k < size:
        return max(params.top_k, 2)
    return min(_USUALLY_ENOUGH, size) if params.top_p < 1 or params.min_p > 0 else 1


def _logprob(scaled: np.ndarray, params: DrawParams, token: int, largest: Drawn) -> float:
    own = float(scaled[token])  # over the largest
    if len(largest.top) < 2:
        return own + largest.logprob
    weights = np.exp([logprob for _, logprob in largest.top])  # descending, of the whole vocabulary
    size = len(scaled)
    if 0 < params.top_k < size:
        weights = weights[: params.top_k] / weights[: params.top_k].sum()
    elif len(weights) < size:
        has_nucleus = params.top_p == 1 or weights.sum() > params.top_p
        has_likely = params.min_p == 0 or weights[-1] < params.min_p * weights[0]
        if not (has_nucleus if params.top_p < 1 else has_likely):
            weights = -np.sort(-softmax(scaled.astype(np.float64)))
    if params.top_p < 1:
        weights = weights[: int(np.searchsorted(np.cumsum(weights), params.top_p)) + 1]
    if params.min_p > 0:
        weights = weights[weights >= params.min_p * weights[0]]
    return min(own - float(np.log((weights / weights[0]).sum())), 0.0)
