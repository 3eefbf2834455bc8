"""One lock for engines that share staging blocks: one step at a time, whichever thread runs it."""

from __future__ import annotations

import threading
import weakref
from typing import Protocol


class Stepper(Protocol):
    """An engine, as far as those that share its lock use it."""

    @property
    def has_running(self) -> bool: ...

    def step(self) -> None: ...

    def release_dropped(self) -> None: ...


class StepLock:
    """The lock of such engines, and who they are. An engine alone has one for itself.

    One lock for all: a step of one writes blocks that all share, and may commit KV to the store of another. So nobody
    waits for a second lock while holding a first. On one compiled model two steps at a time would not be faster.
    is_stepping: between scheduling a step and its end.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.is_stepping = False
        self._engines: weakref.WeakSet[Stepper] = weakref.WeakSet()

    def join(self, engine: Stepper) -> None:
        """Add an engine."""
        with self.lock:
            self._engines.add(engine)

    def engines(self) -> list[Stepper]:
        """All that are there. The caller holds the lock."""
        return list(self._engines)
