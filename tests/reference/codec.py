"""Codecs, tiles and attention of the compressed KV cache in numpy: what the native module must compute, said slowly.

Letters: H query heads, K KV heads, D channels of a head, S cached tokens of a KV head, T rows of a step, W scored rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

TILE = 32  # tokens of a tile
MAX_GAP = 1023  # positions from a token of a tile to the next; a longer gap is a far one
BITS = {"f32": 32, "bf16": 16, "f16": 16, "u8": 8, "u4": 4, "u2": 2}
QUANTISED = ("u8", "u4", "u2")
F16_MAX = 65504.0
F16_TINY = 2.0**-24  # the smallest positive f16


# -- codecs


def to_float(x: Array, precision: str) -> Array:
    """What float32 `x` is once stored as f32, f16 or bf16: rounded to nearest, ties to even; f16 clamps to +-65504."""
    x = np.ascontiguousarray(x, np.float32)
    if precision == "f32":
        return x
    if precision == "f16":
        return np.clip(x, -F16_MAX, F16_MAX).astype(np.float16).astype(np.float32)
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def f16_down(x: Array) -> Array:
    """The largest f16 that is at most x, |x| <= 65504, as float32."""
    half = x.astype(np.float16)
    below = np.nextafter(half, np.float16(-F16_MAX))
    return np.where(half.astype(np.float32) > x, below, half).astype(np.float32)


def min_and_scale(low: Array, high: Array, levels: np.float32) -> tuple[Array, Array]:
    """For numbers from low to high: the minimum rounded down to f16 and the step rounded up to f16, as float32."""
    minimum = f16_down(low)
    return minimum, np.maximum(-f16_down(-(high - minimum) / levels), np.float32(F16_TINY))


def prefers_quarters(x: Array, low: Array, high: Array) -> Array:
    """Whether 2-bit codes of x (..., n) have less squared error with levels in the middles of the quarters of the range
    than with levels from its lower to its upper bound: (..., 1). Rounded so that sums are exact."""
    centre, inverse = (low + high) * np.float32(0.5), np.float32(1) / np.maximum(high - low, np.float32(F16_TINY))
    with np.errstate(over="ignore", invalid="ignore"):
        u = np.abs((x - centre) * inverse)  # distance from the centre, in ranges
    u = np.rint(np.nan_to_num(np.minimum(u, 1024), nan=1024) * 8192).astype(np.int64)
    gain = 3 * np.abs(u - 2048) - 2 * u - 4 * np.abs(u - 2731)  # less a constant
    constant = np.float32(np.float32(7 / 48) - np.float32(0.75) + np.float32(4 * 2731 / 8192))
    return np.asarray(gain.sum(axis=-1, keepdims=True) / 8192 > np.float32(x.shape[-1]) * -constant)


def quantise(x: Array, precision: str) -> tuple[Array, Array, Array]:
    """Codes, scale and minimum of float32 `x` (..., n); the numbers of the last axis share scale and minimum (..., 1).

    minimum = f16 rounded down of low; scale = f16 rounded up of (high - minimum) / levels, never 0;
    code = round half to even of (x - minimum) / scale; x beyond +-65504 is clamped first.
    low and high are min(x) and max(x); with u2, where that leaves less squared error, an eighth of the range inside.
    So |x - (minimum + code * scale)| <= scale / 2, up to float32 rounding.
    """
    levels = np.float32(2 ** BITS[precision] - 1)
    given, x = x.astype(np.float32), np.clip(x.astype(np.float32), -F16_MAX, F16_MAX)
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    if precision == "u2":
        eighth = np.where(prefers_quarters(given, low, high), (high - low) / np.float32(8), np.float32(0))
        low, high = low + eighth, high - eighth
    minimum, scale = min_and_scale(low, high, levels)
    codes = np.clip(np.rint((x - minimum) / scale), 0, levels).astype(np.uint8)
    return codes, scale, minimum


def round_trip(x: Array, precision: str) -> Array:
    """`x` (..., n) stored and read back; the last axis shares a scale if the precision is a quantised one."""
    if precision not in QUANTISED:
        return to_float(x, precision)
    codes, scale, minimum = quantise(x, precision)
    return (minimum + codes.astype(np.float32) * scale).astype(np.float32)


def rotate(x: Array) -> Array:
    """The orthonormal Walsh-Hadamard transform of each block of channels of float32 `x` (n, D): its own inverse.

    A block has as many channels as the largest power of two that divides D.
    """
    n, head_size = x.shape
    block, half = head_size & -head_size, 1
    while half < block:
        low, high = np.moveaxis(x.reshape(n, -1, 2, half), 2, 0)
        x = np.stack([low + high, low - high], axis=2).reshape(n, head_size)
        half *= 2
    return x * np.float32(block**-0.5)


def encode_decode(key: str, value: str, group_size: int, k: Array, v: Array) -> tuple[Array, Array]:
    """Keys and values (n, D) of one tile, n <= 32, there and back.

    Quantised keys share a scale per channel, quantised values per token and group of `group_size` channels. Values u2
    are rotated before, and back behind it.
    """
    n, head_size = k.shape
    back_k = round_trip(k.T, key).T
    if value not in QUANTISED:
        return back_k, round_trip(v, value)
    if value == "u2":
        v = rotate(np.clip(v.astype(np.float32), -F16_MAX, F16_MAX))
    back_v = round_trip(v.reshape(n, head_size // group_size, group_size), value).reshape(n, head_size)
    return back_k, rotate(back_v) if value == "u2" else back_v


def tile_bytes(
    key: str, value: str, head_size: int, group_size: int, listed: bool = False, with_mean: bool = False
) -> int:
    """Bytes of a tile: header; mean key; codes, scales, minima of keys; those of values; positions if listed.

    Parts are multiples of 64.
    """

    def round64(n: int) -> int:
        return -(-n // 64) * 64

    num_bytes = 64 + round64(TILE * head_size * BITS[key] // 8) + round64(TILE * head_size * BITS[value] // 8)
    if with_mean:
        num_bytes += round64(2 * head_size)
    if key in QUANTISED:
        num_bytes += 2 * round64(2 * head_size)
    if value in QUANTISED:
        num_bytes += 2 * round64(2 * TILE * head_size // group_size)
    return num_bytes + (4 * TILE if listed else 0)


def must_list(positions: Array) -> bool:
    """Whether a tile of tokens at these positions (n,) lists them: they do not ascend, or more than one gap is far."""
    gaps = np.diff(positions)
    return bool((gaps < 1).any() or (gaps > MAX_GAP).sum() > 1)


def num_recalled(recall_tokens: float, num_tokens: int) -> int:
    """Ranked tiles that a step reads of a head: of so many tokens, or of a fraction of what it holds."""
    tokens = math.ceil(recall_tokens * num_tokens) if recall_tokens < 1 else int(recall_tokens)
    return -(-tokens // TILE)


def num_target_tiles(num_tokens: int, recent_tokens: int) -> int:
    """Tiles of the target precision in a head of `num_tokens`: full ones without any of the newest `recent_tokens`."""
    return max(0, num_tokens - recent_tokens) // TILE


# -- attention


@dataclass(frozen=True)
class Layer:
    """Shape of a layer: query head h reads KV head h // (H / K); a window of 0 tokens is none; scale is of q . k.

    soft_cap: score = soft_cap * tanh(score / soft_cap), 0 = none. slopes (H,): score += slope * (position - that of the
    row). sinks (H,): a score more in the sum of the softmax.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    window: int
    scale: float
    soft_cap: float = 0.0
    slopes: tuple[float, ...] = ()
    sinks: tuple[float, ...] = ()


