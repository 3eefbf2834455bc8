"""Memory of this process and memory that it could still get, as the operating system tells it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FALLBACK_FREE_BYTES = 4 << 30  # where the operating system does not say what is free


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


def rss_bytes() -> int | None:
    """Resident size now, None where it is not known."""
    return _status("VmRSS")


def peak_rss_bytes() -> int | None:
    """Largest resident size so far, or since `reset_peak` said True."""
    # Not ru_maxrss first: on Linux a child starts with the peak of the process that forked it.
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> bool:
    """Let the peak start anew from the resident size of now. False where that cannot be, and then nothing changes."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def growth(before: int | None, after: int | None) -> int | None:
    """The difference, None where one of them is not known."""
    return None if before is None or after is None else after - before


def _status(name: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
    except (OSError, StopIteration):
        return None
