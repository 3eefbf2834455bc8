"""How sure a mean over items is: the same items drawn again and again."""

from __future__ import annotations

import zlib

import numpy as np

RESAMPLES = 10_000
_TAILS = (0.025, 0.975)


def generator(seed: int, task: str) -> np.random.Generator:
    """What draws the items of a task: its own, so that a task's interval does not depend on what else was run."""
    return np.random.default_rng([seed, zlib.crc32(task.encode())])


def bootstrap_means(values: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Means of items drawn with replacement, the same items for every setting: float64 (resamples, S).

    values: float64 (S, n), one row per setting. O(resamples * n * S), as one product of matrices.
    """
    n = values.shape[1]
    drawn = rng.integers(0, n, (resamples, n)) + np.arange(resamples)[:, None] * n
    counts = np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n)
    # About the mean: what does not differ from item to item has no spread, not even that of rounding.
    centre = values.mean(axis=1)
    return centre + counts.astype(np.float64) @ (values - centre[:, None]).T / n


def interval(draws: np.ndarray) -> np.ndarray:
    """The middle 95 % of means (resamples, S): float64 (S, 2), low and high."""
    return np.quantile(draws, _TAILS, axis=0).T
