"""What the KV heads of one layer hold, as one table: KVCrush's bits span all heads, whatever each of them holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ov_kvcrush.policies.base import HeadState, LayerState

Index = slice | np.ndarray
KeptOfLayer = tuple[list[np.ndarray], list[np.ndarray]]  # kept, representatives: [KV head] int32, ascending


@dataclass(frozen=True)
class LayerTable:
    """The tokens of a layer that may go: those that at least one KV head holds and that are not protected.

    positions: int (E,), ascending. tokens: [K] the head's indices of those it holds, ascending. columns: [K] the same
    tokens among the E; both are slices where the tokens lie together.
    protected: [K] bool (S,).
    """

    positions: np.ndarray
    tokens: Sequence[Index]
    columns: Sequence[Index]
    protected: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def num_protected(self) -> int:
        """The most protected tokens that a head holds."""
        return max(int(np.count_nonzero(mask)) for mask in self.protected)

    def in_head(self, head: int, chosen: np.ndarray) -> np.ndarray:
        """bool (S,): which of the head's tokens are among the chosen, bool (E,)."""
        mask = np.zeros(len(self.protected[head]), bool)
        mask[self.tokens[head]] = chosen[self.columns[head]]
        return mask

    def bits(self, values: Sequence[np.ndarray], rule: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """bool (sum of R, E): rule's bits of values [K] (R, S), over the tokens of each head; 0 for one it lacks."""
        rows = [rule(rows[:, tokens]) for rows, tokens in zip(values, self.tokens, strict=True)]
        out = np.zeros((sum(len(part) for part in rows), len(self)), bool)
        begin = 0
        for part, columns in zip(rows, self.columns, strict=True):
            out[begin : begin + len(part), columns] = part
            begin += len(part)
        return out

    def sums(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """float64 (E,): sum over all rows of values [K] (R, S), of those heads that hold the token."""
        total = np.zeros(len(self))
        for rows, tokens, columns in zip(values, self.tokens, self.columns, strict=True):
            total[columns] += rows[:, tokens].sum(axis=0, dtype=np.float64)
        return total

    def shares(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """float64 (E,): mean over the heads of a token's share of its head's values [K] (S,).

        A head's shares are what its values exceed its lowest by, divided by their sum; all are equal where all values
        are. Unlike ranks they tell how far apart two tokens are; unlike a division by the highest value they do not let
        one token make all others of its head look alike. A token that a head lacks counts as its lowest.
        """
        total = np.zeros(len(self))
        for row, tokens, columns in zip(values, self.tokens, self.columns, strict=True):
            own = row[tokens].astype(np.float64)
            if len(own) == 0:
                continue
            own -= own.min()
            mass = own.sum()
            total[columns] += own / mass if mass > 0 else 1 / len(own)
        return total / len(values)


def layer_table(layer: LayerState, protected: np.ndarray) -> LayerTable:
    """The table of a layer; protected: bool (length,), by position. O(K S + length)."""
    if hold_the_same(layer):
        mask = protected[layer[0].positions]
        index = _index(np.flatnonzero(~mask))
        positions = layer[0].positions[index]
        all_of_them = slice(0, len(positions))
        return LayerTable(positions, [index] * len(layer), [all_of_them] * len(layer), [mask] * len(layer))
    masks = [protected[head.positions] for head in layer]
    tokens = [_index(np.flatnonzero(~mask)) for mask in masks]
    held = np.zeros(len(protected), bool)
    for head, index in zip(layer, tokens, strict=True):
        held[head.positions[index]] = True
    columns = np.cumsum(held) - 1
    found = [_index(columns[head.positions[index]]) for head, index in zip(layer, tokens, strict=True)]
    return LayerTable(np.flatnonzero(held), tokens, found, masks)


def hold_the_same(layer: Sequence[HeadState]) -> bool:
    """Whether all heads hold the same tokens, as they do before anything was evicted."""
    return all(np.array_equal(head.positions, layer[0].positions) for head in layer[1:])


@dataclass(frozen=True)
class LayerChoice:
    """What a choice in one layer starts from.

    index: which layer. protected: bool (length,), by position. scores: [K] float32 (S,), the host's. counts: [K] tokens
    that each head keeps.
    """

    layer: LayerState
    index: int
    protected: np.ndarray
    scores: Sequence[np.ndarray]
    counts: Sequence[int]
    table: LayerTable

    @property
    def score_rows(self) -> list[np.ndarray]:
        """[K] float32 (1, S)"""
        return [values[None] for values in self.scores]

    @property
    def spare(self) -> int:
        """What every head of the layer has beside its protected tokens."""
        pairs = zip(self.counts, self.table.protected, strict=True)
        return max(0, min(count - int(np.count_nonzero(mask)) for count, mask in pairs))

    def host_room(self, places: int) -> int:
        """Tokens of those that may go that the host keeps in a head, if `places` go to others; may be negative."""
        return sum(self.counts) // len(self.counts) - self.table.num_protected - places


def _index(indices: np.ndarray) -> Index:
    """The ascending indices as a slice, which is read without a copy, if nothing is missing between them."""
    if len(indices) == 0:
        return slice(0, 0)
    if indices[-1] - indices[0] + 1 == len(indices):
        return slice(int(indices[0]), int(indices[-1]) + 1)
    return indices
