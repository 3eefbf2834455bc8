"""The C++ core under the address, undefined behaviour and thread sanitizers: its own tests run clean."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "ov_kvcrush" / "native"
PROGRAMS = sorted((ROOT / "tests" / "native").glob("*.cpp"))
COMPILER = shutil.which("g++") or shutil.which("clang++") or ""

# With an allocation per tile, the address sanitizer sees reads beyond a tile; threads are to meet in the real arena.
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DCRUSH_ARENA_MALLOC"],
    "thread": ["-fsanitize=thread", "-DCRUSH_SCALAR_ONLY"],  # threads meet in the store, not within a kernel
}
# Failing allocations are counted, so they fail in one thread.
CASES = [(n, p) for n in SANITIZERS for p in PROGRAMS if (n, p.stem) != ("thread", "test_failures")]


def core(flags: list[str]) -> dict[Path, list[str]]:
    """The sources that need neither OpenVINO nor Python, with the instruction set that each is compiled for."""
    text = (NATIVE / "core.cmake").read_text()
    names = text.split("set(CRUSH_CORE_SOURCES", 1)[1].split(")", 1)[0].split()
    options = dict(re.findall(r'SOURCE_DIR\}/([\w/]+\.cpp) PROPERTIES COMPILE_OPTIONS\s+"([^"]+)"', text))
    if platform.machine().lower() in ("x86_64", "amd64") and "-DCRUSH_SCALAR_ONLY" not in flags:
        names = [*options, *names]  # those take longest
    return {NATIVE / "src" / name: options[name].split(";") if name in options else [] for name in names}


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{output[-8000:]}"
    return output


def compiled(source: Path, folder: Path, flags: list[str], optimised: bool) -> Path:
    """The object file. Checks make kernels long: with -O1 a file of them takes g++ 12 up to 120 s, with -O0 35."""
    target = folder / f"{source.stem}.o"
    level = "-O1" if optimised else "-O0"
    run(COMPILER, "-std=c++17", level, "-g1", *flags, "-I", NATIVE / "src", "-c", source, "-o", target)
    return target


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Future[str]]:
    """What each program prints under each sanitizer. Two compilers or programs at a time; all of it begins here."""
    if not COMPILER:
        pytest.skip("there is no C++ compiler")
    threads = ThreadPoolExecutor(2)
    made: dict[tuple[str, Path], Future[Path]] = {}
    for name, flags in SANITIZERS.items():
        folder = tmp_path_factory.mktemp(name)
        for source, own_flags in (core(flags) | {program: [] for program in PROGRAMS}).items():
            optimised = not any(flag.startswith("-mavx") for flag in own_flags)
            made[name, source] = threads.submit(compiled, source, folder, [*flags, *own_flags], optimised)

    def linked_and_run(name: str, program: Path) -> str:
        objects = [made[name, source].result() for source in (*core(SANITIZERS[name]), program)]
        target = objects[-1].with_suffix("")
        run(COMPILER, *SANITIZERS[name], "-pthread", *objects, "-o", target)
        return run(target)

    return {(n, p.stem): threads.submit(linked_and_run, n, p) for n, p in CASES}


@pytest.mark.parametrize(("sanitizer", "program"), [(name, program.stem) for name, program in CASES])
def test_runs_clean(outputs: dict[tuple[str, str], Future[str]], program: str, sanitizer: str) -> None:
    output = outputs[sanitizer, program].result()
    assert "Sanitizer" not in output, output


def test_there_are_programs_to_run() -> None:
    assert PROGRAMS
