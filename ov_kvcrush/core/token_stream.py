"""From the engine to whoever waits for a request: what it has generated and nobody has read, and that it has ended."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from ov_kvcrush.core.outputs import GenerationOutput

Outputs = dict[int, GenerationOutput]  # of one step, by sequence index


class TokenStream:
    """Filled by one thread, read by any."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._done = threading.Event()  # who waits for the end only is not woken for each token
        self._new: deque[Outputs] = deque()
        self._num_changes = 0
        self._was_read = False
        self._callback: Callable[[], None] | None = None

    @property
    def has_new(self) -> bool:
        """Whether `read` would return at once."""
        return bool(self._new)

    @property
    def was_read(self) -> bool:
        """Whether something of it was read."""
        return self._was_read

    @property
    def is_done(self) -> bool:
        """Whether nothing will be pushed any more."""
        return self._done.is_set()

    def push(self, outputs: Outputs | None) -> None:
        """Hand over the tokens of one step; None = there are none, but the request has moved on."""
        with self._changed:
            if outputs is not None:
                self._new.append(outputs)
            self._num_changes += 1
            self._changed.notify_all()
        self._call_back()

    def end(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._done.set()
            self._num_changes += 1
            self._changed.notify_all()
        self._call_back()

    def read(self, timeout: float | None = None) -> Outputs | None:
        """The tokens of the oldest unread step, waited for; None if all were read and nothing more will come.

        Raises TimeoutError after `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._new or self.is_done, timeout):
                raise TimeoutError(f"no token came within {timeout} s")
            if not self._new:
                return None
            self._was_read = True
            return self._new.popleft()

    def wait_change(self, seen: int) -> int:
        """Wait until something has happened since the call that returned `seen` (0 = the beginning), or the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_changes > seen or self.is_done)
            return self._num_changes

    def wait_done(self, timeout: float | None = None) -> bool:
        """Wait until nothing more will come; False after `timeout` seconds."""
        return self._done.wait(timeout)

    def notify(self, callback: Callable[[], None] | None) -> None:
        """Have `callback` called whenever something has happened, by the thread that fills this. It must not raise."""
        with self._changed:
            self._callback = callback
            happened = bool(self._new) or self.is_done
        if happened:
            self._call_back()

    def _call_back(self) -> None:
        callback = self._callback
        if callback is not None:
            callback()
