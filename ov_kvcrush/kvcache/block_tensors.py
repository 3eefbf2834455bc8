"""Blocks of keys and values: one tensor of each per layer, which PagedAttention gets once, or the store."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov

from ov_kvcrush import native
from ov_kvcrush.errors import OutOfMemory
from ov_kvcrush.kvcache.block_pool import BLOCK_SIZE
from ov_kvcrush.model.graph.attention import AttentionLayer

_ALIGNMENT = 64  # bytes: one cache line, one AVX-512 register


@dataclass(frozen=True)
class BlockLayout:
    """Keys or values of one layer, "key_cache.<layer>" or "value_cache.<layer>"; block_shape: (K, rows, columns)."""

    name: str
    block_shape: tuple[int, int, int]
    element_type: ov.Type

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return math.prod(self.block_shape) * self.element_type.bitwidth // 8


def cache_inputs(compiled: ov.CompiledModel) -> list[BlockLayout]:
    """The tensors that PagedAttention reads and writes, as the compiled model wants them."""
    ports = [p for p in compiled.inputs if p.any_name.startswith(("key_cache.", "value_cache."))]
    shapes = [tuple(p.partial_shape[i].get_length() for i in (1, 2, 3)) for p in ports]
    return [BlockLayout(p.any_name, shape, p.element_type) for p, shape in zip(ports, shapes, strict=True)]


def staging_tensors(layers: Sequence[AttentionLayer], precision: str) -> list[BlockLayout]:
    """The same tensors where there is no PagedAttention."""
    return [
        BlockLayout(f"{kind}_cache.{i}", (layer.num_kv_heads, BLOCK_SIZE, layer.head_size), getattr(ov.Type, precision))
        for i, layer in enumerate(layers)
        for kind in ("key", "value")
    ]


class BlockTensors:
    """Blocks of keys and values: for each of `tensors` one `[num_blocks, K, rows, columns]`.

    The whole capacity is reserved as address space; the operating system gives memory to a block when it is first
    written. Growing by reallocation instead would copy the cache and bind 2 x layers tensors again.

    choose_blocks: from the bytes of one block over all layers to the number of blocks.
    """

    def __init__(self, tensors: Sequence[BlockLayout], choose_blocks: Callable[[int], int]) -> None:
        self._blocks = list(tensors)
        self.bytes_per_block = sum(x.block_bytes for x in tensors)
        self.num_blocks = choose_blocks(self.bytes_per_block)
        self._maps: list[mmap.mmap] = []
        self._buffers: list[np.ndarray] = []
        self._tensors: list[Any] = []
        self._layers = _pairs([x.name for x in tensors])
        self._reserve()

    def _reserve(self) -> None:
        try:
            for x in self._blocks:
                data = self._reserve_bytes(self.num_blocks * x.block_bytes)
                self._buffers.append(data.reshape(self.num_blocks, x.block_bytes))
                self._tensors.append(ov.Tensor(data, ov.Shape([self.num_blocks, *x.block_shape]), x.element_type))
        except (MemoryError, OSError):
            raise OutOfMemory(
                f"num_kv_blocks must fit into memory, got {self.num_blocks} blocks of {self.bytes_per_block} bytes; "
                "lower num_kv_blocks or cache_size"
            ) from None

    def _reserve_bytes(self, size: int) -> np.ndarray:
        if hasattr(mmap, "MAP_NORESERVE"):  # Linux: pages can be given back one by one
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_NORESERVE
            self._maps.append(mmap.mmap(-1, size, flags=flags))
            return np.frombuffer(self._maps[-1], np.uint8)
        raw = np.empty(size + _ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        return raw[start : start + size]

    def bind(self, request: ov.InferRequest) -> None:
        """Make the tensors the inputs of `request`."""
        for x, tensor in zip(self._blocks, self._tensors, strict=True):
            request.set_tensor(x.name, tensor)

    def copy_block(self, source: int, target: int) -> None:
        """Copy every layer's keys and values of one block."""
        for buffer in self._buffers:
            buffer[target] = buffer[source]

    def register(self, store: native.Store) -> None:
        """Let `store` read, and write where it has a kernel for prompts, the keys and values layer by layer."""
        for place, (key, value) in enumerate(self._layers):
            precision = self._blocks[key].element_type.get_type_name()
            store.set_staging(
                place, self._buffers[key].reshape(-1), self._buffers[value].reshape(-1), self.num_blocks, precision
            )

    def read(self, layer: int, blocks: np.ndarray, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of the first tokens in `blocks`, float32 (K, num_tokens, D) each."""
        keys, values = (self._read(index, blocks)[:, :num_tokens] for index in self._layers[layer])
        return keys, values

    def _read(self, index: int, blocks: np.ndarray) -> np.ndarray:
        heads, rows, columns = self._blocks[index].block_shape
        data = self._buffers[index][blocks]
        precision = self._blocks[index].element_type.get_type_name()
        if precision == "bf16":
            numbers = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            numbers = data.view(np.float16 if precision == "f16" else np.float32).astype(np.float32)
        by_block = numbers.reshape(len(blocks), heads, rows, columns)
        return by_block.transpose(1, 0, 2, 3).reshape(heads, len(blocks) * rows, columns)

    def discard(self, blocks: np.ndarray) -> None:
        """Give the memory of `blocks` back to the operating system; they can be written again at any time."""
        if not self._maps:
            return
        for begin, end in _runs(np.sort(blocks)):
            for data, buffer in zip(self._maps, self._buffers, strict=True):
                size = buffer.shape[1]
                start = -(-begin * size // mmap.PAGESIZE) * mmap.PAGESIZE
                length = (end * size // mmap.PAGESIZE) * mmap.PAGESIZE - start
                if length > 0:
                    data.madvise(mmap.MADV_DONTNEED, start, length)

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all blocks, used or not."""
        return self.num_blocks * self.bytes_per_block


def _pairs(names: list[str]) -> list[tuple[int, int]]:
    """Indices of the key and the value cache of each layer among names such as "key_cache.0"."""
    keys, values = ({}, {})  # type: dict[int, int], dict[int, int]
    for index, name in enumerate(names):
        kind, _, layer = name.partition(".")
        (keys if kind == "key_cache" else values)[int(layer)] = index
    return [(keys[layer], values[layer]) for layer in sorted(keys)]


def _runs(blocks: np.ndarray) -> list[tuple[int, int]]:
    """Half-open ranges of consecutive numbers in a sorted array."""
    cuts = np.flatnonzero(np.diff(blocks) != 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(blocks, cuts) if len(part)]
