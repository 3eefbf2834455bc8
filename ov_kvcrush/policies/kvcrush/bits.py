"""KVCrush's arithmetic on bits: values to bits, bits to anchors, distances between them.

A *signature* is the column of bits of one item: a token (one bit a head) or a page (one bit a head and place). Arrays
of them are bool (D, N), D bits of N items: a distance is then D additions of whole rows of bytes, 10 us for 14 heads
and 8192 tokens. Packing the bits into words first costs 25 times that (`np.packbits` along the first axis).
"""

from __future__ import annotations

import numpy as np

THRESHOLDS = ("median", "mean", "quantile", "topk")
ANCHORS = ("mean", "inverse_mean", "alternating", "random", "zeros", "ones")


def threshold_bits(values: np.ndarray, rule: str, quantile: float = 0.5, topk: int = 1) -> np.ndarray:
    """bool (R, N): where values float32 (R, N) exceed their row's threshold. Equal values get equal bits. O(R N).

    median: the lower of the two middle values, so that without ties floor(N / 2) bits are 1. mean: rounded to float32,
    so that no bit of a constant row is 1. quantile: the value at index floor(quantile * (N - 1)) of the sorted row.
    topk: the highest but `topk`, so that at most `topk` bits are 1; all of them if N <= topk.
    """
    n = values.shape[1]
    if n == 0:
        return np.zeros(values.shape, bool)
    if rule == "mean":
        threshold = values.mean(axis=1, dtype=np.float64).astype(np.float32)[:, None]
    else:
        if rule == "topk" and n <= topk:
            return np.ones(values.shape, bool)
        place = {"median": (n - 1) // 2, "quantile": int(quantile * (n - 1)), "topk": n - topk - 1}[rule]
        threshold = np.partition(values, place, axis=1)[:, place : place + 1]
    return values > threshold


def majority(signatures: np.ndarray, among: np.ndarray) -> np.ndarray:
    """bool (D,): the bits that more than half of the items `among` (C,) have, of signatures (D, N)."""
    mask = np.zeros(signatures.shape[1], bool)
    mask[among] = True
    counts = np.add.reduce((signatures & mask).view(np.uint8), axis=1, dtype=np.uint32)  # twice count_nonzero's speed
    return 2 * counts > len(among)


def hamming(signatures: np.ndarray, other: np.ndarray) -> np.ndarray:
    """unsigned (...): bits in which signatures (D, ...) differ from `other`, which is broadcast to them. O(D N)."""
    counter = np.min_scalar_type(len(signatures))
    return np.add.reduce((signatures != other).view(np.uint8), axis=0, dtype=counter)


def first_anchor(signatures: np.ndarray, among: np.ndarray, kind: str) -> np.ndarray:
    """bool (D,) for every kind but "random". mean: what most of the items `among` have; a tie is 0."""
    if kind == "mean":
        return majority(signatures, among)
    if kind == "inverse_mean":
        return ~majority(signatures, among)
    if kind == "alternating":
        return np.arange(len(signatures)) % 2 == 1
    return np.full(len(signatures), kind == "ones")


def anchor_distances(
    signatures: np.ndarray, among: np.ndarray, kind: str, count: int, seed: tuple[int, ...]
) -> np.ndarray:
    """unsigned (count, C): distances of the items `among` (C,), C > 0, of signatures (D, N) to each of `count` anchors.

    The first anchor is of the given kind. With "random" the others are further draws. With other kinds each of them is
    the item farthest from its nearest anchor so far (the first of equals), so that the largest distance to an anchor is
    at most twice the optimum (Gonzalez 1985). O(count D N).
    """
    if kind == "random":
        drawn = np.random.default_rng(seed).integers(0, 2, (count, len(signatures))).astype(bool)
        return np.stack([hamming(signatures, anchor[:, None])[among] for anchor in drawn])
    distances = [hamming(signatures, first_anchor(signatures, among, kind)[:, None])[among]]
    nearest = distances[0]
    while len(distances) < count:
        farthest = among[np.argmax(nearest)]
        distances.append(hamming(signatures, signatures[:, farthest, None])[among])
        nearest = np.minimum(nearest, distances[-1])
    return np.stack(distances)
