"""From rows of logits to tokens and log probabilities: compiled, all rows of a step in one call, or in numpy.

Both do the same; the numpy twin is what the compiled one is checked against, and what runs where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import NamedTuple

import numpy as np

from ov_kvcrush import native

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_ALL = np.empty(0, np.int32)  # the mask of a row from which every token may be drawn


class DrawParams(NamedTuple):
    """How one row is drawn from: the fields of SamplingParams, and the key of its noise.

    temperature = 0: the largest logit. top_k = 0: no limit. num_logprobs: 0 = none, 1 = of the token, more = of that
    many most probable tokens, too.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    key: int
    num_logprobs: int


class Drawn(NamedTuple):
    """A token, its log probability, and the most probable (token, log probability), if asked for.

    logprob: before temperature; where none are asked for, the one that it was drawn with, after temperature and among
    what top-k, top-p and min-p left: what the scores of sampled sequences are sums of in openvino_genai; 0 if greedy.
    token = -1 where none is possible: the largest logit is not finite.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


def draw_rows(rows: Items[np.ndarray], params: Items[DrawParams], masks: Items[np.ndarray | None] = ()) -> list[Drawn]:
    """Draw a token from each row, float32 (vocabulary,), contiguous. Ties go to the lowest token id.

    masks: for each row which tokens may be drawn, int32 (words,), token 0 the lowest bit of the first word; None = all.
    The others have a logit of -inf, before everything else.
    A draw is a pure function of its row, its mask and its parameters: other rows do not matter.
    """
    if native.available():
        bits = [_ALL if mask is None else mask for mask in masks]
        return [Drawn(*drawn) for drawn in native.load().draw_rows(rows, params, masks=bits)]
    if masks:
        rows = [row if mask is None else masked(row, mask) for row, mask in zip(rows, masks, strict=True)]
    return [draw(row, p) for row, p in zip(rows, params, strict=True)]


def masked(row: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A copy of logits (vocabulary,) with -inf where the bit of a token is 0."""
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little", count=len(row))
    return np.where(bits.astype(bool), row, np.float32(-np.inf))


def noise_key(seed: int, index: int, position: int) -> int:
    """The key of the noise of one draw: of a seed, a sequence and its position."""
    key = 0
    for part in (seed, index, position):
        x = (key + part + _GOLDEN) & _MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        key = x ^ (x >> 31)
    return key


def draw(logits: np.ndarray, params: DrawParams) -> Drawn:
    """`draw_rows` of one row in numpy."""
    top = logits.max()
    token, drawn_with = -1, 0.0
    if np.isfinite(top):
        token, drawn_with = (int(logits.argmax()), 0.0) if params.temperature == 0 else _draw(logits, params)
    if token < 0 or not params.num_logprobs:
        return Drawn(token, drawn_with, [])
    logprobs = logits.astype(np.float64) - top
    logprobs -= np.log(np.exp(logprobs).sum())
    count = min(params.num_logprobs, len(logits)) if params.num_logprobs > 1 else 0
    best = np.argsort(-logits, kind="stable")[:count].tolist()
    return Drawn(token, float(logprobs[token]), [(t, float(logprobs[t])) for t in best])


def _draw(logits: np.ndarray, params: DrawParams) -> tuple[int, float]:
    """Temperature, then top-k, then top-p, then min-p, as Hugging Face orders them; then one draw, and its log."""
    if 0 < params.top_k < len(logits):
        tokens = np.sort(np.argsort(-logits, kind="stable")[: params.top_k])
        logits = logits[tokens]
    else:
        tokens = np.arange(len(logits))
    with np.errstate(over="ignore", divide="ignore"):
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
    with np.errstate(divide="ignore", over="ignore"):
        arrivals = exponential_noise(params.key, tokens) / probs
    first = int(arrivals.argmin())
    return int(tokens[first]), min(float(np.log(probs[first] / probs.sum())), 0.0)


def nucleus(probs: np.ndarray, top_p: float) -> np.ndarray:
    """Indices, ascending, of the smallest set of most probable tokens that reaches `top_p` (arXiv 1904.09751).

    The set is nearly always among a few hundred, and sorting a vocabulary of 152k takes several milliseconds.
    """
    candidates = np.arange(len(probs))
    for count in (256, 4096):
        if count < len(probs):
            least = np.partition(probs, -count)[-count]
            top = np.flatnonzero(probs >= least)
            if probs[top].sum() > top_p:
                candidates = top
                break
    order = candidates[np.argsort(-probs[candidates], kind="stable")]
    # Those before which less than top_p is gathered.
    kept = order[: int(np.searchsorted(np.cumsum(probs[order]), top_p)) + 1]
    return np.sort(kept)


def exponential_noise(key: int, tokens: np.ndarray) -> np.ndarray:
    """Exponential variates float64 (n,), a pure function of the key and each token id.

    SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014) of both.
    """
    x = np.uint64(key) + (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits = (x ^ (x >> np.uint64(31))) >> np.uint64(11)
    return np.asarray(-np.log((bits + 0.5) * 2.0**-53))


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax of (n,)."""
    e = np.exp(x - x.max())
    return np.asarray(e / e.sum())


def log_softmax_at(logits: np.ndarray, token: int) -> float:
    """Log probability of one token under float32 (vocabulary,) logits."""
    top = logits.max()
    return float(logits[token] - top - np.log(np.exp(logits - top).sum()))