def probabilities(layer: Layer, head: int, q: Array, k: Array, positions: Array, row_positions: Array) -> Array:
    """Softmax (R, S) of rows q (R, D) of a query head over keys (S, D).

    A row at position p sees positions p - window + 1 .. p; a row that sees none has probabilities of 0.
    """
    age = row_positions[:, None].astype(np.int64) - positions[None, :].astype(np.int64)
    sees = (age >= 0) & ((age < layer.window) if layer.window else True)
    scores = q.astype(np.float64) @ k.astype(np.float64).T * layer.scale
    if layer.soft_cap:
        scores = layer.soft_cap * np.tanh(scores / layer.soft_cap)
    if layer.slopes:
        scores = scores - layer.slopes[head] * age
    logits = np.where(sees, scores, -np.inf)
    sink = np.full((len(q), 1), layer.sinks[head] if layer.sinks else -np.inf)
    top = np.concatenate([logits, sink], axis=1).max(axis=1, keepdims=True, initial=-1e300)
    weights = np.exp(logits - top)
    return np.asarray(weights / np.maximum(weights.sum(axis=1, keepdims=True) + np.exp(sink - top), 1e-300))


def reduce_rows(p: Array, how: str) -> Array:
    """Probabilities (W, S) of the scored rows as one number per token (S,)."""
    if how == "mean":
        return np.asarray(p.mean(axis=0))
    return np.asarray(p.max(axis=0, initial=0) if how == "max" else (p**2).sum(axis=0))
