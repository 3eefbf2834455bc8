"""KV that outlives its request, as arrays and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ov_kvcrush.core.snapshot import KVSnapshot
from ov_kvcrush.errors import ContextFileError, OutOfMemory
from ov_kvcrush.kvcache.eviction import EvictionState, PerHead
from ov_kvcrush.native import Store, StoreFull
from ov_kvcrush.pipelines.backend import SnapshotArrays
from ov_kvcrush.policies.base import Policy

Frozen = tuple[tuple[np.ndarray, ...], ...]


@dataclass(frozen=True, eq=False)
class Dumped:
    """What SnapshotArrays says."""

    heads: np.ndarray
    tiles: np.ndarray
    num_evicted: int
    num_choices: int
    carried: Frozen | None
    representatives: Frozen | None


def dump(store: Store, kv: KVSnapshot) -> Dumped:
    """Held KV as arrays."""
    heads, tiles = store.dump(kv.stored)
    kept = kv.kept
    num_newer = kv.num_tokens - kept.length if kept.positions else 0
    carried = None
    if kept.carried is not None:  # zeros for what came after the last choice
        carried = tuple(tuple(np.pad(x, (0, num_newer)) for x in layer) for layer in kept.carried)
    stand = kept.representatives
    representatives = None if stand is None else tuple(tuple(x.astype(np.int32) for x in layer) for layer in stand)
    return Dumped(heads, tiles, kept.num_evicted, kept.num_choices, carried, representatives)


def load(store: Store, num_kv_heads: list[int], held: SnapshotArrays, policy: Policy | None) -> KVSnapshot:
    """Held KV from arrays. Raises ContextFileError for what this store could not have made, OutOfMemory for no room."""
    try:
        stored = store.load(np.ascontiguousarray(held.heads), held.tiles)
    except StoreFull as error:
        raise OutOfMemory(str(error)) from None
    except ValueError as error:
        raise ContextFileError(f"context must fit the model's cache, got: {error}") from None
    try:
        positions = [
            [np.sort(store.positions(stored, layer, head)) for head in range(count)]
            for layer, count in enumerate(num_kv_heads)
        ]
        return KVSnapshot(stored, _kept(held, positions), policy, _length(held, positions), 0)
    except BaseException:
        store.release(stored)
        raise


def _length(held: SnapshotArrays, positions: PerHead) -> int:
    """Tokens of the text."""
    sizes = [len(x) for layer in positions for x in layer]
    length = held.num_evicted + sum(sizes) // len(sizes)
    highest = max((int(x[-1]) for layer in positions for x in layer if len(x)), default=-1)
    if highest >= length:
        raise ContextFileError(f"positions must be below the {length} tokens of the text, got {highest}")
    return length


def _kept(held: SnapshotArrays, positions: PerHead) -> EvictionState:
    if not held.num_choices:
        return EvictionState()
    carried, representatives = _as_lists(held.carried), _as_lists(held.representatives)
    for name, values in (("carried", carried), ("representatives", representatives)):
        if values is not None and [len(x) for x in values] != [len(x) for x in positions]:
            raise ContextFileError(f"{name} must have the model's layers and heads, got others")
    for mine, others in zip(carried or [], positions, strict=False):
        if [len(x) for x in mine] != [len(x) for x in others]:
            raise ContextFileError("carried must have a value for each token, got another number")
    return EvictionState(held.num_evicted, held.num_choices, positions, carried, representatives)


def _as_lists(values: Frozen | None) -> PerHead | None:
    return None if values is None else [list(layer) for layer in values]
