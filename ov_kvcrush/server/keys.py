"""Who asks: API keys, compared in constant time, and the names under which what is theirs is kept."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from ov_kvcrush.errors import CrushError
from ov_kvcrush.utils.atomic import atomic_write

LOCAL = "local"  # who asks a server without keys
_SALT_FILE = "owners.salt"
_SALT_BYTES = 32


@dataclass(frozen=True)
class Owners:
    """The callers of one server: (SHA-256 of a key, name of its owner). None = anybody is LOCAL."""

    known: tuple[tuple[bytes, str], ...]

    def of(self, key: str | None) -> str | None:
        """The owner that a key stands for; None for a wrong one. The time does not tell how much of it was right."""
        if not self.known:
            return LOCAL
        digest = hashlib.sha256((key or "").encode()).digest()
        found = None
        for known, owner in self.known:
            if hmac.compare_digest(known, digest):
                found = owner
        return found


def make_owners(keys: tuple[str, ...], folder: Path | None) -> Owners:
    """The owners of keys. folder: where contexts are kept, whose names must be the same after a restart.

    Names come of a slow hash with a salt of that folder: they do not tell the keys. Raises CrushError.
    """
    salt = _salt(folder)
    return Owners(tuple((hashlib.sha256(key.encode()).digest(), _owner(key, salt)) for key in keys))


def _owner(key: str, salt: bytes) -> str:
    return hashlib.scrypt(key.encode(), salt=salt, n=1 << 14, r=8, p=1, dklen=16).hex()


def _salt(folder: Path | None) -> bytes:
    if folder is None:
        return secrets.token_bytes(_SALT_BYTES)
    path = folder / _SALT_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            atomic_write(path, [secrets.token_bytes(_SALT_BYTES)])
        salt = path.read_bytes()
    except OSError as error:
        raise CrushError(
            f"contexts_dir must be a folder that can be written, got {folder}: {error.strerror or error}"
        ) from None
    if len(salt) != _SALT_BYTES or not os.access(folder, os.W_OK):
        raise CrushError(f"contexts_dir must be a folder that can be written, with a whole {_SALT_FILE}, got {folder}")
    return salt
