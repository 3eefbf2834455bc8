"""Compressed weights as they stand in a graph: read for `native.Product`, which multiplies with nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import openvino as ov

_SIGNED_ZERO = {"i8": 128, "i4": 8}  # of the codes once they are unsigned
_HALF = 16  # outputs, and inputs of the smallest group, come in multiples


class Weights(NamedTuple):
    """As native.Product takes them: codes uint8 (N, K), or (N, K / 2) of 4 bits; scales, zeros float16 as uint16."""

    bits: int
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.codes.shape[1] * 8 // self.bits // self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes once they are packed, the same as here."""
        return sum(array.nbytes for array in (self.codes, self.scales, self.zeros))


class Linear(NamedTuple):
    """A product in a graph. out: its node, with the correction of zero points where it has one; x: its rows."""

    out: ov.Node
    x: ov.Output
    weights: Weights


def read_linear(out: ov.Node) -> Linear | None:
    """The product that ends in `out`; None for what is no product with weights that our kernels read.

    Found: MatMul(x, w), and Add(MatMul(x, w), MatMul(sums, r)), where sums are those of x over the groups of w and r
    has what the zero points in w leave out, as models from GGUF have them. Then the zero points are z - r / scale.
    """
    if out.get_type_name() == "MatMul":
        weights = _weights_of(out)
        return None if weights is None else Linear(out, out.input_value(0), weights)
    if out.get_type_name() != "Add":
        return None
    for product, correction in (_sources(out), _sources(out)[::-1]):
        if product.get_type_name() != "MatMul" or correction.get_type_name() != "MatMul":
            continue
        source, weights = product.input_value(0), _weights_of(product)
        if weights is None or not _sums_groups(correction, source, weights.group):
            continue
        corrected = _corrected(weights, correction)
        if corrected is not None:
            return Linear(out, source, corrected)
    return None


def users(output: ov.Output) -> Iterator[ov.Node]:
    """The nodes that read `output`."""
    for target in output.get_target_inputs():
        yield target.get_node()


def constant_of(node: ov.Node) -> ov.Node | None:
    """The Constant behind conversions and changes of shape."""
    while node.get_type_name() in ("Convert", "Reshape", "Unsqueeze", "Squeeze"):
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def _sources(node: ov.Node) -> list[ov.Node]:
    return [value.get_node() for value in node.input_values()]


def _weights_of(product: ov.Node) -> Weights | None:
    """Weights [N, K] of MatMul(x, (code - zero point) * scale), scale and zero point per output and group of inputs."""
    attributes, shape = product.get_attributes(), product.input_value(1).get_partial_shape()
    if attributes["transpose_a"] or not attributes["transpose_b"] or shape.is_dynamic or len(shape) != 2:
        return None
    num_outputs, num_inputs = (d.get_length() for d in shape)
    scaled = product.input_value(1).get_node()
    while scaled.get_type_name() in ("Convert", "Reshape"):
        scaled = scaled.input_value(0).get_node()
    if scaled.get_type_name() != "Multiply":
        return None
    shifted, scale = _sources(scaled)
    zero: ov.Node | None = None
    if shifted.get_type_name() == "Subtract":
        shifted, zero_source = _sources(shifted)
        zero = constant_of(zero_source)
        if zero is None:
            return None
    codes, scales = constant_of(shifted), constant_of(scale)
    if codes is None or scales is None or codes.get_element_type().get_type_name() not in ("u8", "i8", "u4", "i4"):
        return None
    num_groups, rest = divmod(int(np.prod(list(scales.shape))), num_outputs)
    if rest or not num_groups or num_inputs % num_groups or num_outputs % _HALF:
        return None
    group = num_inputs // num_groups
    is_ordered = list(codes.shape) in ([num_outputs, num_inputs], [num_outputs, num_groups, group])
    if not is_ordered or scales.shape[0] != num_outputs or (group != _HALF and group % (2 * _HALF)):
        return None
    kind = codes.get_element_type().get_type_name()
    read_scales, zeros = _float16(scales), _zeros(zero, kind, (num_outputs, num_groups))
    if read_scales is None or zeros is None:
        return None
    bits = int(kind[1:])
    data = np.ascontiguousarray(codes.data).view(np.uint8).reshape(num_outputs, num_inputs * bits // 8)
    if kind in _SIGNED_ZERO:
        data = data ^ np.uint8(0x80 if bits == 8 else 0x88)
    return Weights(bits, data, _bits(read_scales.reshape(num_outputs, num_groups)), _bits(zeros))


def _zeros(zero: ov.Node | None, kind: str, shape: tuple[int, int]) -> np.ndarray | None:
    """Zero points of unsigned codes, float16, for each output and group; None if they are none."""
    signed = _SIGNED_ZERO.get(kind, 0)
    if zero is None:
        return np.full(shape, signed, np.float16)
    found = _float16(zero)
    if found is None or found.size not in (1, int(np.prod(shape))):
        return None
    return np.broadcast_to(found.reshape(shape if found.size > 1 else (1, 1)) + np.float16(signed), shape)


def _float16(constant: ov.Node) -> np.ndarray | None:
    """The numbers of a constant, float16; None where float16 has not all of them."""
    if constant.get_element_type().get_type_name() in ("u4", "i4"):
        values = _halves(constant)
    else:
        values = np.asarray(constant.data)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return half if np.array_equal(half.astype(values.dtype), values) and np.isfinite(half).all() else None


def _halves(constant: ov.Node) -> np.ndarray:
    """The numbers of a constant of 4 bits."""
    packed = np.ascontiguousarray(constant.data).view(np.uint8).ravel()
    values: np.ndarray = np.stack([packed & 15, packed >> 4], axis=-1).ravel()[: int(np.prod(list(constant.shape)))]
    if constant.get_element_type().get_type_name() == "u4":
        return values
    return (values ^ np.uint8(8)).astype(np.int8) - np.int8(8)


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint16)


def _sums_groups(correction: ov.Node, x: ov.Output, group: int) -> bool:
    """Whether a MatMul reads ReduceSum(Reshape(x, [.., K / G, G]), last axis)."""
    sums = correction.input_value(0).get_node()
    if sums.get_type_name() != "ReduceSum" or sums.get_attributes()["keep_dims"]:
        return False
    grouped, axes = sums.input_value(0).get_node(), constant_of(sums.input_value(1).get_node())
    if grouped.get_type_name() != "Reshape" or grouped.input_value(0) != x or axes is None:
        return False
    shape = grouped.output(0).get_partial_shape()
    is_last = np.asarray(axes.data).ravel().tolist() in ([-1], [len(shape) - 1])
    return is_last and len(shape) == len(x.get_partial_shape()) + 1 and shape[-1] == ov.Dimension(group)


def _corrected(weights: Weights, correction: ov.Node) -> Weights | None:
    constant = constant_of(correction.input_value(1).get_node())
    attributes = correction.get_attributes()
    if constant is None or attributes["transpose_a"] or not attributes["transpose_b"]:
        return None
    remainder = np.asarray(constant.data).astype(np.float32)
    scales = weights.scales.view(np.float16).astype(np.float32)
    if remainder.shape != scales.shape or (remainder[scales == 0] != 0).any():
        return None
    zeros = weights.zeros.view(np.float16) - remainder / np.where(scales == 0, 1, scales)
    return weights._replace(zeros=_bits(zeros.astype(np.float16)))
