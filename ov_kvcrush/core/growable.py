"""An integer array that grows in place."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

_LEAST_CAPACITY = 8


class GrowableArray:
    """A one-dimensional integer array with amortised O(1) append; reading gives views, never copies.

    dtype: of the elements. capacity: elements that fit before the first growth.
    """

    def __init__(self, dtype: npt.DTypeLike, values: Iterable[int] | np.ndarray = (), capacity: int = 0) -> None:
        first = np.asarray(values if isinstance(values, np.ndarray) else list(values), dtype)
        self._data = np.empty(max(capacity, len(first) + 1, _LEAST_CAPACITY), dtype)
        self._data[: len(first)] = first
        self._length = len(first)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> np.ndarray:
        return self._data[: self._length][part]

    @property
    def view(self) -> np.ndarray:
        """All elements; valid until the next growth."""
        return self._data[: self._length]

    def append(self, value: int) -> None:
        """Add one element."""
        if self._length == len(self._data):
            self._data = np.concatenate([self._data, np.empty_like(self._data)])
        self._data[self._length] = value
        self._length += 1

    def extend(self, values: np.ndarray) -> None:
        """Add elements, (n,)."""
        length = self._length + len(values)
        if length > len(self._data):
            larger = np.empty(max(length, 2 * len(self._data)), self._data.dtype)
            larger[: self._length] = self.view
            self._data = larger
        self._data[self._length : length] = values
        self._length = length

    def replace_last(self, value: int) -> None:
        """Put `value` in the place of the last element."""
        self._data[self._length - 1] = value

    def shorten(self, length: int) -> None:
        """Remove all elements but the first `length`."""
        self._length = min(self._length, length)

    def clear(self) -> None:
        """Remove every element."""
        self._length = 0

    def copy(self) -> GrowableArray:
        """An independent copy with the same capacity."""
        return GrowableArray(self._data.dtype, self.view, len(self._data))
