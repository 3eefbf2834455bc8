"""Folders that appear whole or not at all: filled under a hidden sibling name, then renamed."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

LOCK_NAME = ".lock"
UNLOCKED_GRACE_S = 3600.0  # a partial folder without a lock file may be between its creation and its locking


@contextmanager
def finished_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a hidden empty sibling of `target`; when the block ends well, it becomes `target` in one rename.

    If the block raises, the sibling is removed and `target` is as before. If the process dies, the sibling stays under
    its hidden name and the next call for the same target removes it: its owner's lock is free then.
    replace: an existing target is exchanged; otherwise one that is there and not empty by the end of the block makes
    this raise FileExistsError (two processes raced, and the other one won).
    """
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(target)
    partial = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    lock = open(partial / LOCK_NAME, "wb")  # noqa: SIM115 - held until the folder is finished
    try:
        try_lock(lock)
        yield partial
        lock.close()
        (partial / LOCK_NAME).unlink()
        os.chmod(partial, 0o755)  # mkdtemp's 0700 would hide a shared model from other users
        _publish(partial, target, replace)
    except BaseException:
        lock.close()
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove_stale(target: Path) -> None:
    """Remove what earlier calls for `target` left when they were killed: partial and replaced siblings."""
    for partial in target.parent.glob(f"{glob.escape(_prefix(target))}*"):
        if _is_abandoned(partial):
            shutil.rmtree(partial, ignore_errors=True)
    if target.exists():  # without it, a replaced folder is the only good copy
        for old in target.parent.glob(f"{glob.escape(_replaced(target))}*"):
            shutil.rmtree(old, ignore_errors=True)


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _replaced(target: Path) -> str:
    return f".{target.name}.replaced-"


def _publish(partial: Path, target: Path, replace: bool) -> None:
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    if not replace or not target.exists():
        if target.exists():  # POSIX rename of a folder onto a non-empty one fails as well: this is for the message
            raise FileExistsError(f"{target} exists and is not empty")
        os.rename(partial, target)
        return
    old = target.with_name(f"{_replaced(target)}{os.getpid()}-{time.monotonic_ns()}")
    os.rename(target, old)
    try:
        os.rename(partial, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_abandoned(partial: Path) -> bool:
    """A lock tells a dead owner even across containers and after its process number was given to another."""
    try:
        with open(partial / LOCK_NAME, "r+b") as lock:
            return try_lock(lock)
    except FileNotFoundError:
        with suppress(OSError):
            return time.time() - partial.stat().st_mtime > UNLOCKED_GRACE_S
        return False
    except OSError:
        return False


def try_lock(file: IO[bytes]) -> bool:
    """Take the lock on an open file until it is closed; False if another process holds it."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
