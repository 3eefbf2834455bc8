"""How fast this machine reads memory: the bound of attention, which reads the whole cache for each token."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ov_kvcrush.utils.process_memory import free_memory_bytes

_LEAST_BYTES = 256 << 20
_FREE_SHARE = 4  # at most this part of the free memory
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


class MemoryReader:
    """A large array that several threads read as fast as they can. What was in the caches before is not there after it.

    numpy's maximum is one vector instruction per 32 or 64 bytes and lets go of the interpreter lock: measured, it reads
    as fast as a C++ loop (16.3 and 16.4 GB/s on 2 cores of a Xeon); its sum reaches half of that.
    """

    def __init__(self, num_bytes: int, num_threads: int) -> None:
        data = np.ones(num_bytes // 4, np.int32)
        self._parts = np.array_split(data, num_threads)
        self._pool = ThreadPoolExecutor(num_threads)
        self._num_bytes = data.nbytes

    def read(self) -> float:
        """Read it once. Returns bytes per second."""
        start = time.perf_counter()
        for largest in self._pool.map(np.max, self._parts):
            assert largest == 1, "read something else than was written"
        return self._num_bytes / (time.perf_counter() - start)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def reader_bytes() -> int:
    """Bytes that are read long enough to time and are more than any cache holds: twice the largest."""
    sizes = [_bytes_of(path.read_text()) for path in _CACHES.glob("index*/size")]
    return min(max(_LEAST_BYTES, 2 * max(sizes, default=0)), free_memory_bytes() // _FREE_SHARE)


def _bytes_of(text: str) -> int:
    """Bytes of what Linux writes as "2048K"."""
    text = text.strip()
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text or 0)
