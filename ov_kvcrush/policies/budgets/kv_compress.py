"""The cheapest pages of all heads go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ov_kvcrush.policies.base import BudgetAllocator, CacheState, Scores
from ov_kvcrush.policies.budgets.allocation import Bounds, Rivals, by_layer
from ov_kvcrush.utils.checks import check_integer


@dataclass(frozen=True)
class PageAllocator(BudgetAllocator):
    """The cheapest pages of all heads go.

    Paper: https://arxiv.org/abs/2410.00161. The tokens of a head that are not protected are sorted by score, and cut
    into pages from the lowest; a page costs what its best token does. Pages go in the order of their costs, over all
    layers and heads; equal ones in the order of their places within their heads, then of the heads. Needs scores that
    compare between layers and heads; O(S log S) per head.

    Departure: of the last page that goes, only as many tokens go as the sum demands.

    page_tokens: tokens of a page, at least 1; 1 = Global without a floor, but for ties.
    """

    name: ClassVar[str] = "kv_compress"
    page_tokens: int = 16

    def __post_init__(self) -> None:
        check_integer("page_tokens", self.page_tokens, 1)

    def allocate(self, state: CacheState, scores: Scores, tokens: int) -> list[list[int]]:
        bounds = Bounds.of(state)
        evicted = int(bounds.high.sum()) - bounds.total(tokens)
        costs, sizes, order, heads = self._pages(Rivals.of(state, scores).scores)
        queue = np.lexsort((heads, order, costs))
        gone = np.cumsum(sizes[queue])
        # Every page loses what is still to be evicted when its turn comes: all of it, a part, or nothing.
        lost = np.clip(evicted - (gone - sizes[queue]), 0, sizes[queue])
        counts = bounds.high - np.bincount(heads[queue], weights=lost, minlength=len(bounds.high)).astype(np.int64)
        return by_layer(state, counts)

    def _pages(self, scores: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Costs, tokens, place within the head, and head of every page of all heads."""
        costs, sizes = [], []
        for values in scores:
            ends = np.append(np.arange(self.page_tokens, len(values), self.page_tokens), len(values))
            ends = ends[: len(values)]  # a head without tokens has no page
            costs.append(np.sort(values)[ends - 1])
            sizes.append(np.diff(ends, prepend=0))
        pages = [len(part) for part in costs]
        order = [np.arange(count) for count in pages]
        heads = np.repeat(np.arange(len(pages)), pages)
        return np.concatenate(costs), np.concatenate(sizes), np.concatenate(order), heads
