"""The memory of the KV cache: one key and one value tensor per layer, bound to the inference request once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from ov_kvcrush.config import SchedulerConfig
from ov_kvcrush.engine.block_pool import BLOCK_SIZE
from ov_kvcrush.errors import OutOfMemory

_ALIGNMENT = 64  # bytes: one cache line, one AVX-512 register
_FALLBACK_FREE_BYTES = 4 << 30  # where the operating system does not say what is free
_FREE_MEMORY_SHARE = 0.5  # of the free memory, taken by a cache without a given size


def free_memory_bytes() -> int:
    """Memory that this process could still get without swapping, as the operating system and its cgroup say."""
    limits = []
    try:
        meminfo = Path("/proc/meminfo").read_text()
        limits.append(int(next(x for x in meminfo.splitlines() if x.startswith("MemAvailable")).split()[1]) * 1024)
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        if limit != "max":
            limits.append(int(limit) - int(used))
    except (OSError, StopIteration, ValueError):
        if not limits and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
            limits.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(min(limits, default=_FALLBACK_FREE_BYTES), 0)


class KVCache:
    """Key and value tensors `[num_blocks, K, rows, columns]` of every layer, as the compiled model wants them.

    The whole capacity is reserved as address space; the operating system gives memory to a block when it is first
    written. Growing by reallocation instead would copy the cache and bind 2 x layers tensors again.
    """

    def __init__(self, compiled: ov.CompiledModel, config: SchedulerConfig) -> None:
        self._ports = [p for p in compiled.inputs if p.any_name.startswith(("key_cache.", "value_cache."))]
        self._block_shapes = [[p.partial_shape[i].get_length() for i in (1, 2, 3)] for p in self._ports]
        self._block_bytes = [
            int(np.prod(shape)) * port.element_type.bitwidth // 8
            for shape, port in zip(self._block_shapes, self._ports, strict=True)
        ]
        self.bytes_per_block = sum(self._block_bytes)
        self.num_blocks = self._capacity(config)
        self._buffers: list[np.ndarray] = []
        self._tensors: list[Any] = []
        self._reserve()

    def _capacity(self, config: SchedulerConfig) -> int:
        if config.num_kv_blocks:
            return config.num_kv_blocks
        wanted = int(config.cache_size * (1 << 30)) or int(free_memory_bytes() * _FREE_MEMORY_SHARE)
        num_blocks = wanted // self.bytes_per_block
        if num_blocks < 1:
            raise OutOfMemory(
                f"cache_size must be at least one block of {BLOCK_SIZE} tokens, {self.bytes_per_block} bytes, "
                f"got {wanted} bytes"
            )
        return num_blocks

    def _reserve(self) -> None:
        try:
            for port, shape, size in zip(self._ports, self._block_shapes, self._block_bytes, strict=True):
                raw = np.empty(self.num_blocks * size + _ALIGNMENT, np.uint8)
                start = -raw.ctypes.data % _ALIGNMENT
                data = raw[start : start + self.num_blocks * size]
                self._buffers.append(data.reshape(self.num_blocks, size))
                self._tensors.append(ov.Tensor(data, ov.Shape([self.num_blocks, *shape]), port.element_type))
        except MemoryError:
            raise OutOfMemory(
                f"num_kv_blocks must fit into memory, got {self.num_blocks} blocks of {self.bytes_per_block} bytes; "
                "lower num_kv_blocks or cache_size"
            ) from None

    def bind(self, request: ov.InferRequest) -> None:
        """Make the tensors the inputs of `request`."""
        for port, tensor in zip(self._ports, self._tensors, strict=True):
            request.set_tensor(port, tensor)

    def copy_block(self, source: int, target: int) -> None:
        """Copy every layer's keys and values of one block."""
        for buffer in self._buffers:
            buffer[target] = buffer[source]

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all blocks, used or not."""
        return self.num_blocks * self.bytes_per_block
