"""Products of few rows with compressed weights in numpy: native/src/kernels/product.hpp."""

from __future__ import annotations

import numpy as np

INPUT_GROUP, SMALL_INPUT_GROUP = 32, 16
Weights = tuple[int, np.ndarray, np.ndarray, np.ndarray]  # bits, codes, scales, zeros: as native.Product takes them


def unpacked(weights: Weights) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (N, K), scales and zero points (N, K / G) as float64."""
    bits, codes, scales, zeros = weights
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
    return codes.astype(np.float64), *(x.view(np.float16).astype(np.float64) for x in (scales, zeros))


def decompressed(weights: Weights) -> np.ndarray:
    """w (N, K) = (code - zero point) * scale."""
    codes, scales, zeros = unpacked(weights)
    group = codes.shape[1] // scales.shape[1]
    return (codes - zeros.repeat(group, axis=1)) * scales.repeat(group, axis=1)


def input_group(weights: Weights) -> int:
    """Inputs of a row that share a scale."""
    codes, scales, _ = unpacked(weights)
    group = codes.shape[1] // scales.shape[1]
    return SMALL_INPUT_GROUP if group % INPUT_GROUP else INPUT_GROUP


def quantised(x: np.ndarray, group: int) -> np.ndarray:
    """Rows (M, K) as products see them: in 8 bits, with a scale for each `group` inputs. float64.

    What decides between two codes is rounded to float32 as there: the multiple of the scale, 128 added.
    """
    groups = x.astype(np.float32).reshape(len(x), -1, group)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    inverse = np.float32(127) / np.where(largest == 0, np.float32(1), largest)
    codes = np.rint((groups.astype(np.float64) * inverse + 128).astype(np.float32)) - 128.0
    return (codes.astype(np.float64) * (largest / np.float32(127))).reshape(x.shape)


def linear(x: np.ndarray, weights: Weights) -> np.ndarray:
    """x (M, K) quantised, times w transposed: (M, N), float64."""
    return quantised(x, input_group(weights)) @ decompressed(weights).T


def activated(x: np.ndarray, activation: str) -> np.ndarray:
    """x * sigmoid(x), or GELU by its tanh."""
    if activation == "silu":
        return np.asarray(x / (1 + np.exp(-x)))
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


def mlp(x: np.ndarray, gate: Weights, up: Weights, down: Weights, activation: str = "silu") -> np.ndarray:
    """down(activation(gate(x)) * up(x)), (M, N)."""
    return linear(activated(linear(x, gate), activation) * linear(x, up), down)
