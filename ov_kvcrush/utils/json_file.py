"""Files that a command writes: they appear whole or not at all, and errors name the option."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ov_kvcrush.errors import CrushError
from ov_kvcrush.utils.atomic import atomic_write


def check_writable(path: Path, option: str = "json") -> None:
    """Raise CrushError naming the option unless a file can be written at `path`; leaves nothing there."""
    if path.is_dir():
        raise CrushError(f"--{option} must be a file to write, got the folder {str(path)!r}")
    try:
        tempfile.TemporaryFile(dir=path.absolute().parent).close()
    except OSError as error:
        raise _not_writable(path, option, error) from None


def write_json(path: Path, report: Mapping[str, Any], option: str = "json", *, allow_nan: bool = True) -> None:
    """Write JSON as `write_file` does."""
    text = json.dumps(report, indent=2, allow_nan=allow_nan) + "\n"
    write_file(path, option, text.encode())


def write_file(path: Path, option: str, content: bytes) -> None:
    """Write a file whole or not at all; an existing one is replaced. Raises CrushError if that fails."""
    try:
        atomic_write(path, [content])
    except OSError as error:
        raise _not_writable(path, option, error) from None


def _not_writable(path: Path, option: str, error: OSError) -> CrushError:
    reason = error.strerror or error
    return CrushError(f"--{option} must be a file that can be written, got {str(path)!r}: {reason}")
