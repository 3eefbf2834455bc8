"""Balanced clusters of keys in numpy: the same order as native/src/store/clusters.cpp, to the bit.

Sums are made one after the other in float32, products of vectors in 16 lanes that are added up in pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from reference.codec import TILE

Array = npt.NDArray[Any]

SAMPLE = 256  # keys that a direction is found from
ROUNDS = 4  # of the power iteration
LANES = 16
SINK_TOKENS = 4


def _sum(rows: Array) -> Array:
    """Sum over the first axis, from the front to the back."""
    total = np.zeros(rows.shape[1:], np.float32)
    for row in rows:
        total = total + row
    return total


def _dot(rows: Array, vector: Array) -> Array:
    """Products of rows (n, D) with a vector (D,): float32 (n,)."""
    lanes = _sum((rows * vector).reshape(len(rows), -1, LANES).transpose(1, 0, 2))
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return np.asarray(lanes[:, 0])


def _direction(keys: Array) -> Array:
    """The principal direction of keys (n, D), found from 256 of them at most."""
    num = min(len(keys), SAMPLE)
    sample = keys[np.arange(num) * len(keys) // num]
    sample = sample - _sum(sample) * (np.float32(1) / np.float32(num))
    lengths = np.array([_dot(x[None], x)[0] for x in sample])
    direction = sample[np.argmax(np.where(np.isnan(lengths), -1, lengths))]
    for _ in range(ROUNDS):
        along = _sum(_dot(sample, direction)[:, None] * sample)
        length = np.sqrt(_dot(along[None], along)[0])
        if not length > 0:
            break
        direction = along / length
    return direction


def cluster(keys: Array) -> Array:
    """int32 (n,): tokens of keys float32 (n, D) in the order of their tiles of 32; n is a multiple of 32."""
    parts: list[Array] = []

    def split(tokens: Array) -> None:
        first = len(tokens) // TILE // 2 * TILE
        if first == 0:
            parts.append(tokens)
            return
        along = _dot(keys[tokens], _direction(keys[tokens]))
        along[np.isnan(along)] = 0
        order = np.lexsort((tokens, along))
        split(np.sort(tokens[order[:first]]))
        split(np.sort(tokens[order[first:]]))

    with np.errstate(all="ignore"):
        split(np.arange(len(keys)))
    return np.concatenate(parts).astype(np.int32)


def group_tiles(positions: Array, tiers: Array, keys: Array, num_tiles: int) -> Array:
    """int64 (n,): the order of tokens (n,), with keys (n, D), whose first `num_tiles` tiles are grouped by their keys.

    Tiles with sinks stay; the others are grouped among those that stand together and are of one tier.
    """
    order = np.arange(len(positions))
    tiles = order[: TILE * num_tiles].reshape(num_tiles, TILE)
    stays = (positions[tiles] < SINK_TOKENS).any(axis=1)
    best = tiers[tiles].min(axis=1, initial=255)
    begin = 0
    while begin < num_tiles:
        end = begin + 1
        while end < num_tiles and not stays[begin] and not stays[end] and best[end] == best[begin]:
            end += 1
        if end > begin + 1:
            run = tiles[begin:end].ravel()
            run = run[np.argsort(positions[run], kind="stable")]
            order[TILE * begin : TILE * end] = run[cluster(keys[run])]
        begin = end
    return order
