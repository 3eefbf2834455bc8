"""Files and folders that appear whole or not at all: filled under a hidden sibling name, then renamed.

Whoever fills a sibling holds a lock on it. If its process dies the lock is free, even across containers and after its
process number was given to another, and the next call for the same target removes the sibling.
"""

from __future__ import annotations

import errno
import glob
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_LOCK_TRIES = 8  # another process rarely takes a new file for abandoned; without locks every try fails
_LOCK_NAME = ".lock"  # in a partial folder; a partial file is locked itself
_UNLOCKED_GRACE_S = 3600.0  # a partial folder without a lock file may be between its creation and its locking


def atomic_write(target: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Make `target` a file of these bytes in one rename, on the disk before it has its name.

    If that fails, `target` is as before and nothing is left beside it. A link is followed. Raises OSError.
    """
    target = Path(os.path.realpath(target))
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder")
    _remove_abandoned(target)
    partial, file = _locked_file(target)
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


@contextmanager
def atomic_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a hidden empty sibling of `target`; when the block ends well, it becomes `target` in one rename.

    If the block raises, `target` is as before and nothing is left beside it.
    replace: an existing target is exchanged; otherwise one that is there and not empty by the end of the block makes
    this raise FileExistsError (two processes raced, and the other one won).
    """
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    partial = Path(tempfile.mkdtemp(prefix=_prefix(target, "partial"), dir=target.parent))
    lock = open(partial / _LOCK_NAME, "wb")  # noqa: SIM115 - held until the folder is finished
    try:
        try_lock(lock)
        yield partial
        lock.close()
        (partial / _LOCK_NAME).unlink()
        os.chmod(partial, 0o755)  # mkdtemp's 0700 would hide a shared model from other users
        _publish(partial, target, replace)
    except BaseException:
        lock.close()
        shutil.rmtree(partial, ignore_errors=True)
        raise


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


def _prefix(target: Path, kind: str) -> str:
    return f".{target.name}.{kind}-"


def _siblings(target: Path, kind: str) -> Iterator[Path]:
    return target.parent.glob(f"{glob.escape(_prefix(target, kind))}*")


def _remove_abandoned(target: Path) -> None:
    """Remove partial and replaced siblings of `target` whose process died."""
    for partial in _siblings(target, "partial"):
        with suppress(OSError):
            if partial.is_dir():
                _remove_abandoned_folder(partial)
            else:
                _remove_abandoned_file(partial)
    if target.exists():  # without it, a replaced folder is the only good copy
        for old in _siblings(target, "replaced"):
            shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned_file(partial: Path) -> None:
    with open(partial, "r+b") as file:
        if try_lock(file):
            if os.name == "nt":  # which removes no open file
                file.close()
            partial.unlink()


def _remove_abandoned_folder(partial: Path) -> None:
    try:
        with open(partial / _LOCK_NAME, "r+b") as lock:
            is_abandoned = try_lock(lock)
    except FileNotFoundError:
        is_abandoned = time.time() - partial.stat().st_mtime > _UNLOCKED_GRACE_S
    if is_abandoned:
        shutil.rmtree(partial, ignore_errors=True)


def _locked_file(target: Path) -> tuple[Path, IO[bytes]]:
    for _ in range(_LOCK_TRIES):
        partial = target.with_name(f"{_prefix(target, 'partial')}{secrets.token_hex(8)}")
        file = open(partial, "xb")  # noqa: SIM115 - the caller closes it
        # Between its creation and its locking, another process may have taken it for abandoned.
        if try_lock(file) and _is_at(file, partial):
            return partial, file
        file.close()
        partial.unlink(missing_ok=True)
    raise OSError(errno.ENOLCK, "files cannot be locked on this file system", str(target))


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _publish(partial: Path, target: Path, replace: bool) -> None:
    """Rename a finished folder; one that it replaces is moved aside first, and back if that fails."""
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    if not replace or not target.exists():
        if target.exists():  # POSIX rename of a folder onto a non-empty one fails as well: this is for the message
            raise FileExistsError(f"{target} exists and is not empty")
        os.rename(partial, target)
        return
    old = target.with_name(f"{_prefix(target, 'replaced')}{os.getpid()}-{time.monotonic_ns()}")
    os.rename(target, old)
    try:
        os.rename(partial, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """The rename itself, on systems where a folder can be synchronised."""
    with suppress(OSError, AttributeError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
