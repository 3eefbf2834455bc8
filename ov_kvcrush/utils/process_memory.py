"""Memory of this process and memory that it could still get, as the operating system tells it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FALLBACK_FREE_BYTES = 4 << 30  # where the operating system does not say what is free

# Files of a cgroup: its limit, what it uses, and what of that are cached files not used lately.
_CGROUP_V2 = ("memory.max", "memory.current", "inactive_file")
_CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_memory_bytes(root: Path = Path("/")) -> int:
    """Memory that this process could still get without swapping: what the machine has, and each cgroup that it is in.

    root: of the file system with /proc and /sys.
    """
    limits = list(_cgroup_free(root))
    try:
        limits.append(_numbers(root / "proc/meminfo")["MemAvailable:"] * 1024)
    except (OSError, KeyError, ValueError):
        if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
            limits.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(min(limits, default=_FALLBACK_FREE_BYTES), 0)


def _cgroup_free(root: Path) -> Iterator[int]:
    """Bytes free in the process's own cgroup and in each above it, where they have a limit (Linux; v1 and v2)."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            names, mount = _CGROUP_V2, root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            names, mount = _CGROUP_V1, root / "sys/fs/cgroup/memory"
        else:
            continue
        # In a container the path may be the host's, of which only the end is there: what is not is passed over.
        own = Path(path.lstrip("/"))
        for group in (own, *own.parents):
            free = _free_in(mount / group, *names)
            if free is not None:
                yield free


def _free_in(group: Path, limit: str, used: str, cache: str) -> int | None:
    """Bytes that a cgroup may still take; cached files give way. None where it has no limit."""
    try:
        most, now = int((group / limit).read_text()), int((group / used).read_text())
    except (OSError, ValueError):  # "max" among them
        return None
    try:
        stat = _numbers(group / "memory.stat")
    except (OSError, ValueError):
        stat = {}
    return most - max(now - stat.get(cache, 0), 0)


def _numbers(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    words = (line.split() for line in path.read_text().splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}


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
