"""Snapshots that callers hold: guarded by the engine's lock, released when no request uses them any more."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ov_kvcrush.core.eviction import Choice
from ov_kvcrush.core.snapshot import KVSnapshot, SnapshotArrays
from ov_kvcrush.engine.handle import GenerationHandle
from ov_kvcrush.engine.step_lock import StepLock
from ov_kvcrush.errors import ContextFileError
from ov_kvcrush.kvcache.snapshots import SnapshotStore
from ov_kvcrush.policies.base import Policy


class GuardedSnapshots:
    """The owner of the snapshots that an engine hands out.

    store: None where the engine has none. lock: held by whoever adds requests. handles: of unfinished requests.
    """

    def __init__(
        self,
        store: SnapshotStore | None,
        step_lock: StepLock,
        lock: threading.Lock,
        handles: Mapping[int, GenerationHandle],
    ) -> None:
        self._store = store
        self._step_lock = step_lock
        self._lock = lock
        self._handles = handles
        self._dropped: deque[KVSnapshot] = deque()
        self._gone: weakref.WeakSet[KVSnapshot] = weakref.WeakSet()

    def own(self, snapshot: KVSnapshot) -> KVSnapshot:
        """The same snapshot, released and forked through here from now on."""
        return replace(snapshot, owner=weakref.ref(self))

    def is_gone(self, snapshot: KVSnapshot) -> bool:
        """Whether it has been released."""
        return snapshot in self._gone

    def commit(self, blocks: np.ndarray, num_tokens: int, policy: Policy | None, choice: Choice | None) -> KVSnapshot:
        """A snapshot of what was chosen of a staged prompt. Raises StoreFull. The caller holds the step lock."""
        return self.own(self._held().commit(blocks, num_tokens, policy, choice))

    def fork_snapshot(self, snapshot: KVSnapshot) -> KVSnapshot:
        """The same KV for one more holder."""
        with self._step_lock.lock:
            return self.own(self._held().fork_snapshot(snapshot))

    def release_snapshot(self, snapshot: KVSnapshot) -> None:
        """Give KV back; while a step runs or requests go on from it, after them.

        It may be called by the garbage collector in any thread, so it waits for nothing.
        """
        self._dropped.append(snapshot)
        # The collector may run inside a step of this very thread, whose lock it would get.
        if not self._step_lock.is_stepping and self._step_lock.lock.acquire(blocking=False):
            try:
                self.release_dropped()
            finally:
                self._step_lock.lock.release()

    def release_dropped(self) -> None:
        """Give back what could not be given back while the step lock was held. The caller holds it."""
        if not self._lock.acquire(blocking=False):  # perhaps held by this very thread; the next step tries again
            return
        try:
            # A request that goes on from it may lose its memory, and starts from it again.
            in_use = {handle.request.context for handle in self._handles.values()}
            for _ in range(len(self._dropped)):
                snapshot = self._dropped.popleft()
                if snapshot in in_use:
                    self._dropped.append(snapshot)
                else:
                    self._gone.add(snapshot)
                    self._held().release_snapshot(snapshot)
        finally:
            self._lock.release()

    def snapshot_nbytes(self, snapshot: KVSnapshot) -> int:
        """Its bytes, shared ones in full."""
        return self._held().snapshot_nbytes(snapshot)

    def snapshot_arrays(self, snapshot: KVSnapshot) -> SnapshotArrays:
        """It as arrays, for a file."""
        return self._held().snapshot_arrays(snapshot)

    def load(self, arrays: SnapshotArrays, policy: Policy | None, base: int, base_kept: int) -> KVSnapshot:
        """A snapshot from arrays. Raises ContextFileError for what the store could not have made, OutOfMemory."""
        if self._store is None:
            raise ContextFileError("attention must be 'crush' to load a context, got 'paged'")
        with self._step_lock.lock:
            return self.own(self._store.load(arrays, policy, base, base_kept))

    def _held(self) -> SnapshotStore:
        assert self._store is not None, "a snapshot of an engine without a store"
        return self._store
