"""Exact zero points for Q4_1 and Q4_K weights, which openvino_genai's GGUF converter rounds to 4 bits.

Their groups of 32 mean `scale * q - minimum`; the converter stores `scale * (q - zero)` with `zero = minimum / scale`
rounded to a whole number in 0..15. What rounding leaves is the same for all 32 weights of a group, so a product loses
`scale * (zero - rounded)` times the sum of the group's inputs: a MatMul 32 times as small gives it back. Zero points in
float16 are exact, too, but the CPU plugin then has no integer product (openvino 2026.4): Qwen2.5-Coder-1.5B Q4_K_M
takes 245 and 242 ms a token with them, 224 and 214 so (2 cores of an Intel Xeon, 2.5 GHz, AVX-512 with VNNI).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ov_kvcrush.model.gguf.reader import GgufHeader, GgufTensor

GROUP = 32
XML = "openvino_model.xml"

# 4-bit values uint8 (rows, groups, 32); scales and minima float32 (rows, groups)
Decoded = tuple[np.ndarray, np.ndarray, np.ndarray]
Sums = dict[Any, Any]  # output that enters a product -> sums of its groups of 32


def restore_zero_points(header: GgufHeader, gguf: Path, folder: Path) -> int:
    """Make the Q4_1 and Q4_K weights of the model in `folder` mean what the file says; return how many were changed.

    Those of products get whole zero points and a second product, those that are looked up float16 zero points.
    Rows are recognised by their content, because the converter reorders those of queries and keys. A matrix that is
    not recognised whole stays as the converter made it.
    """
    tensors = [tensor for tensor in header.tensors.values() if tensor.type_name in DECODERS]
    if not tensors:
        return 0
    import openvino as ov

    zeros = _zeros_by_row(tensors, gguf)
    core = ov.Core()
    core.set_property({"ENABLE_MMAP": False})  # the file that the weights would be mapped from is replaced below
    model = core.read_model(folder / XML)
    sums: Sums = {}
    changed = sum(_restore(node, zeros, sums) for node in model.get_ordered_ops() if node.get_type_name() == "Subtract")
    if changed:
        model.validate_nodes_and_infer_types()
        ov.save_model(model, folder / f"exact_{XML}", compress_to_fp16=False)
        del model
        for end in (".bin", ".xml"):
            (folder / f"exact_openvino_model{end}").replace(folder / f"openvino_model{end}")
    return changed


def _zeros_by_row(tensors: list[GgufTensor], gguf: Path) -> dict[bytes, np.ndarray]:
    """Map a row's packed 4-bit values and float16 scales to its zero points, float16 (groups,)."""
    data = np.memmap(gguf, np.uint8, "r")
    zeros: dict[bytes, np.ndarray] = {}
    limit = np.finfo(np.float16).max
    for tensor in tensors:
        num_rows = math.prod(tensor.dims[1:])
        rows = data[tensor.start : tensor.start + tensor.num_bytes].reshape(num_rows, -1)
        values, scale, minimum = DECODERS[tensor.type_name](rows)
        zero = np.zeros(scale.shape, np.float32)
        np.divide(minimum, scale, out=zero, where=scale != 0)
        packed = (values[:, :, 0::2] | values[:, :, 1::2] << 4).reshape(num_rows, -1)
        stored = scale.astype(np.float16)
        for index, row in enumerate(np.clip(zero, -limit, limit).astype(np.float16)):
            zeros[packed[index].tobytes() + stored[index].tobytes()] = row
    return zeros


def _decode_q4_1(rows: np.ndarray) -> Decoded:
    """Blocks of 32: scale and minimum (float16), 16 bytes: values 0..15 in the low halves, 16..31 in the high ones."""
    blocks = rows.reshape(len(rows), -1, 20)
    values = np.concatenate([blocks[:, :, 4:] & 15, blocks[:, :, 4:] >> 4], axis=-1)
    return values, halves(blocks[:, :, 0:2]), -halves(blocks[:, :, 2:4])


def _decode_q4_k(rows: np.ndarray) -> Decoded:
    """Blocks of 256: two float16, which multiply the 6-bit scales and minima of 8 groups (12 bytes), 128 bytes."""
    blocks = rows.reshape(len(rows), -1, 144)
    quarters = blocks[:, :, 16:].reshape(len(rows), -1, 4, 1, GROUP)
    values = np.concatenate([quarters & 15, quarters >> 4], axis=3).reshape(len(rows), -1, GROUP)
    scale, minimum = k_scales_and_minima(blocks.reshape(-1, 144))
    return values, scale.reshape(len(rows), -1), minimum.reshape(len(rows), -1)


