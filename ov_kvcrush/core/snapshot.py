"""KV that outlives its request."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from ov_kvcrush.core.eviction import EvictionState
from ov_kvcrush.model.adapters import NO_ADAPTERS, AdapterParams
from ov_kvcrush.policies.base import Policy

FrozenPerHead = tuple[tuple[np.ndarray, ...], ...]  # [layer][KV head]


@dataclass(frozen=True, eq=False)
class SnapshotArrays:
    """A snapshot as arrays, for a file.

    heads, tiles: as from `Store.dump`. The others are as in EvictionState: policy_state float32, representatives int32.
    """

    heads: np.ndarray
    tiles: np.ndarray
    num_evicted: int
    num_choices: int
    policy_state: FrozenPerHead | None
    representatives: FrozenPerHead | None


class SnapshotOwner(Protocol):
    """Whoever holds the bytes of snapshots."""

    def fork_snapshot(self, snapshot: KVSnapshot) -> KVSnapshot: ...

    def release_snapshot(self, snapshot: KVSnapshot) -> None: ...

    def snapshot_nbytes(self, snapshot: KVSnapshot) -> int: ...

    def nbytes_beside(self, snapshot: KVSnapshot, other: KVSnapshot) -> int: ...

    def snapshot_arrays(self, snapshot: KVSnapshot) -> SnapshotArrays: ...


@dataclass(frozen=True, eq=False)
class KVSnapshot:
    """KV of an ended sequence. Whoever holds it calls `release` once, in any thread.

    owner: not kept alive by its snapshots. store_id: of its tokens in the owner's store. state: what policies left.
    policy: who chose it; None = all tokens stay. num_tokens: of the text, kept or not. captured_rows: query rows that
    the store has of it. base: tokens at the front that later policies do not choose from; base_kept: what a head holds
    of these, on average. holder: tells those who share one `store_id` apart; an owner's own. adapters: those
    that it was computed with.
    """

    owner: weakref.ref[SnapshotOwner]
    store_id: int
    state: EvictionState
    policy: Policy | None
    num_tokens: int
    captured_rows: int = 0
    base: int = 0
    base_kept: int = 0
    holder: object = None
    adapters: AdapterParams = NO_ADAPTERS

    @property
    def num_kept(self) -> int:
        """Tokens that a head holds, on average."""
        return self.num_tokens - self.state.num_evicted

    @property
    def nbytes(self) -> int:
        """Bytes in the store, shared ones in full; 0 when the owner is gone."""
        owner = self.owner()
        return 0 if owner is None else owner.snapshot_nbytes(self)

    def nbytes_beside(self, other: KVSnapshot) -> int:
        """Bytes of it that `other`, of the same owner, does not hold."""
        return self._alive().nbytes_beside(self, other)

    def fork(self) -> KVSnapshot:
        """The same KV for one more holder; tiles are shared."""
        return self._alive().fork_snapshot(self)

    def release(self) -> None:
        """Give the bytes back; requests that go on from them end first."""
        owner = self.owner()
        if owner is not None:
            owner.release_snapshot(self)

    def to_arrays(self) -> SnapshotArrays:
        """The KV as arrays."""
        return self._alive().snapshot_arrays(self)

    def as_base(self) -> KVSnapshot:
        """The same KV, of which later policies choose nothing away."""
        return replace(self, base=self.num_tokens, base_kept=self.num_kept)

    def _alive(self) -> SnapshotOwner:
        owner = self.owner()
        assert owner is not None, "a snapshot whose engine is gone"
        return owner
