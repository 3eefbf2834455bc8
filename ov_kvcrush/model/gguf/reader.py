"""A strict reader of GGUF headers: every count is checked against the file's size before memory is taken for it."""

# Not gguf.GGUFReader (0.19): an array length of 2^40 in 60 bytes ran 15 s until killed, a string of 2^60 was accepted.

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ov_kvcrush.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32

# Sparse files are of any size at no cost, so a count that fits into the file may still take all memory. The largest
# headers known have 1.3 million items (tokens, scores, types, merges) in 16 MB.
MAX_HEADER_BYTES = 1 << 26
MAX_STRING_BYTES = 1 << 24
MAX_ITEMS = 1 << 22  # of all arrays together

# Metadata value types: number -> (struct format, bytes)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# Tensor types that files hold: number -> (name, elements per block, bytes per block)
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor table. dims: fastest-varying first, as in the file; start: absolute byte offset."""

    name: str
    type_name: str
    dims: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensor table of a GGUF file whose length covers all of them. table_start: where the table begins."""

    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    file_bytes: int
    table_start: int


def read_gguf_header(path: str | os.PathLike[str]) -> GgufHeader:
    """Read and check the header of a GGUF file; the weights themselves are not read.

    Raises ModelError if the file is no GGUF, of a version not known, damaged, or shorter than its header promises
    (with both numbers).
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise ModelError(f"{path} must be a GGUF file of at least 24 bytes, got {size} bytes")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data, size, str(path)))
    except OSError as error:
        raise ModelError(f"{path} must be a readable file, got: {error}") from None


class _Cursor:
    """Reads forward through the mapped file and refuses to pass its end."""

    def __init__(self, data: mmap.mmap, size: int, name: str) -> None:
        self.data, self.size, self.name, self.at = data, size, name, 0
        self.num_items = 0

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise ModelError(
                f"{self.name} must be complete: {what} at byte {self.at} needs {count} bytes, the file has "
                f"{self.size - self.at} more ({self.size} in all): it is truncated or damaged, fetch it again"
            )
        if self.at + count > MAX_HEADER_BYTES:
            raise self.wrong(
                f"the header must be of at most {MAX_HEADER_BYTES} bytes, got {what} up to byte {self.at + count}"
            )

    def need_items(self, count: int, item_bytes: int, what: str) -> None:
        self.need(item_bytes * count, f"{what} with {count} items")
        self.num_items += count
        if self.num_items > MAX_ITEMS:
            raise self.wrong(f"arrays must have at most {MAX_ITEMS} items together, got {self.num_items} with {what}")

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def text(self, what: str, strict: bool = True) -> str:
        length = self.number("Q", what)
        self.need(length, what)
        if length > MAX_STRING_BYTES:
            raise self.wrong(f"{what} must be of at most {MAX_STRING_BYTES} bytes, got {length}")
        raw = self.take(length, what)
        try:
            return raw.decode("utf-8", "strict" if strict else "replace")
        except UnicodeDecodeError:
            raise self.wrong(f"{what} must be UTF-8, got {raw[:40]!r}") from None

    def wrong(self, text: str) -> ModelError:
        return ModelError(f"{self.name}: {text} (near byte {self.at})")


def _parse(cursor: _Cursor) -> GgufHeader:
    magic = cursor.take(4, "the magic")
    if magic != MAGIC:
        raise cursor.wrong(f"the first four bytes must be {MAGIC!r}, got {magic!r}: this is not a GGUF file")
    version = cursor.number("I", "the version")
    if version not in VERSIONS:
        hint = " (a big-endian file)" if version & 0xFFFF == 0 and version else ""
        raise cursor.wrong(f"GGUF version must be one of {VERSIONS}, got {version}{hint}")
    num_tensors = cursor.number("Q", "the tensor count")
    num_keys = cursor.number("Q", "the metadata count")
    # The smallest entries possible: a key of 13 bytes (length, type, one-byte value), a tensor of 32.
    cursor.need(13 * num_keys + 32 * num_tensors, f"a header of {num_keys} keys and {num_tensors} tensors")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.text("a metadata key")
        if key in metadata:
            raise cursor.wrong(f"metadata keys must be unique, got {key!r} twice")
        metadata[key] = _value(cursor, cursor.number("I", f"the type of {key}"), key)
    return _tensor_table(cursor, version, metadata, num_tensors)


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind], key)
    if kind == _STRING:
        return cursor.text(key, strict=False)
    if kind != _ARRAY:
        raise cursor.wrong(f"the type of {key} must be 0 to 12, got {kind}")
    item = cursor.number("I", key)
    count = cursor.number("Q", key)
    if item == _STRING:
        cursor.need_items(count, 8, key)
        return [cursor.text(key, strict=False) for _ in range(count)]
    if item not in _SCALARS:
        raise cursor.wrong(f"items of {key} must be numbers or strings, got type {item}")
    code = _SCALARS[item]
    cursor.need_items(count, struct.calcsize("<" + code), key)
    return list(struct.unpack(f"<{count}{code}", cursor.take(struct.calcsize("<" + code) * count, key)))


def _tensor_table(cursor: _Cursor, version: int, metadata: dict[str, Any], num_tensors: int) -> GgufHeader:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment < 8 or alignment & (alignment - 1):
        raise cursor.wrong(f"general.alignment must be a power of two of at least 8, got {alignment!r}")
    table_start = cursor.at
    entries = [_tensor_entry(cursor, alignment) for _ in range(num_tensors)]
    start = -(-cursor.at // alignment) * alignment
    tensors = {name: GgufTensor(name, kind, dims, start + offset, count) for name, kind, dims, offset, count in entries}
    if len(tensors) != num_tensors:
        raise cursor.wrong(f"tensor names must be unique, got {num_tensors - len(tensors)} repeated")
    end = start
    for tensor in sorted(tensors.values(), key=lambda t: t.start):
        if tensor.start < end:
            raise cursor.wrong(f"tensors must not overlap, got {tensor.name!r} at byte {tensor.start}, before {end}")
        end = tensor.start + tensor.num_bytes
    if end > cursor.size:
        raise ModelError(
            f"{cursor.name} must be complete: its tensors end at byte {end}, the file has {cursor.size} bytes: "
            "it is truncated, fetch it again"
        )
    return GgufHeader(version, metadata, tensors, cursor.size, table_start)


def _tensor_entry(cursor: _Cursor, alignment: int) -> tuple[str, str, tuple[int, ...], int, int]:
    name = cursor.text("a tensor name")
    num_dims = cursor.number("I", f"the shape of {name}")
    if not 1 <= num_dims <= MAX_DIMS:
        raise cursor.wrong(f"tensor {name!r} must have 1 to {MAX_DIMS} dimensions, got {num_dims}")
    dims = tuple(cursor.number("Q", f"the shape of {name}") for _ in range(num_dims))
    kind = cursor.number("I", f"the type of {name}")
    if kind not in TENSOR_TYPES:
        raise cursor.wrong(f"tensor {name!r} must have a known type, got {kind}")
    type_name, per_block, block_bytes = TENSOR_TYPES[kind]
    if 0 in dims or dims[0] % per_block:
        raise cursor.wrong(f"tensor {name!r} must have rows of whole {type_name} blocks of {per_block}, got {dims}")
    offset = cursor.number("Q", f"the offset of {name}")
    if offset % alignment:
        raise cursor.wrong(f"tensor {name!r} must start at a multiple of {alignment}, got offset {offset}")
    return name, type_name, dims, offset, math.prod(dims) // per_block * block_bytes
