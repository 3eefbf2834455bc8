"""KVCrush's buckets: items sorted by distance are cut into equal runs, with one representative each.

`order` (C,) are indices of C items among all, nearest first; a bucket is a run of it.
"""

from __future__ import annotations

import numpy as np

from ov_kvcrush.policies.kvcrush.bits import hamming

REPRESENTATIVES = ("centroid", "best", "even")


def order_by_distance(distances: np.ndarray, neighbourhoods: int = 1) -> np.ndarray:
    """int64 (C,): items by nearest anchor (the lower of equals), then by distance to it, then as they come. O(C).

    distances: unsigned (A, C), to each of A anchors. neighbourhoods: runs of items, as equal as can be, each of which
    is ordered by itself, behind the one before.
    """
    key = distances[0]
    if len(distances) > 1:
        nearest, own = np.argmin(distances, axis=0), distances.min(axis=0).astype(np.int64)
        key = nearest * (int(own.max(initial=0)) + 1) + own
    if neighbourhoods > 1:
        items = distances.shape[1]
        key = np.arange(items) * neighbourhoods // max(items, 1) * (int(key.max(initial=0)) + 1) + key
    if key.dtype == np.int64:
        key = key.astype(np.min_scalar_type(int(key.max(initial=0))))
    return np.argsort(key, kind="stable")  # of one or two bytes: a radix sort


def bucket_starts(items: int, buckets: int) -> np.ndarray:
    """int64 (buckets,): where each of `buckets` <= `items` runs begins; their sizes differ by one at most."""
    return np.arange(buckets) * items // max(buckets, 1)


def even_picks(order: np.ndarray, buckets: int) -> np.ndarray:
    """int64 (buckets,), ascending: the first of every bucket, nearest to the anchor."""
    return np.sort(order[bucket_starts(len(order), buckets)])


def best_picks(scores: np.ndarray, order: np.ndarray, buckets: int) -> np.ndarray:
    """int64 (buckets,), ascending: of every bucket the item of the highest score, then the lowest index. O(C).

    scores: float (N,).
    """
    if buckets == 0:
        return np.zeros(0, np.int64)
    members, absent, _ = _columns(order, buckets)
    ranked = np.where(absent, -np.inf, scores[members])
    best = ranked == ranked.max(axis=0)
    return np.sort(np.where(best & ~absent, members, len(scores)).min(axis=0))


def centroid_picks(signatures: np.ndarray, scores: np.ndarray, order: np.ndarray, buckets: int) -> np.ndarray:
    """int64 (buckets,), ascending: of every bucket the item nearest to the majority of its bits (a tie is 0). O(D C).

    Among equals the one of the highest score, then the lowest index. signatures: bool (D, N); scores: float (N,).
    """
    if buckets == 0:
        return np.zeros(0, np.int64)
    members, absent, sizes = _columns(order, buckets)
    bits = np.take(signatures, members, axis=1)
    bits &= ~absent
    counter = np.min_scalar_type(2 * len(members))
    centroids = 2 * np.add.reduce(bits.view(np.uint8), axis=1, dtype=counter) > sizes
    distances = hamming(bits, centroids[:, None]).astype(np.int32)
    distances[absent] = len(signatures) + 1
    # By distance, then by score, then by index: each step keeps the best of the step before.
    near = distances == distances.min(axis=0)
    ranked = np.where(near, scores[members], -np.inf)
    best = near & (ranked == ranked.max(axis=0))
    return np.sort(np.where(best, members, signatures.shape[1]).min(axis=0))


def _columns(order: np.ndarray, buckets: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Members (width, buckets) of every bucket, bool (width, buckets) where there is none, and sizes (buckets,).

    Everything runs along the columns, three times as fast as `reduceat` over runs of a dozen.
    """
    starts = bucket_starts(len(order), buckets)
    sizes = np.diff(starts, append=len(order))
    rows = np.arange(int(sizes.max()))[:, None]
    return order[np.minimum(starts + rows, len(order) - 1)], rows >= sizes, sizes


def stride_picks(order: np.ndarray, picks: int) -> np.ndarray:
    """int64 (picks,), ascending: every floor(C / picks)-th of order from the first on; the farthest may be left out."""
    return np.sort(order[np.arange(picks) * (len(order) // max(picks, 1))])
