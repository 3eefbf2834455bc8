"""Finds and loads the compiled module. Nothing is loaded until somebody asks."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

MODULE = "ov_kvcrush.native._crush"
_REINSTALL = "install ov_kvcrush again where there is a C++17 compiler (in a source tree: pip install -e .)"


@functools.cache
def _load() -> ModuleType | str:
    """The module, or why there is none."""
    try:
        # First of all, since it loads libopenvino and TBB: the module then finds them wherever it lies.
        import openvino
    except ImportError as error:
        return f"openvino must be installed, got {error}"
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None:
        return f"{Path(__file__).parent} must hold the compiled module _crush, got none; {_REINSTALL}"
    damage = _damage_of(Path(spec.origin))
    if damage:
        return f"{spec.origin} must be a whole shared library, got {damage}; {_REINSTALL}"
    try:
        return importlib.import_module(MODULE)
    except ImportError as error:
        version = getattr(openvino, "__version__", "unknown")
        return f"the native module must fit the installed openvino {version}, got: {error}; {_REINSTALL}"


def _damage_of(path: Path) -> str | None:
    """What is wrong with an ELF file that was not written to its end: the system would load it and crash.

    Other formats are left to the system.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        return str(error)
    if not head:
        return "an empty file"
    if head[:4] != b"\x7fELF" or head[4:6] != b"\x02\x01":  # 64 bits, little endian
        return None
    if len(head) < 64:
        return f"{size} bytes"
    # The table of sections comes last in the file: its offset, the size of an entry, their number.
    (sections,) = struct.unpack_from("<Q", head, 40)
    entry, count = struct.unpack_from("<HH", head, 58)
    expected = sections + entry * count
    return None if size >= expected else f"{size} of {expected} bytes"


def load() -> ModuleType:
    """The compiled module. Raises ImportError with the reason and what to do if it cannot be used."""
    found = _load()
    if isinstance(found, str):
        raise ImportError(found, name=MODULE)
    return found


def available() -> bool:
    """Whether the compiled module can be used."""
    return not isinstance(_load(), str)


def why_unavailable() -> str | None:
    """Why the compiled module cannot be used; None if it can."""
    found = _load()
    return found if isinstance(found, str) else None


def info() -> dict[str, Any]:
    """What runs: `isa` (kernels in use), `isas` (all that may be used, slowest first), `openvino` (version), `path`.

    `isa_cap` is the environment variable OV_KVCRUSH_ISA, "" without one: no kernels above it are used. It is read once;
    raises ValueError unless it is scalar, avx2, avxvnni, avx512, avx512vnni, avx512bf16 or amx.
    """
    module = load()
    return {**module.info(), "path": module.__file__}
