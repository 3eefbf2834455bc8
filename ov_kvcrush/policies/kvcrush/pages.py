"""KVCrush on pages: neighbouring tokens are kept or evicted together.

Page p of a layer is its evictable tokens at positions [p * page, (p + 1) * page); it has fewer tokens where some are
protected or were evicted before. Its score is the mean of its tokens' scores; its signature has a bit for each place in
the page and each row of bits, 0 where there is no token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ov_kvcrush.policies.base import top
from ov_kvcrush.policies.kvcrush.bits import first_anchor, hamming
from ov_kvcrush.policies.kvcrush.buckets import order_by_distance, stride_picks
from ov_kvcrush.policies.kvcrush.layer import KeptOfLayer, LayerChoice, layer_table

POOLED = 7  # width of openvino_genai's max-pooling of scores, in tokens


@dataclass(frozen=True)
class Pages:
    """The P pages of tokens at given positions.

    size: positions of a whole page. of_token: int64 (E,), the page of each token, ascending. slots: int (E,), its place
    there. num_tokens: int64 (P,).
    """

    size: int
    of_token: np.ndarray
    slots: np.ndarray
    num_tokens: np.ndarray

    @classmethod
    def of(cls, positions: np.ndarray, size: int) -> Pages:
        """Pages of `size` positions; positions: int (E,), ascending."""
        grid = positions // size
        of_token = np.cumsum(np.diff(grid, prepend=grid[:1]) > 0)
        return cls(size, of_token, positions % size, np.bincount(of_token))

    def __len__(self) -> int:
        return len(self.num_tokens)

    def means(self, values: np.ndarray) -> np.ndarray:
        """float64 (P,): mean of values (E,) over the tokens of each page."""
        return np.bincount(self.of_token, weights=values, minlength=len(self)) / self.num_tokens

    def signatures(self, bits: np.ndarray) -> np.ndarray:
        """bool (R * size, P) of bits (R, E)."""
        out = np.zeros((len(bits), self.size * len(self)), bool)
        out[:, self.slots * len(self) + self.of_token] = bits
        return out.reshape(-1, len(self))


def page_order(scores: np.ndarray, later_first: bool) -> np.ndarray:
    """int64 (P,): pages from the highest score to the lowest; among equals the lower one first, or the later one."""
    return np.argsort(scores, kind="stable")[::-1] if later_first else np.argsort(-scores, kind="stable")


def dropped_pages(pages: Pages, order: np.ndarray, room: int) -> np.ndarray:
    """int64, ascending: pages of `order` that do not fit into `room` tokens: the first such and all after it."""
    return np.sort(order[np.cumsum(pages.num_tokens[order]) > room])


def fill(scores: np.ndarray, of_token: np.ndarray, free: np.ndarray, room: int, later_first: bool) -> np.ndarray:
    """bool (E,): `room` of one head's free tokens, or all: its best whole pages, then the best tokens of one more page.

    scores: float (E,); of_token: int (E,), pages; free: bool (E,). The first page that does not fit ends the whole
    ones: a small page of a low score must not overtake a large one.
    """
    sizes = np.bincount(of_token, weights=free)
    held = np.flatnonzero(sizes)
    means = np.bincount(of_token, weights=np.where(free, scores, 0))[held] / sizes[held]
    order = held[page_order(means, later_first)]
    whole = int(np.count_nonzero(np.cumsum(sizes[order]) <= room))
    stays = np.zeros(len(sizes), bool)
    stays[order[:whole]] = True
    chosen = free & stays[of_token]
    left = room - int(np.count_nonzero(chosen))
    if left > 0 and whole < len(order):
        members = np.flatnonzero(free & (of_token == order[whole]))
        chosen[members[top(scores[members], left)]] = True
    return chosen


def keep_pages(choice: LayerChoice, pages: Pages, represents: np.ndarray, shared: np.ndarray | None) -> KeptOfLayer:
    """What every head keeps: protected tokens, the representatives that it holds, and its own best pages.

    represents: bool (P,). shared: float (E,), scores for all heads, with the later of equal pages first; None: each
    head's own scores.
    """
    table = choice.table
    kept, representatives = [], []
    chosen = represents[pages.of_token]
    for head, (scores, count) in enumerate(zip(choice.scores, choice.counts, strict=True)):
        tokens, columns = table.tokens[head], table.columns[head]
        own = table.in_head(head, chosen)
        mask = table.protected[head] | own
        values = scores[tokens] if shared is None else shared[columns]
        room = count - int(np.count_nonzero(mask))
        mask[tokens] |= fill(values, pages.of_token[columns], ~chosen[columns], room, shared is not None)
        kept.append(np.flatnonzero(mask).astype(np.int32))
        representatives.append(np.flatnonzero(own).astype(np.int32))
    return kept, representatives


def genai_scores(choice: LayerChoice, values: Sequence[np.ndarray]) -> np.ndarray:
    """float64 (E,): openvino_genai's scores: summed over all heads, then the maximum of a token and the 6 after it.

    values: [K] (R, S). Protected tokens are pooled too. A token that a head lacks counts as its lowest.
    """
    everything = layer_table(choice.layer, np.zeros(len(choice.protected), bool))
    total = np.zeros(len(everything))
    for rows, columns in zip(values, everything.columns, strict=True):
        own = rows.sum(axis=0, dtype=np.float64)
        if len(own):
            padded = np.full(len(total), own.min())
            padded[columns] = own
            total += padded
    pooled = total.copy()
    for shift in range(1, min(POOLED, len(total))):
        np.maximum(pooled[:-shift], total[shift:], out=pooled[:-shift])
    return pooled[~choice.protected[everything.positions]]


def genai_anchor(signatures: np.ndarray, kind: str, seed: int, layer: int) -> np.ndarray:
    """bool (D,): openvino_genai's anchor for signatures (D, P) of all evictable pages.

    "random": the layers draw in turn from one Mersenne Twister, D numbers each, and use their highest bits (as
    libstdc++'s uniform distribution over 0 and 1 does).
    """
    if kind != "random":
        return first_anchor(signatures, np.arange(signatures.shape[1]), kind)
    bits = len(signatures)
    twister = np.random.RandomState(seed % 2**32)  # the generator whose stream C++ prescribes
    return twister.randint(0, 2**32, size=(layer + 1) * bits, dtype=np.uint32)[layer * bits :] >= 2**31


def genai_picks(
    pages: Pages, values: np.ndarray, dropped: np.ndarray, picks: int, anchor: tuple[str, int, int]
) -> np.ndarray:
    """int64 (picks,), ascending: the dropped pages that openvino_genai keeps as representatives.

    One bit a token: 1 for the higher half of values (E,), among equals for the lower index. Pages by the distance of
    their bits to the anchor's, every floor(dropped / picks)-th. anchor: kind, seed, layer.
    """
    bits = np.zeros(len(values), bool)
    bits[top(values, len(values) // 2)] = True
    signatures = pages.signatures(bits[None])
    distances = hamming(signatures, genai_anchor(signatures, *anchor)[:, None])[dropped]
    return stride_picks(dropped[order_by_distance(distances[None])], picks)
