"""Files of contexts that say something else than what was saved."""

from __future__ import annotations

import hashlib
import re


def signed(header: bytes, rest: bytes) -> bytes:
    """A file with a right digest, whatever it says."""
    blank = re.sub(rb'"sha256":"[^"]*"', b'"sha256":"' + b"0" * 64 + b'"', header, count=1)
    blank = len(blank).to_bytes(8, "little") + blank
    digest = hashlib.sha256(blank + rest).hexdigest().encode()
    return blank.replace(b"0" * 64, digest, 1) + rest
