"""The machine and the versions that a measurement belongs to."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from ov_kvcrush import __version__, native

ISA_FLAGS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
)


def describe_environment() -> dict[str, Any]:
    """Return JSON values; None where the system does not tell."""
    cpuinfo = _read("/proc/cpuinfo")
    return {
        "cpu": _field(cpuinfo, "model name") or platform.processor() or platform.machine(),
        "threads": usable_threads(),
        "isa": _isa(cpuinfo),
        "total_memory_bytes": _total_memory_bytes(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {
            "openvino": metadata.version("openvino"),
            "openvino_genai": metadata.version("openvino-genai"),
            "ov_kvcrush": __version__,
        },
        "kernel": _kernel(),
    }


def _kernel() -> str:
    """The attention of our engine, with the instruction set of its kernels where they are our own."""
    return f"CrushAttention {native.info()['isa']}" if native.available() else "PagedAttention"


def usable_threads() -> int | None:
    """Logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _isa(cpuinfo: str) -> dict[str, bool] | None:
    flags = _field(cpuinfo, "flags") or _field(cpuinfo, "Features")
    return None if flags is None else {name: name in flags.split() for name in ISA_FLAGS}


def _total_memory_bytes() -> int | None:
    """Physical memory, or the limit of this process's group if that is lower."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(total, int(limit)) if limit.isdigit() else total


def _field(cpuinfo: str, name: str) -> str | None:
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
