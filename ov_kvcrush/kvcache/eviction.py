"""What a policy sees of a sequence in the store, and what becomes of its choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np

from ov_kvcrush.errors import RequestError
from ov_kvcrush.native import Store
from ov_kvcrush.pipelines.backend import NO_REPLAY_PROMPT, ReplayPrompt
from ov_kvcrush.policies.base import CacheState, HeadState, Inputs, LayerState, Policy, Selection

_TILE = 32  # tokens: what a head's last, partly filled tile can hold beyond its tokens
PerHead = list[list[np.ndarray]]  # [layer][KV head]

# (layer) -> keys and values of a staged prompt, float32 (K, S, D) each
ReadStaged = Callable[[int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class EvictionSpec:
    """What one request wants of its cache. spans: [begin, end) of the prompt that stay.

    words, num_prompt_tokens: for a policy that reads the prompt twice.
    base: tokens of a context that the prompt begins with; what is left of them is not chosen from again, and the
    budget is for what follows. base_kept: of these, what a head holds on average. begun: of what follows, tokens that a
    head holds at the beginning.
    """

    policy: Policy
    spans: tuple[tuple[int, int], ...] = ()
    words: ReplayPrompt = NO_REPLAY_PROMPT
    num_prompt_tokens: int = 0
    base: int = 0
    base_kept: int = 0
    begun: int = 0

    @property
    def window(self) -> int:
        """Query rows to be captured."""
        return self.policy.inputs.window

    @property
    def head(self) -> int:
        """Tokens at the front that stay in any case, such as a system prompt."""
        return max((end for begin, end in self.spans if begin == 0), default=0)

    def check(self, num_tokens: int) -> None:
        """Raise RequestError for a budget below what must stay of a prompt."""
        budget = self.policy.budget.tokens(num_tokens - self.base)
        always = self._always(num_tokens)
        if self.spans and budget < always:
            raise RequestError(
                f"kept tokens must be at least the protected ones, {always} with sinks, recent tokens and spans, "
                f"got a budget of {budget}"
            )

    def _always(self, length: int) -> int:
        """Protected tokens of what a policy is asked about."""
        return int(self.policy.protected(length, self.spans)[self.base :].sum())

    def num_read_again(self, num_tokens: int) -> int:
        """Of a prompt that begins with nothing, the tokens that are read a second time."""
        wants_replay = self.policy.inputs.replay is not None and not self.base
        return num_tokens - self.head if wants_replay and self.wants(num_tokens, num_tokens, is_read=True) else 0

    def peak_tokens(self, length: int, chunk: int, num_evicted: int = 0) -> int:
        """The most tokens a head holds, on average, while a text of `length` is read in chunks: what to promise for.

        num_evicted: of its tokens, in the KV that it goes on from.
        """
        if self.policy.inputs.replay and (self.base or num_evicted):  # nothing is read twice: all that is new stays
            return length - num_evicted
        policy, length = self.policy, length - self.base
        always = policy.sink_tokens + policy.recent_tokens + sum(end - begin for begin, end in self.spans)
        if policy.inputs.replay:  # what comes after the prompt all stays
            read = min(length, self.num_prompt_tokens)
            kept = max(policy.budget.tokens(read), policy.budget.min_tokens, always)
            return self.base_kept + min(length, kept + length - read + _TILE)
        least = max(policy.budget.tokens(length), policy.budget.min_tokens, always, self.begun)
        return self.base_kept + min(length, least + chunk + policy.stride + _TILE)

    def wants(self, length: int, cached: int, *, is_read: bool) -> bool:
        """Whether to choose now. cached: tokens a head holds on average. is_read: the prompt has just been read."""
        budget, spare = self.policy.budget, 0 if is_read else self.policy.stride
        num_tokens, cached = length - self.base, cached - self.base_kept
        if not is_read and self.policy.inputs.replay:  # what came since was not read twice
            return False
        if num_tokens <= budget.min_tokens or cached - budget.tokens(num_tokens) <= spare:
            return False
        # More may be protected than the budget has: what cannot go is no reason to choose again.
        return cached - max(budget.tokens(num_tokens), self._always(length)) > spare


def check_spans(spans: Items[tuple[int, int]], num_tokens: int) -> None:
    """Raise RequestError for spans [begin, end) outside of a prompt."""
    for begin, end in spans:
        if not 0 <= begin < end <= num_tokens:
            raise RequestError(
                f"protect must be spans (begin, end) with 0 <= begin < end <= {num_tokens}, the prompt's tokens, "
                f"got ({begin}, {end})"
            )


@dataclass(frozen=True, eq=False)
class EvictionState:
    """What is left of a sequence's cache; forks share it.

    num_evicted: tokens that a head lost, on average. carried: what the policy remembers, for positions.
    representatives: of the last choice, positions of tokens that stay for others.
    """

    num_evicted: int = 0
    num_choices: int = 0
    positions: PerHead = field(default_factory=list)
    carried: PerHead | None = None
    representatives: PerHead | None = None

    @property
    def length(self) -> int:
        """Tokens of the text at the last choice."""
        sizes = [len(x) for layer in self.positions for x in layer]
        return self.num_evicted + sum(sizes) // max(len(sizes), 1)

    def positions_of(self, length: int) -> PerHead | None:
        """What is there of a text of `length` tokens, with all since the last choice; None if there was no choice."""
        if not self.positions:
            return None
        newer = np.arange(self.length, length, dtype=np.int32)
        return [[np.concatenate([x, newer]) for x in layer] for layer in self.positions]

    def holds(self, spans: Items[tuple[int, int]], length: int) -> bool:
        """Whether every head still has all of these spans of a text of `length` tokens."""
        positions = self.positions_of(length) if spans else None
        if positions is None:
            return True
        wanted = np.zeros(length, bool)
        for begin, end in spans:
            wanted[begin:end] = True
        count = int(wanted.sum())
        return all(int(wanted[head].sum()) == count for layer in positions for head in layer)


@dataclass(frozen=True)
class Choice:
    """A selection in the store's terms: indices (n,) int32 of head h are those from offsets[h] to offsets[h + 1]."""

    offsets: np.ndarray
    indices: np.ndarray
    kept: EvictionState


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


class CacheView:
    """Builds what a policy asks for from the store. heads: (H, K) of each layer."""

    def __init__(self, store: Store, heads: Items[tuple[int, int]]) -> None:
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
        carried = policy.observe(state) if policy.inputs.carried else None
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
                carried=_carried(order.asked, before, layer, head) if inputs.carried else None,
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


def _carried(positions: np.ndarray, before: EvictionState, layer: int, head: int) -> np.ndarray:
    """What was remembered for each position, 0 for new ones."""
    values = np.zeros(len(positions), np.float32)
    if before.carried is not None:
        known = before.positions[layer][head]  # all still there, but for those of a fork that was cut
        places = np.searchsorted(positions, known)
        held = places < len(positions)
        held[held] = positions[places[held]] == known[held]
        values[places[held]] = before.carried[layer][head][held]
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
        carried=None if carried is None else _with_base(_picked(carried, selection.kept), orders),
        representatives=_representatives(state, selection),
    )
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Choice(offsets, np.concatenate(indices).astype(np.int32), kept)


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
