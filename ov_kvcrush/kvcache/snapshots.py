"""Snapshots in the store: made, shared, released, as arrays and back."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import replace

import numpy as np

from ov_kvcrush import native
from ov_kvcrush.core.eviction import Choice, EvictionSpec, EvictionState, PerHead
from ov_kvcrush.core.snapshot import FrozenPerHead, KVSnapshot, SnapshotArrays
from ov_kvcrush.errors import ContextFileError, OutOfMemory
from ov_kvcrush.kvcache.planning import precisions_of
from ov_kvcrush.kvcache.room import Room
from ov_kvcrush.policies.base import Policy


class SnapshotStore:
    """The owner of snapshots in one store. Nothing here is locked: engines do that.

    num_kv_heads: of each layer. fill: commits what was chosen (None = all) of a staged prompt to a store id.
    """

    def __init__(self, room: Room, num_kv_heads: Items[int], fill: Callable[[int, Choice | None], None]) -> None:
        self._room = room
        self._store = room.store
        self._num_kv_heads = list(num_kv_heads)
        self._fill = fill

    def make(
        self, store_id: int, state: EvictionState, policy: Policy | None, num_tokens: int, captured_rows: int = 0
    ) -> KVSnapshot:
        """A snapshot that owns the store's sequence `store_id`."""
        return KVSnapshot(weakref.ref(self), store_id, state, policy, num_tokens, captured_rows)

    def commit(
        self, blocks: np.ndarray, num_tokens: int, eviction: EvictionSpec | None, choice: Choice | None
    ) -> KVSnapshot:
        """A snapshot of what was chosen of a prompt on staging blocks, whichever manager prefilled it.

        eviction: by what it was chosen, with the plan that says the precisions.
        It may take what cached prefixes have, but nothing that prompts were promised here. Raises StoreFull.
        """
        policy = eviction.policy if eviction else None
        store_id = self._store.create(0, precisions_of(eviction.plan) if eviction and eviction.plan else None)
        try:
            self._store.attach_prefill(store_id, blocks, num_tokens)
            self._fill(store_id, choice)
        except BaseException:
            self._store.release(store_id)
            raise
        return self.make(store_id, choice.state if choice else EvictionState(), policy, num_tokens)

    def fork_snapshot(self, snapshot: KVSnapshot) -> KVSnapshot:
        """The same tiles for one more holder."""
        return replace(snapshot, store_id=self._store.fork(snapshot.store_id))

    def release_snapshot(self, snapshot: KVSnapshot) -> None:
        """Give the tiles back."""
        self._store.release(snapshot.store_id)

    def snapshot_nbytes(self, snapshot: KVSnapshot) -> int:
        """Bytes of its tiles, shared ones in full."""
        return self._store.nbytes_of(snapshot.store_id)

    def nbytes_beside(self, snapshot: KVSnapshot, other: KVSnapshot) -> int:
        """Bytes of its tiles that another does not hold."""
        both = self._store.nbytes_of_all([snapshot.store_id, other.store_id])
        return both - self._store.nbytes_of(other.store_id)

    def snapshot_arrays(self, snapshot: KVSnapshot) -> SnapshotArrays:
        """The snapshot as arrays."""
        heads, tiles = self._store.dump(snapshot.store_id)
        state = snapshot.state
        num_newer = snapshot.num_tokens - state.length if state.positions else 0
        policy_state = None
        if state.policy_state is not None:  # zeros for what came after the last choice
            policy_state = tuple(tuple(np.pad(x, (0, num_newer)) for x in layer) for layer in state.policy_state)
        stand = state.representatives
        representatives = None if stand is None else tuple(tuple(x.astype(np.int32) for x in layer) for layer in stand)
        return SnapshotArrays(heads, tiles, state.num_evicted, state.num_choices, policy_state, representatives)

    def load(self, arrays: SnapshotArrays, policy: Policy | None, base: int, base_kept: int) -> KVSnapshot:
        """A snapshot from arrays, which are checked. Cached prefixes make room; what is promised to prompts stays.

        Raises ContextFileError for what this store could not have made, OutOfMemory where there is no room.
        """
        store_id = self._load(arrays)
        try:
            positions = [
                [np.sort(self._store.positions(store_id, layer, head)) for head in range(count)]
                for layer, count in enumerate(self._num_kv_heads)
            ]
            length = _length(arrays, positions)
            if not (0 <= base <= length and 0 <= base_kept <= base):
                raise ContextFileError(f"base must be in 0..{length}, got {base} with {base_kept} kept")
            made = self.make(store_id, _state(arrays, positions), policy, length)
            return replace(made, base=base, base_kept=base_kept)
        except BaseException:
            self._store.release(store_id)
            raise

    def _load(self, arrays: SnapshotArrays) -> int:
        heads, promised = np.ascontiguousarray(arrays.heads), self._room.admission.promised()
        try:
            return self._room.call(
                lambda: self._store.load(heads, arrays.tiles, promised=promised), promised, arrays.tiles.nbytes
            )
        except native.StoreFull as error:
            raise OutOfMemory(str(error)) from None
        except ValueError as error:
            raise ContextFileError(f"context must fit the model's cache, got: {error}") from None


def _length(arrays: SnapshotArrays, positions: PerHead) -> int:
    """Tokens of the text."""
    sizes = [len(x) for layer in positions for x in layer]
    length = arrays.num_evicted + sum(sizes) // len(sizes)
    highest = max((int(x[-1]) for layer in positions for x in layer if len(x)), default=-1)
    if highest >= length:
        raise ContextFileError(f"positions must be below the {length} tokens of the text, got {highest}")
    return length


def _state(arrays: SnapshotArrays, positions: PerHead) -> EvictionState:
    if not arrays.num_choices:
        return EvictionState()
    policy_state, representatives = _as_lists(arrays.policy_state), _as_lists(arrays.representatives)
    for name, values in (("policy_state", policy_state), ("representatives", representatives)):
        if values is not None and [len(x) for x in values] != [len(x) for x in positions]:
            raise ContextFileError(f"{name} must have the model's layers and heads, got others")
    for mine, others in zip(policy_state or [], positions, strict=False):
        if [len(x) for x in mine] != [len(x) for x in others]:
            raise ContextFileError("policy_state must have a value for each token, got another number")
    return EvictionState(arrays.num_evicted, arrays.num_choices, positions, policy_state, representatives)


def _as_lists(values: FrozenPerHead | None) -> PerHead | None:
    return None if values is None else [list(layer) for layer in values]
