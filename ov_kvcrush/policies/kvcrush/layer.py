"""The tokens of all KV heads of a layer in one table: KVCrush's bits span heads that may hold different tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ov_kvcrush.policies.base import HeadState, LayerState

Index = slice | np.ndarray
KeptOfLayer = tuple[list[np.ndarray], list[np.ndarray]]  # kept, representatives: [KV head] int32, ascending


@dataclass(frozen=True)
class LayerTable:
    """The E evictable tokens of a layer: held by at least one KV head, and not protected.

    positions: int (E,), ascending. tokens: [K] indices of those that the head holds among its own, ascending.
    columns: [K] indices of the same tokens among the E. Both are slices where the tokens are contiguous.
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
        """Protected tokens of the head that holds most of them."""
        return max(int(np.count_nonzero(mask)) for mask in self.protected)

    def in_head(self, head: int, chosen: np.ndarray) -> np.ndarray:
        """bool (S,): which of the head's tokens are among the chosen, bool (E,)."""
        mask = np.zeros(len(self.protected[head]), bool)
        mask[self.tokens[head]] = chosen[self.columns[head]]
        return mask

    def bits(self, values: Sequence[np.ndarray], rule: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """bool (sum of R, E): `rule` of values [K] (R, S), over the tokens of each head; 0 for tokens it lacks."""
        rows = [rule(rows[:, tokens]) for rows, tokens in zip(values, self.tokens, strict=True)]
        out = np.zeros((sum(len(part) for part in rows), len(self)), bool)
        begin = 0
        for part, columns in zip(rows, self.columns, strict=True):
            out[begin : begin + len(part), columns] = part
            begin += len(part)
        return out

    def sums(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """float64 (E,): values [K] (R, S) summed over all rows of the heads that hold the token."""
        total = np.zeros(len(self))
        for rows, tokens, columns in zip(values, self.tokens, self.columns, strict=True):
            total[columns] += rows[:, tokens].sum(axis=0, dtype=np.float64)
        return total

    def shares(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """float64 (E,): mean over the heads of a token's share of its head's values [K] (S,).

        A head's shares are its values minus the lowest, divided by their sum; equal values get equal shares. Unlike
        ranks they keep the distance between two tokens; unlike a division by the highest value, one outlier does not
        make all other tokens look alike. A token that a head lacks counts as its lowest.
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
    """The inputs of a selection in one layer.

    index: which layer. protected: bool (length,), by position. scores: [K] float32 (S,), the host's. counts: [K] budget
    of each head in tokens.
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
        """Smallest budget of a head beside its protected tokens."""
        pairs = zip(self.counts, self.table.protected, strict=True)
        return max(0, min(count - int(np.count_nonzero(mask)) for count, mask in pairs))

    def host_room(self, num_picks: int) -> int:
        """Evictable tokens that the host keeps in a head beside `num_picks` representatives; may be negative."""
        return sum(self.counts) // len(self.counts) - self.table.num_protected - num_picks


def _index(indices: np.ndarray) -> Index:
    """The ascending indices, as a slice if they are contiguous: it is read without a copy."""
    if len(indices) == 0:
        return slice(0, 0)
    if indices[-1] - indices[0] + 1 == len(indices):
        return slice(int(indices[0]), int(indices[-1]) + 1)
    return indices
