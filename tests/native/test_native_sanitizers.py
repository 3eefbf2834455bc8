"""The C++ core under the address, undefined behaviour and thread sanitizers: its own tests run clean."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from native_stores import ISAS

from ov_kvcrush import native

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "ov_kvcrush" / "native"
PROGRAMS = sorted((ROOT / "tests" / "native").glob("*.cpp"))
COMPILER = shutil.which("g++") or shutil.which("clang++") or ""

# With an allocation per tile, the address sanitizer sees reads beyond a tile; threads are to meet in the real arena.
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DCRUSH_ARENA_MALLOC"],
    "thread": ["-fsanitize=thread", "-DCRUSH_SCALAR_ONLY"],  # threads meet in the store, not within a kernel
}
# Of test_failures none: failing allocations are counted, so they fail in one thread.
THREADED = ("test_kernels", "test_split", "test_store")
CASES = [("address", program.stem) for program in PROGRAMS] + [("thread", program) for program in THREADED]
# What a file of kernels defines, and the instruction set of one whose name says another thing.
TABLE = re.compile(r"^const (\w*Kernels) (\w+) =", re.MULTILINE)
RUNS_ON = {"bf16emulated": "avx512"}


def core(flags: list[str]) -> dict[Path, list[str]]:
    """The sources that need neither OpenVINO nor Python, with the instruction set that each is compiled for."""
    text = (NATIVE / "core.cmake").read_text()
    names = text.split("set(CRUSH_CORE_SOURCES", 1)[1].split(")", 1)[0].split()
    options = dict(re.findall(r'SOURCE_DIR\}/([\w/]+\.cpp) PROPERTIES COMPILE_OPTIONS\s+"([^"]+)"', text))
    if platform.machine().lower() in ("x86_64", "amd64") and "-DCRUSH_SCALAR_ONLY" not in flags:
        names = [*options, *names]  # those take longest
    return {NATIVE / "src" / name: options[name].split(";") if name in options else [] for name in names}


def units(flags: list[str], folder: Path) -> dict[Path, list[str]]:
    """What is compiled of the core: the store as one source, and no kernels that this processor cannot run."""
    found: dict[Path, list[str]] = {}
    store, left_out = [], []
    for source, own_flags in core(flags).items():
        if source.parent.name == "store" and not own_flags:
            store.append(source)
        elif native.available() and isa_of(source, own_flags) not in ("", *ISAS):
            left_out.append(source)
        else:
            found[source] = own_flags
    whole = folder / "store.cpp"
    whole.write_text("".join(f'#include "store/{source.name}"\n' for source in store))
    if left_out:
        names = folder / "left_out.cpp"
        names.write_text("\n".join(without_kernels(left_out)))
        found[names] = []
    return {whole: [], **found}


def isa_of(source: Path, own_flags: list[str]) -> str:
    """The instruction set that a source is for, "" = any."""
    if not any(flag.startswith("-mavx") for flag in own_flags):
        return ""
    name = source.stem.rpartition("_")[2]
    return RUNS_ON.get(name, name)


def without_kernels(left_out: list[Path]) -> Iterator[str]:
    """A source with empty tables in the place of those that are left out."""
    yield from (f'#include "kernels/{header}.hpp"' for header in ("kernels", "product", "sampling"))
    yield "namespace crush {"
    for source in left_out:
        for kind, name in TABLE.findall(source.read_text()):
            yield f"extern const {kind} {name};"
            yield f"const {kind} {name}{{}};"
    yield "}\n"


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
def outputs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Future[str]]:
    """What each program prints under each sanitizer. Two compilers or programs at a time; all of it begins here."""
    if not COMPILER:
        pytest.skip("there is no C++ compiler")
    selected = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    cases = [case for case in CASES if {"sanitizer": case[0], "program": case[1]} in selected]
    threads = ThreadPoolExecutor(2)
    objects: dict[str, list[Future[Path]]] = {}
    programs: dict[tuple[str, str], Future[Path]] = {}
    for name, flags in SANITIZERS.items():
        if name not in dict(cases):
            continue
        folder = tmp_path_factory.mktemp(name)

        def submit(source: Path, own_flags: list[str], flags: list[str] = flags, to: Path = folder) -> Future[Path]:
            optimised = not isa_of(source, own_flags)
            return threads.submit(compiled, source, to, [*flags, *own_flags], optimised)

        objects[name] = [submit(source, own_flags) for source, own_flags in units(flags, folder).items()]
        for program in PROGRAMS:
            if (name, program.stem) in cases:
                programs[name, program.stem] = submit(program, [])

    def linked_and_run(name: str, program: Future[Path]) -> str:
        own = program.result()
        target = own.with_suffix("")
        run(COMPILER, *SANITIZERS[name], "-pthread", *(o.result() for o in objects[name]), own, "-o", target)
        return run(target)

    return {case: threads.submit(linked_and_run, case[0], program) for case, program in programs.items()}


@pytest.mark.parametrize(("sanitizer", "program"), CASES)
def test_runs_clean(outputs: dict[tuple[str, str], Future[str]], program: str, sanitizer: str) -> None:
    output = outputs[sanitizer, program].result()
    assert "Sanitizer" not in output, output


def test_there_are_programs_to_run() -> None:
    assert {program.stem for program in PROGRAMS} >= {*THREADED, "test_failures", "test_products", "test_sampling"}