def k_scales_and_minima(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of blocks (blocks, bytes) of Q4_K or Q5_K, which begin alike: float32 (blocks, 8) each."""
    low, high, mixed = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = np.concatenate([low & 63, (mixed & 15) | (low >> 6) << 4], axis=-1)
    minimum = np.concatenate([high & 63, (mixed >> 4) | (high >> 6) << 4], axis=-1)
    return halves(blocks[:, None, 0:2]) * scale, halves(blocks[:, None, 2:4]) * minimum


def halves(pairs: np.ndarray) -> np.ndarray:
    """Bytes (rows, blocks, 2) as float16 numbers, widened to float32 (rows, blocks)."""
    return np.ascontiguousarray(pairs).view(np.float16)[:, :, 0].astype(np.float32)


# Type name -> decoder of its rows, uint8 (rows, bytes per row).
DECODERS: dict[str, Callable[[np.ndarray], Decoded]] = {"Q4_1": _decode_q4_1, "Q4_K": _decode_q4_k}


def _restore(subtract: Any, zeros: dict[bytes, np.ndarray], sums: Sums) -> bool:
    """Make one `scale * (q - zero)` exact if each row of `q` (rows, groups, 32) is known."""
    import openvino.opset13 as ops

    weights = _constant_behind(subtract, 0)
    users = list(subtract.output(0).get_target_inputs())
    if weights is None or weights.get_element_type().get_type_name() != "u4" or len(users) != 1:
        return False
    multiply = users[0].get_node()
    scales = multiply.input_value(1).get_node()
    if multiply.get_type_name() != "Multiply" or scales.get_type_name() != "Constant" or len(weights.shape) != 3:
        return False
    num_rows, groups, size = weights.shape
    scale = scales.data
    if size != GROUP or scale.dtype != np.float16 or scale.size != num_rows * groups:
        return False
    packed = weights.data.view(np.uint8).reshape(num_rows, -1)
    scale = scale.reshape(num_rows, groups)
    found = [zeros.get(packed[i].tobytes() + scale[i].tobytes()) for i in range(num_rows)]
    rows = [row for row in found if row is not None]
    if len(rows) != num_rows:
        return False
    zero = np.stack(rows)
    product = _only_product(multiply)
    if product is None:
        subtract.input(1).replace_source_output(ops.constant(zero[:, :, None]).output(0))
        return True
    whole = np.clip(np.rint(zero.astype(np.float32)), 0, 15)
    subtract.input(1).replace_source_output(_u4(whole.astype(np.uint8)[:, :, None]))
    left = (whole - zero.astype(np.float32)) * scale.astype(np.float32)
    _add_product(product, left.astype(np.float16), sums)
    return True


def _only_product(node: Any) -> Any:
    """The MatMul whose second input a weight is, by way of Reshape and Convert; None if it has other readers."""
    while node.get_type_name() in ("Multiply", "Reshape", "Convert"):
        users = list(node.output(0).get_target_inputs())
        if len(users) != 1:
            return None
        if users[0].get_node().get_type_name() == "MatMul":
            product = users[0].get_node()
            attributes = product.get_attributes()
            fits = users[0].get_index() == 1 and attributes["transpose_b"] and not attributes["transpose_a"]
            return product if fits else None
        node = users[0].get_node()
    return None


def _u4(values: np.ndarray) -> Any:
    """uint8 of at most 15 as a u4 constant, in float16."""
    import openvino as ov
    import openvino.opset13 as ops

    flat = np.concatenate([values.reshape(-1), np.zeros(values.size % 2, np.uint8)])
    tensor = ov.Tensor(ov.Type.u4, ov.Shape(values.shape))
    tensor.data[:] = flat[0::2] | flat[1::2] << 4
    return ops.convert(ov.op.Constant(tensor), "f16").output(0)


def _add_product(product: Any, left: np.ndarray, sums: Sums) -> None:
    """Add to a MatMul's output the sums of its input's groups times `left`, float16 (rows, groups)."""
    import openvino.opset13 as ops

    inputs, readers = product.input_value(0), list(product.output(0).get_target_inputs())
    if inputs not in sums:
        groups = ops.reshape(inputs, np.array([0, 0, left.shape[1], GROUP], np.int64), special_zero=True)
        sums[inputs] = ops.reduce_sum(groups, np.array([3], np.int64), keep_dims=False)
    constant = ops.convert(ops.constant(left), "f32")
    added = ops.add(product, ops.matmul(sums[inputs], constant, transpose_a=False, transpose_b=True))
    for reader in readers:
        reader.replace_source_output(added.output(0))


def _constant_behind(node: Any, index: int) -> Any:
    source = node.input_value(index).get_node()
    if source.get_type_name() == "Convert":
        source = source.input_value(0).get_node()
    return source if source.get_type_name() == "Constant" else None
