"""The C++ core under the address, undefined behaviour and thread sanitizers: its own tests run clean."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NATIVE = ROOT / "ov_kvcrush" / "native"
PROGRAMS = sorted((ROOT / "tests" / "native").glob("*.cpp"))
COMPILER = shutil.which("g++") or shutil.which("clang++") or ""

# With an allocation per tile, the address sanitizer sees reads beyond a tile; threads are to meet in the real arena.
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DCRUSH_ARENA_MALLOC"],
    "thread": ["-fsanitize=thread"],
}


def core() -> dict[Path, list[str]]:
    """The sources that need neither OpenVINO nor Python, with the instruction set that each is compiled for."""
    text = (NATIVE / "core.cmake").read_text()
    names = text.split("set(CRUSH_CORE_SOURCES", 1)[1].split(")", 1)[0].split()
    options = dict(re.findall(r'(\w+\.cpp) PROPERTIES COMPILE_OPTIONS\s+"([^"]+)"', text))
    if platform.machine().lower() in ("x86_64", "amd64"):
        names = [*options, *names]  # those take longest
    return {NATIVE / "src" / name: options[name].split(";") if name in options else [] for name in names}


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{output[-8000:]}"
    return output


def compiled(source: Path, folder: Path, flags: list[str]) -> Path:
    target = folder / f"{source.stem}.o"
    run(COMPILER, "-std=c++17", "-O1", "-g1", *flags, "-I", NATIVE / "src", "-c", source, "-o", target)
    return target


@pytest.fixture(scope="module")
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All test programs, built for a sanitizer; two compilers at a time."""
    if not COMPILER:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp(request.param)
    flags = [*SANITIZERS[request.param], "-pthread"]
    sources = {**core(), **{program: [] for program in PROGRAMS}}
    with ThreadPoolExecutor(2) as threads:
        made = threads.map(lambda source: compiled(source, folder, [*flags, *sources[source]]), sources)
        objects = dict(zip(sources, made, strict=True))
        built = {program.stem: folder / program.stem for program in PROGRAMS}
        for program in PROGRAMS:
            run(COMPILER, *flags, *(objects[source] for source in core()), objects[program], "-o", built[program.stem])
    return built


@pytest.mark.parametrize("programs", SANITIZERS, indirect=True)
@pytest.mark.parametrize("name", [p.stem for p in PROGRAMS])
def test_runs_clean(programs: dict[str, Path], name: str) -> None:
    output = run(programs[name])
    assert "Sanitizer" not in output, output


def test_there_are_programs_to_run() -> None:
    assert PROGRAMS
