"""What a policy sees of a sequence in the store, and its choice in the terms of the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np

from ov_kvcrush import native
from ov_kvcrush.core.eviction import Choice, EvictionSpec, EvictionState, PerHead
from ov_kvcrush.policies.base import CacheState, HeadState, Inputs, LayerState, Selection

# (layer) -> keys and values of a staged prompt, float32 (K, S, D) each
ReadStaged = Callable[[int], tuple[np.ndarray, np.ndarray]]


_NO_VECTORS: tuple[np.ndarray | None, np.ndarray | None] = (None, None)


@dataclass(frozen=True)
class _Order:
    """positions: int32 (S,), ascending. indices: where each is among the store's tokens; None where they ascend too.

    begin: the first that a policy is asked about.
    """

    positions: np.ndarray
    indices: np.ndarray | None = None
    begin: int = 0

    @classmethod
    def of(cls, positions: np.ndarray, base: int) -> _Order:
        if np.all(positions[1:] > positions[:-1]):
            return cls(positions, None, int(np.searchsorted(positions, base)))
        indices = np.argsort(positions, kind="stable").astype(np.int32)
        positions = positions[indices]
        return cls(positions, indices, int(np.searchsorted(positions, base)))

    @property
    def asked(self) -> np.ndarray:
        """int32: the positions that a policy is asked about."""
        return self.positions[self.begin :]

    def sort(self, values: np.ndarray | None, axis: int) -> np.ndarray | None:
        """The store's values in the order of `asked`."""
        if values is None:
            return None
        if self.indices is None:
            return values[:, self.begin :] if axis else values[self.begin :]
        return np.take(values, self.indices[self.begin :], axis=axis)

    def with_base(self, chosen: np.ndarray) -> np.ndarray:
        """Numbers of all that stays among `positions`, for those chosen among `asked`."""
        if not self.begin:
            return chosen
        return np.concatenate([np.arange(self.begin, dtype=np.int32), chosen + np.int32(self.begin)])

    def to_store(self, kept: np.ndarray) -> np.ndarray:
        """The store's indices of numbers among `positions`, ascending."""
        return kept if self.indices is None else np.sort(self.indices[kept])

    def tiers_to_store(self, kept: np.ndarray, tiers: np.ndarray) -> np.ndarray:
        """Tiers of the chosen, in the order of `to_store`; what the policy was not asked about is in the first."""
        padded = np.concatenate([np.zeros(self.begin, np.uint8), tiers]) if self.begin else tiers
        return padded if self.indices is None else padded[np.argsort(self.indices[kept], kind="stable")]


