"""Snapshots that callers hold: shared without touching the store, released between two steps when nobody uses them."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from ov_kvcrush.core.engine_thread import EngineThread
from ov_kvcrush.core.eviction import Choice, EvictionSpec
from ov_kvcrush.core.request import Request
from ov_kvcrush.core.snapshot import KVSnapshot, SnapshotArrays
from ov_kvcrush.errors import ContextFileError
from ov_kvcrush.kvcache.snapshots import SnapshotStore
from ov_kvcrush.policies.base import Policy


class GuardedSnapshots:
    """The owner of the snapshots that an engine hands out.

    store: None where the engine has none. lock: held by whoever adds requests. requests: that have not ended.
    """

    def __init__(
        self,
        store: SnapshotStore | None,
        thread: EngineThread,
        lock: threading.Lock,
        requests: Mapping[int, Request],
    ) -> None:
        self._store = store
        self._thread = thread
        self._lock = lock
        self._requests = requests
        self._dropped: deque[KVSnapshot] = deque()
        # By store id. Only added to and removed from: both are single operations, which a finalizer may run between.
        self._holders: dict[int, set[object]] = {}
        self._sizes: dict[int, int] = {}

    def own(self, snapshot: KVSnapshot) -> KVSnapshot:
        """The same snapshot, released and forked through here from now on."""
        holder = object()
        self._holders[snapshot.store_id] = {holder}
        self._sizes.pop(snapshot.store_id, None)
        return replace(snapshot, owner=weakref.ref(self), holder=holder)

    def is_gone(self, snapshot: KVSnapshot) -> bool:
        """Whether it has been released."""
        return snapshot.holder not in self._holders.get(snapshot.store_id, ())

    def commit(
        self, blocks: np.ndarray, num_tokens: int, eviction: EvictionSpec | None, choice: Choice | None
    ) -> KVSnapshot:
        """A snapshot of what was chosen of a staged prompt. Raises StoreFull. Called within a step."""
        return self.own(self._held().commit(blocks, num_tokens, eviction, choice))

    def fork_snapshot(self, snapshot: KVSnapshot) -> KVSnapshot:
        """The same KV for one more holder."""
        holder = object()
        self._holders[snapshot.store_id].add(holder)
        return replace(snapshot, holder=holder)

    def release_snapshot(self, snapshot: KVSnapshot) -> None:
        """Give KV back between two steps, when requests that go on from it have ended.

        It may be called by the garbage collector in any thread, so it waits for nothing.
        """
        self._dropped.append(snapshot)
        self._thread.post(self.release_dropped)

    def release_dropped(self) -> None:
        """Give back what was released and is not used any more. Called between two steps."""
        if not self._dropped or not self._lock.acquire(blocking=False):  # held perhaps by this very thread
            return
        try:
            # A request that goes on from it may lose its memory, and starts from it again.
            in_use = {r.context.store_id for r in self._requests.values() if r.context is not None}
            for _ in range(len(self._dropped)):
                snapshot = self._dropped.popleft()
                if self.is_gone(snapshot):
                    continue
                holders = self._holders[snapshot.store_id]
                if holders == {snapshot.holder} and snapshot.store_id in in_use:
                    self._dropped.append(snapshot)
                    continue
                holders.discard(snapshot.holder)
                if not holders:
                    del self._holders[snapshot.store_id]
                    self._sizes.pop(snapshot.store_id, None)
                    self._held().release_snapshot(snapshot)
        finally:
            self._lock.release()

    def snapshot_nbytes(self, snapshot: KVSnapshot) -> int:
        """Its bytes, shared ones in full. They do not change."""
        size = self._sizes.get(snapshot.store_id)
        if size is None:
            size = self._thread.call(partial(self._held().snapshot_nbytes, snapshot))
            self._sizes[snapshot.store_id] = size
        return size

    def nbytes_beside(self, snapshot: KVSnapshot, other: KVSnapshot) -> int:
        """Bytes of it that another does not hold."""
        return self._thread.call(partial(self._held().nbytes_beside, snapshot, other))

    def snapshot_arrays(self, snapshot: KVSnapshot) -> SnapshotArrays:
        """It as arrays, for a file."""
        return self._thread.call(partial(self._held().snapshot_arrays, snapshot))

    def load(self, arrays: SnapshotArrays, policy: Policy | None, base: int, base_kept: int) -> KVSnapshot:
        """A snapshot from arrays. Raises ContextFileError for what the store could not have made, OutOfMemory."""
        store = self._store
        if store is None:
            raise ContextFileError("attention must be 'crush' to load a context, got 'paged'")
        return self._thread.call(lambda: self.own(store.load(arrays, policy, base, base_kept)))

    def _held(self) -> SnapshotStore:
        assert self._store is not None, "a snapshot of an engine without a store"
        return self._store
