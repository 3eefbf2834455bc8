"""Random compressed weights, as native.Product takes them and as they stand in a graph."""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino.opset15 as ops

from reference.product import Weights


def random_weights(rng: np.random.Generator, bits: int, num_outputs: int, num_inputs: int, group: int) -> Weights:
    """Outputs of inputs of about 1 are about 1, too."""
    codes = rng.integers(0, 2**bits, (num_outputs, num_inputs), dtype=np.uint8)
    shape = num_outputs, num_inputs // group
    scales = rng.uniform(2, 6, shape) / 2**bits / num_inputs**0.5
    zeros = rng.integers(0, 2**bits, shape) + rng.choice([0, 0.25, -0.5], shape)
    return bits, packed(codes, bits), half_bits(scales), half_bits(zeros)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes uint8 (N, K), of 4 bits (N, K / 2)."""
    return codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4


def half_bits(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).view(np.uint16)


def in_graph(weights: Weights) -> ov.Node:
    """(code - zero point) * scale as f32 [N, K]: groups are folded by a Reshape."""
    bits, codes, scales, zeros = weights
    num_outputs, num_groups = scales.shape
    num_inputs = codes.shape[1] * 8 // bits
    shape = [num_outputs, num_inputs] if num_groups == 1 else [num_outputs, num_groups, num_inputs // num_groups]
    last = [num_outputs, 1] if num_groups == 1 else [num_outputs, num_groups, 1]
    constant = ops.constant(ov.Tensor(np.ascontiguousarray(codes), shape, ov.Type.u8 if bits == 8 else ov.Type.u4))
    floats = ops.convert(constant, "f16")
    shifted = ops.subtract(floats, ops.constant(zeros.view(np.float16).reshape(last)))
    scaled = ops.multiply(shifted, ops.constant(scales.view(np.float16).reshape(last)))
    if num_groups > 1:
        scaled = ops.reshape(scaled, ops.constant(np.array([num_outputs, num_inputs], np.int64)), False)
    return ops.convert(scaled, "f32")
