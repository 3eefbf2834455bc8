"""Weights of GGUF types that openvino_genai's converter does not know, as the nearest type that it does.

Q5_0 and IQ4_NL become Q8_0 with the same scales and numbers: nothing changes. IQ4_XS as well, and Q3_K as Q6_K, but for
the product of two scales, which becomes a float16 (2^-11 of it). Q5_1, Q5_K and Q2_K have minima, which Q8_0 has not:
a weight moves by at most 1/254 of the largest of its group of 32.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ov_kvcrush.errors import ModelError
from ov_kvcrush.model.gguf.reader import (
    DEFAULT_ALIGNMENT,
    TENSOR_TYPES,
    GgufHeader,
    GgufTensor,
    read_gguf_header,
)
from ov_kvcrush.model.gguf.zero_points import halves, k_scales_and_minima

GROUP = 32
CHUNK_WEIGHTS = 1 << 20  # that are in memory at a time
_TYPE_NUMBERS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}

# Levels of IQ4_NL and IQ4_XS, ggml-common.h.
IQ4_LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8
)  # fmt: skip


def requantized_bytes(header: GgufHeader) -> int:
    """Bytes of the file that `requantize` would write, but for its header; 0 if it has nothing to do."""
    if all(tensor.type_name not in TARGETS for tensor in header.tensors.values()):
        return 0
    return sum(_new_bytes(tensor) for tensor in header.tensors.values())


def requantize(header: GgufHeader, source: Path, target: Path) -> GgufHeader:
    """Write `source` to `target` with other types of weights, and return the header of that.

    Raises ModelError naming the tensor if its scales are not finite.
    """
    data = np.memmap(source, np.uint8, "r")
    alignment = header.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    tensors = list(header.tensors.values())
    with open(target, "wb") as file:
        file.write(data[: header.table_start].tobytes())
        offset = 0
        for tensor in tensors:
            name = tensor.name.encode()
            kind = _TYPE_NUMBERS[TARGETS.get(tensor.type_name, tensor.type_name)]
            file.write(struct.pack("<Q", len(name)) + name + struct.pack("<I", len(tensor.dims)))
            file.write(struct.pack(f"<{len(tensor.dims)}QIQ", *tensor.dims, kind, offset))
            offset += -(-_new_bytes(tensor) // alignment) * alignment
        for tensor in tensors:
            file.write(bytes(-file.tell() % alignment))
            _write_weights(tensor, data, file.write)
        file.flush()
        os.fsync(file.fileno())
    return read_gguf_header(target)


def requantized_rows(type_name: str, rows: np.ndarray) -> np.ndarray:
    """Rows of weights, uint8 (rows, bytes), in the type TARGETS[type_name]: uint8 (rows, bytes)."""
    per_block, block_bytes = TENSOR_TYPES[_TYPE_NUMBERS[type_name]][1:]
    assert rows.shape[1] % block_bytes == 0, per_block
    return _ENCODERS[type_name](rows.reshape(-1, block_bytes)).reshape(len(rows), -1)


def _new_bytes(tensor: GgufTensor) -> int:
    _, per_block, block_bytes = TENSOR_TYPES[_TYPE_NUMBERS[TARGETS.get(tensor.type_name, tensor.type_name)]]
    return math.prod(tensor.dims) // per_block * block_bytes


def _write_weights(tensor: GgufTensor, data: np.ndarray, write: Callable[[bytes], object]) -> None:
    content = data[tensor.start : tensor.start + tensor.num_bytes]
    if tensor.type_name not in TARGETS:
        write(content.tobytes())
        return
    rows = content.reshape(math.prod(tensor.dims[1:]), -1)
    at_once = max(1, CHUNK_WEIGHTS // tensor.dims[0])
    for first in range(0, len(rows), at_once):
        try:
            write(requantized_rows(tensor.type_name, rows[first : first + at_once]).tobytes())
        except FloatingPointError:
            raise ModelError(f"tensor {tensor.name!r} must have finite scales, got others: it is damaged") from None


# Each takes blocks uint8 (blocks, bytes) and returns those of the target type.


def _from_q5_0(blocks: np.ndarray) -> np.ndarray:
    """Scale; 32 fifth bits; 16 bytes: values 0..15 in the low halves, 16..31 in the high ones. Less 16."""
    codes = _nibbles(blocks[:, 6:]) | _bits(blocks[:, 2:6]) << 4
    return _q8_0(blocks[:, :2], codes.astype(np.int8) - 16)


def _from_q5_1(blocks: np.ndarray) -> np.ndarray:
    """As Q5_0, with a minimum behind the scale."""
    codes = _nibbles(blocks[:, 8:]) | _bits(blocks[:, 4:8]) << 4
    return _nearest_q8_0(codes * halves(blocks[:, None, 0:2]) + halves(blocks[:, None, 2:4]))


def _from_iq4_nl(blocks: np.ndarray) -> np.ndarray:
    """Scale; 16 bytes of indices of levels, as Q5_0."""
    return _q8_0(blocks[:, :2], IQ4_LEVELS[_nibbles(blocks[:, 2:])])


def _from_iq4_xs(blocks: np.ndarray) -> np.ndarray:
    """Scale; upper two bits of the scales of 8 groups; their lower four bits; 8 groups of 16 bytes, as IQ4_NL."""
    high = blocks[:, 2:4].copy().view("<u2").astype(np.int32) >> 2 * np.arange(8) & 3
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    scale = halves(blocks[:, None, 0:2]) * ((low | high << 4) - 32)
    limit = np.finfo(np.float16).max
    scales = np.clip(_finite(scale), -limit, limit).astype("<f2").reshape(-1, 1).view(np.uint8)
    return _q8_0(scales, IQ4_LEVELS[_nibbles(blocks[:, 8:].reshape(-1, 16))])


def _from_q5_k(blocks: np.ndarray) -> np.ndarray:
    """Scales and minima as Q4_K; 32 bytes of fifth bits, one of each group; 128 bytes as Q4_K."""
    scale, minimum = k_scales_and_minima(blocks)
    quarters = blocks[:, 48:].reshape(-1, 4, 1, GROUP)
    low = np.concatenate([quarters & 15, quarters >> 4], axis=2).reshape(-1, 8, GROUP)
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _nearest_q8_0((low | high << 4) * scale[:, :, None] - minimum[:, :, None])


def _from_q2_k(blocks: np.ndarray) -> np.ndarray:
    """16 scales and minima of 4 bits, which two float16 multiply, of groups of 16; 64 bytes of 2-bit values."""
    scale = halves(blocks[:, None, 80:82]) * (blocks[:, :16] & 15)
    minimum = halves(blocks[:, None, 82:84]) * (blocks[:, :16] >> 4)
    codes = _two_bits(blocks[:, 16:80]).reshape(-1, 16, 16)
    return _nearest_q8_0((codes * scale[:, :, None] - minimum[:, :, None]).reshape(-1, 8, GROUP))


def _from_q3_k(blocks: np.ndarray) -> np.ndarray:
    """32 bytes of third bits (0: less 4); 64 bytes of 2-bit values; 16 scales of 6 bits less 32; their scale."""
    third = blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    codes = _two_bits(blocks[:, 32:96]) + (third.reshape(-1, 256) << 2)
    low = np.concatenate([blocks[:, 96:104] & 15, blocks[:, 96:104] >> 4], axis=1)
    high = (blocks[:, None, 104:108] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3).reshape(-1, 16)
    scales = (low | high << 4).astype(np.int8) - 32
    _finite(halves(blocks[:, None, 108:110]))
    rows = (codes + (32 - 4)).astype(np.uint8).reshape(-1, 2, 4, GROUP)  # 6 bits less 32
    lower = (rows[:, :, :2] & 15 | (rows[:, :, 2:] & 15) << 4).reshape(-1, 128)
    upper = (rows >> 4 << np.arange(0, 8, 2, dtype=np.uint8)[:, None]).sum(axis=2, dtype=np.uint8).reshape(-1, 64)
    return np.concatenate([lower, upper, scales.view(np.uint8), blocks[:, 108:110]], axis=1)


def _nibbles(x: np.ndarray) -> np.ndarray:
    """(blocks, 16) to (blocks, 32): the low halves, then the high ones."""
    return np.concatenate([x & 15, x >> 4], axis=1)


def _bits(x: np.ndarray) -> np.ndarray:
    return np.unpackbits(x, axis=1, bitorder="little")


def _two_bits(x: np.ndarray) -> np.ndarray:
    """(blocks, 64) to (blocks, 256): each 32 bytes are four times 32 values, the low bits first."""
    return (x.reshape(-1, 2, 1, GROUP) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3).reshape(-1, 256)


def _finite(x: np.ndarray) -> np.ndarray:
    if not np.isfinite(x).all():
        raise FloatingPointError
    return x


def _q8_0(scales: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Float16 scales uint8 (blocks, 2), int8 (blocks, 32)."""
    _finite(scales.copy().view("<f2"))
    return np.concatenate([scales, codes.view(np.uint8)], axis=1)


def _nearest_q8_0(weights: np.ndarray) -> np.ndarray:
    weights = _finite(weights.reshape(-1, GROUP))
    scales = np.clip(np.abs(weights).max(axis=1, keepdims=True) / 127, 0, np.finfo(np.float16).max).astype("<f2")
    wide = scales.astype(np.float32)
    codes = np.divide(weights, wide, out=np.zeros_like(weights), where=wide > 0)
    return _q8_0(scales.view(np.uint8), np.clip(np.rint(codes), -127, 127).astype(np.int8))


_ENCODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q5_0": _from_q5_0,
    "Q5_1": _from_q5_1,
    "IQ4_NL": _from_iq4_nl,
    "IQ4_XS": _from_iq4_xs,
    "Q5_K": _from_q5_k,
    "Q2_K": _from_q2_k,
    "Q3_K": _from_q3_k,
}
TARGETS: dict[str, str] = {name: "Q6_K" if name == "Q3_K" else "Q8_0" for name in _ENCODERS}
