"""Files that appear whole or not at all: written under a hidden sibling name, then renamed."""

from __future__ import annotations

import glob
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

from ov_kvcrush.utils.atomic import try_lock


def write_whole(target: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Make `target` a file of these bytes in one rename, on the disk before it has its name.

    If that fails, the sibling is removed and `target` is as before. If the process dies, the sibling stays, and the
    next call for the same target removes it: its owner's lock is free then. A link is followed. Raises OSError.
    """
    target = Path(os.path.realpath(target))
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder")
    _remove_stale(target)
    partial, file = _locked_sibling(target)
    try:
        with file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            if os.name != "nt":  # while the lock is held, nobody takes it for abandoned
                os.replace(partial, target)
        if os.name == "nt":  # which renames no open file
            os.replace(partial, target)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    _sync_folder(target.parent)


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _locked_sibling(target: Path) -> tuple[Path, IO[bytes]]:
    while True:
        partial = target.with_name(f"{_prefix(target)}{secrets.token_hex(8)}")
        file = open(partial, "xb")  # noqa: SIM115 - the caller closes it
        # Between its creation and its locking, another process may have taken it for abandoned.
        if try_lock(file) and _is_at(file, partial):
            return partial, file
        file.close()


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_stale(target: Path) -> None:
    for partial in target.parent.glob(f"{glob.escape(_prefix(target))}*"):
        with suppress(OSError), open(partial, "r+b") as file:
            if try_lock(file):
                if os.name == "nt":
                    file.close()
                partial.unlink()


def _sync_folder(folder: Path) -> None:
    """The rename itself, on systems where a folder can be synchronised."""
    with suppress(OSError, AttributeError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
