"""Processors of a replica: its own, whole cores of one socket where that is possible."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ov_kvcrush.errors import CrushError

_CPUS = Path("/sys/devices/system/cpu")
_TASKS = Path("/proc/self/task")


def cpus_of(rank: int, count: int, cpus: list[int]) -> list[int]:
    """The processors of the replica with this rank on its machine: `count` of `cpus`, none of which another has.

    Raises CrushError where there are not so many.
    """
    mine = cpus[rank * count : (rank + 1) * count]
    if len(mine) < count:
        raise CrushError(
            f"cores must leave {count} processors for replica {rank} of this machine, got {len(cpus)} in all"
        )
    return mine


def cpus_by_core(allowed: Iterable[int], folder: Path = _CPUS) -> list[int]:
    """Processors by socket and core, so that threads of one core stand beside each other."""

    def place(cpu: int) -> tuple[int, int, int]:
        topology = folder / f"cpu{cpu}" / "topology"
        try:
            socket, core = (int((topology / name).read_text()) for name in ("physical_package_id", "core_id"))
        except (OSError, ValueError):
            return (0, cpu, cpu)
        return (socket, core, cpu)

    return sorted(allowed, key=place)


def pin(cpus: Iterable[int]) -> None:
    """Have the threads that this process has, and those that they start, run on these processors only."""
    wanted = set(cpus)
    for task in os.listdir(_TASKS):
        try:
            os.sched_setaffinity(int(task), wanted)
        except ProcessLookupError:  # it has ended
            continue
