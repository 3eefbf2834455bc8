"""KV-Compress: pages of all heads compete, those of the lowest scores are evicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ov_kvcrush.policies.base import BudgetAllocator, CacheState, Scores
from ov_kvcrush.policies.budgets.allocation import Bounds, Rivals, by_layer
from ov_kvcrush.utils.checks import check_integer


@dataclass(frozen=True)
class PageAllocator(BudgetAllocator):
    """Pages of all heads compete: those of the lowest scores are evicted.

    Paper: https://arxiv.org/abs/2410.00161. A head's unprotected tokens are sorted by score and cut in pages, from the
    lowest; a page costs its highest score. Pages are evicted in the order of their costs over all layers and heads; of
    equal costs, by the page's index within its head, then by head. Needs scores that compare between layers and heads;
    O(S log S) per head.

    Departure: the last page loses only as many tokens as the total demands.

    page_tokens: tokens of a page, at least 1; 1 = GlobalThreshold without a floor, except for ties.
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
        # Each page in turn loses what is still to be evicted: all of its tokens, some, or none.
        lost = np.clip(evicted - (gone - sizes[queue]), 0, sizes[queue])
        counts = bounds.high - np.bincount(heads[queue], weights=lost, minlength=len(bounds.high)).astype(np.int64)
        return by_layer(state, counts)

    def _pages(self, scores: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Cost, number of tokens, index within its head, and head of every page."""
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