class CacheView:
    """Builds what a policy asks for from the store. heads: (H, K) of each layer."""

    def __init__(self, store: native.Store, heads: Items[tuple[int, int]]) -> None:
        self._store = store
        self._heads = heads

    def choose(
        self,
        eviction: EvictionSpec,
        seq: int,
        length: int,
        before: EvictionState,
        read_staged: ReadStaged | None = None,
        replayed: PerHead | None = None,
    ) -> Choice:
        """Ask the policy about a sequence whose text has `length` tokens; read_staged: it is a staged prompt.

        replayed: of one that was read twice, float32 (G, S) per head.
        """
        policy = eviction.policy
        orders = self._orders(seq, length, eviction.base, staged=read_staged is not None)
        layers = tuple(
            self._layer(policy.inputs, seq, layer, order, before, read_staged, replayed[layer] if replayed else None)
            for layer, order in enumerate(orders)
        )
        state = CacheState(layers, length, policy.protected(length, eviction.spans))
        selection = policy.select(state, policy.budget.tokens(length - eviction.base))
        carried = policy.update(state) if policy.inputs.state else None
        return _choice(state, selection, orders, carried, before)

    def _orders(self, seq: int, length: int, base: int, *, staged: bool) -> list[list[_Order]]:
        if staged:
            whole = _Order(np.arange(length, dtype=np.int32))
            return [[whole] * num_kv_heads for _, num_kv_heads in self._heads]
        return [
            [_Order.of(self._store.positions(seq, layer, head), base) for head in range(num_kv_heads)]
            for layer, (_, num_kv_heads) in enumerate(self._heads)
        ]

    def _layer(
        self,
        inputs: Inputs,
        seq: int,
        layer: int,
        orders: list[_Order],
        before: EvictionState,
        read_staged: ReadStaged | None,
        replayed: list[np.ndarray] | None,
    ) -> LayerState:
        num_heads, num_kv_heads = self._heads[layer]
        attention: list[np.ndarray | None] = [None] * num_kv_heads
        queries: list[np.ndarray | None] = [None] * num_kv_heads
        vectors = [_NO_VECTORS] * num_kv_heads
        if inputs.window:
            rows, places = self._store.captured(seq, layer)
            rows, places = rows[-inputs.window :], places[-inputs.window :]
            flat = self._store.scores(seq, layer, rows, places, inputs.reduce)
            lengths = [len(order.positions) for order in orders]
            attention = list(split_heads(flat, num_heads // num_kv_heads, lengths))
            if inputs.queries:
                by_head = rows.reshape(len(rows), num_kv_heads, num_heads // num_kv_heads, -1)
                queries = [by_head[:, head] for head in range(num_kv_heads)]
        if inputs.keys or inputs.values:
            if read_staged:
                keys, values = read_staged(layer)
                vectors = list(zip(keys, values, strict=True))
            else:
                vectors = [self._store.read(seq, layer, head) for head in range(num_kv_heads)]
        return tuple(
            HeadState(
                positions=order.asked,
                attention=order.sort(attention[head], axis=1),
                keys=order.sort(vectors[head][0], axis=0) if inputs.keys else None,
                values=order.sort(vectors[head][1], axis=0) if inputs.values else None,
                queries=queries[head],
                state=_state_of(order.asked, before, layer, head) if inputs.state else None,
                replayed=replayed[head] if replayed and inputs.replay else None,
            )
            for head, order in enumerate(orders)
        )


def split_heads(flat: np.ndarray, group: int, lengths: Items[int]) -> Iterator[np.ndarray]:
    """Views (G, S) of what `Store.scores` gives for one sequence; lengths: S of each KV head."""
    begin = 0
    for length in lengths:
        yield flat[begin : begin + group * length].reshape(group, length)
        begin += group * length


def _state_of(positions: np.ndarray, before: EvictionState, layer: int, head: int) -> np.ndarray:
    """What the policy stored for each position, 0 for new ones."""
    values = np.zeros(len(positions), np.float32)
    if before.policy_state is not None:
        known = before.positions[layer][head]  # all still there, but for those of a fork that was cut
        places = np.searchsorted(positions, known)
        held = places < len(positions)
        held[held] = positions[places[held]] == known[held]
        values[places[held]] = before.policy_state[layer][head][held]
    return values


def _choice(
    state: CacheState, selection: Selection, orders: list[list[_Order]], carried: PerHead | None, before: EvictionState
) -> Choice:
    staying = [
        [order.with_base(chosen) for chosen, order in zip(kept, of_layer, strict=True)]
        for kept, of_layer in zip(selection.kept, orders, strict=True)
    ]
    indices = [
        order.to_store(kept)
        for layer, of_layer in zip(staying, orders, strict=True)
        for kept, order in zip(layer, of_layer, strict=True)
    ]
    sizes = np.array([len(x) for x in indices], np.int64)
    positions = _picked([[order.positions for order in layer] for layer in orders], staying)
    kept = EvictionState(
        num_evicted=state.length - int(sizes.sum()) // len(sizes),
        num_choices=before.num_choices + 1,
        positions=positions,
        policy_state=None if carried is None else _with_base(_picked(carried, selection.kept), orders),
        representatives=_representatives(state, selection),
    )
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    chosen = np.concatenate(indices).astype(np.int32)
    if selection.tiers is None:
        return Choice(offsets, chosen, kept)
    tiers = [
        order.tiers_to_store(here, tier)
        for layer, of_layer, of_tiers in zip(staying, orders, selection.tiers, strict=True)
        for here, order, tier in zip(layer, of_layer, of_tiers, strict=True)
    ]
    return Choice(offsets, chosen, kept, np.concatenate(tiers).astype(np.uint8), selection.precisions or ())


def _picked(values: PerHead, chosen: PerHead) -> PerHead:
    return [[x[i] for x, i in zip(a, b, strict=True)] for a, b in zip(values, chosen, strict=True)]


def _with_base(carried: PerHead, orders: list[list[_Order]]) -> PerHead:
    """Zeros for what the policy was not asked about."""
    return [
        [np.pad(x, (order.begin, 0)) for x, order in zip(layer, of_layer, strict=True)]
        for layer, of_layer in zip(carried, orders, strict=True)
    ]


def _representatives(state: CacheState, selection: Selection) -> PerHead | None:
    if selection.representatives is None:
        return None
    return _picked([[head.positions for head in layer] for layer in state.layers], selection.representatives)
