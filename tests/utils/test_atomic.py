"""Files that are whole or absent, where that cannot be promised."""

from __future__ import annotations

from pathlib import Path

import pytest

from ov_kvcrush.utils import atomic


def test_without_locks_nothing_is_written_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"before")
    monkeypatch.setattr(atomic, "try_lock", lambda file: False)
    with pytest.raises(OSError, match="files cannot be locked on this file system"):
        atomic.atomic_write(target, [b"after"])
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert target.read_bytes() == b"before"
