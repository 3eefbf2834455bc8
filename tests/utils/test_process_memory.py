"""Free memory as the files of a made-up system say it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ov_kvcrush.utils.process_memory import free_memory_bytes

V1, V2 = ("limit_in_bytes", "usage_in_bytes"), ("max", "current")


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(place: str, names: tuple[str, str], limit: str, used: int, stat: str = "") -> dict[str, str]:
    values = {names[0]: limit, names[1]: str(used), "stat": stat}
    return {f"sys/fs/cgroup/{place}memory.{name}": text + "\n" for name, text in values.items()}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8000 * 1024),
        # Its own group, below one without a limit.
        ({"proc/self/cgroup": "0::/a/b\n", **group("a/b/", V2, "5000", 2000), **group("a/", V2, "max", 9)}, 3000),
        # The group above has less.
        ({"proc/self/cgroup": "0::/a/b\n", **group("a/b/", V2, "5000", 2000), **group("a/", V2, "3000", 2500)}, 500),
        # A container's own groups are at the root, whatever the path says.
        ({"proc/self/cgroup": "0::/host/x\n", **group("", V2, "5000", 1000)}, 4000),
        # Cached files give way.
        ({"proc/self/cgroup": "0::/\n", **group("", V2, "5000", 4000, "anon 1\ninactive_file 3000\n")}, 4000),
        ({"proc/self/cgroup": "0::/\n", **group("", V2, "5000", 6000)}, 0),
        # v1, beside controllers that are not of memory.
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/c\n4:memory:/c\n",
                **group("memory/c/", V1, "7000", 4000, "inactive_file 1\ntotal_inactive_file 500\n"),
            },
            3500,
        ),
        # The machine has less than the group.
        ({"proc/self/cgroup": "0::/\n", **group("", V2, str(1 << 60), 0)}, 8000 * 1024),
    ],
)
def test_the_least_of_machine_and_groups_is_free(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert free_memory_bytes(write(tmp_path, files)) == expected


def test_no_file_that_says_so_is_no_error(tmp_path: Path) -> None:
    assert free_memory_bytes(tmp_path) > 0
    damaged = {"proc/self/cgroup": "x\n0::/\n", **group("", V2, "many", 1)}
    assert free_memory_bytes(write(tmp_path, damaged)) == 8000 * 1024
