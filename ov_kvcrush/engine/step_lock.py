"""Engines on the same staging blocks take turns: one step at a time, whichever thread runs it."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ov_kvcrush.engine.engine import Engine


class StepLock:
    """The lock of such engines, and who they are. An engine alone has one for itself.

    One lock for all: a step of one writes blocks that all share, and may give KV to the store of another. So nobody
    waits for a second lock while holding a first. On one compiled model two steps at a time would not be faster.
    is_stepping: between planning a step and its end.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.is_stepping = False
        self._engines: weakref.WeakSet[Engine] = weakref.WeakSet()

    def join(self, engine: Engine) -> None:
        """Add an engine."""
        with self.lock:
            self._engines.add(engine)

    def engines(self) -> list[Engine]:
        """All that are there. The caller holds the lock."""
        return list(self._engines)
