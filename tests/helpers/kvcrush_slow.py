"""KVCrush written down slowly and obviously: plain Python over places in the text, to compare the fast one with."""

from __future__ import annotations

from itertools import accumulate, pairwise
from math import floor

import numpy as np

from ov_kvcrush.policies.base import CacheState, LayerState
from ov_kvcrush.policies.kvcrush.policy import KVCrush

Bits = list[int]
Row = dict[int, float]  # by place in the text


def bits_of(values: list[float], rule: str, quantile: float = 0.5, topk: int = 1) -> Bits:
    n = len(values)
    if rule == "mean":
        threshold = float(np.float32(sum(values) / n)) if n else 0.0
        return [int(value > threshold) for value in values]
    if rule == "topk":  # fewer values than topk are higher or equal, itself among them
        return [int(sum(other >= value for other in values) <= topk) for value in values]
    if rule == "median":
        quantile = 0.5
    ascending = sorted(values)
    return [int(value > ascending[floor(quantile * (n - 1))]) for value in values]


def distance(one: Bits, two: Bits) -> int:
    return sum(a != b for a, b in zip(one, two, strict=True))


def majority(signatures: list[Bits]) -> Bits:
    return [int(2 * sum(bits) > len(bits)) for bits in zip(*signatures, strict=True)]


def anchors_of(signatures: list[Bits], kind: str, count: int, seed: tuple[int, int]) -> list[Bits]:
    width = len(signatures[0])
    if kind == "random":
        return np.random.default_rng(seed).integers(0, 2, (count, width)).tolist()
    first = {
        "mean": majority(signatures),
        "inverse_mean": [1 - bit for bit in majority(signatures)],
        "alternating": [i % 2 for i in range(width)],
        "zeros": [0] * width,
        "ones": [1] * width,
    }[kind]
    anchors = [first]
    while len(anchors) < count:
        gaps = [min(distance(bits, anchor) for anchor in anchors) for bits in signatures]
        anchors.append(signatures[gaps.index(max(gaps))])
    return anchors


def order_of(signatures: list[Bits], anchors: list[Bits], neighbourhoods: int = 1) -> list[int]:
    def key(i: int) -> tuple[int, int, int, int]:
        gaps = [distance(signatures[i], anchor) for anchor in anchors]
        return i * neighbourhoods // len(signatures), gaps.index(min(gaps)), min(gaps), i

    return sorted(range(len(signatures)), key=key)


def buckets_of(order: list[int], buckets: int) -> list[list[int]]:
    edges = [i * len(order) // buckets for i in range(buckets + 1)] if buckets else []
    return [order[begin:end] for begin, end in pairwise(edges)]


def pick(signatures: list[Bits], scores: list[float], order: list[int], buckets: int, rule: str) -> list[int]:
    picks = []
    for bucket in buckets_of(order, buckets):
        centroid = majority([signatures[i] for i in bucket])
        nearest = sorted(bucket, key=lambda i: (distance(signatures[i], centroid), -scores[i], i))
        best = sorted(bucket, key=lambda i: (-scores[i], i))
        picks.append({"even": bucket, "best": best, "centroid": nearest}[rule][0])
    return sorted(picks)


class SlowLayer:
    """One layer; the methods follow the docstring of KVCrush."""

    def __init__(
        self, policy: KVCrush, state: CacheState, index: int, scores: list[np.ndarray], counts: list[int]
    ) -> None:
        layer: LayerState = state.layers[index]
        self.policy, self.index, self.counts = policy, index, counts
        self.places = [[int(place) for place in head.positions] for head in layer]
        self.protected = [{p for p in head if state.protected[p]} for head in self.places]
        self.free = [[p for p in head if not state.protected[p]] for head in self.places]
        self.union = sorted({p for head in self.free for p in head})
        self.scores: list[Row] = [
            dict(zip(h, map(float, s), strict=True)) for h, s in zip(self.places, scores, strict=True)
        ]
        self.rows: list[list[Row]] = [[row] for row in self.scores]
        if policy.bits == "attention":
            self.rows = [
                [dict(zip(places, map(float, row), strict=True)) for row in head.attention]
                for places, head in zip(self.places, layer, strict=True)
            ]
        self.host = sum(counts) // len(counts) - max(len(must) for must in self.protected)

    def shares(self) -> Row:
        shares = dict.fromkeys(self.union, 0.0)
        for free, scores in zip(self.free, self.scores, strict=True):
            low = min((scores[p] for p in free), default=0.0)
            mass = sum(scores[p] - low for p in free)
            for p in free:
                shares[p] += (scores[p] - low) / mass if mass else 1 / len(free)
        return {p: share / len(self.scores) for p, share in shares.items()}

    def signatures(self) -> dict[int, Bits]:
        columns: list[dict[int, int]] = []
        for free, rows in zip(self.free, self.rows, strict=True):
            for row in rows:
                bits = bits_of([row[p] for p in free], self.policy.threshold, self.policy.quantile, self.policy.topk)
                columns.append(dict(zip(free, bits, strict=True)))
        return {p: [column.get(p, 0) for column in columns] for p in self.union}

    def num_places(self) -> int:
        if self.policy.share_mode == "static":
            wanted = floor(self.policy.share * sum(self.counts) / len(self.counts) + 0.5)
        else:
            values = self.shares()
            if self.policy.bits == "attention":
                values = {p: sum(row.get(p, 0.0) for rows in self.rows for row in rows) for p in self.union}
            held = list(accumulate(sorted(values.values(), reverse=True)))
            needed = next((i + 1 for i, sum_ in enumerate(held) if sum_ >= self.policy.mass * held[-1]), 0)
            wanted = self.host - needed
        room = min(count - len(must) for count, must in zip(self.counts, self.protected, strict=True))
        return max(0, min(wanted, room))

    def represent(self, signatures: list[Bits], scores: list[float], places: int) -> list[int]:
        if places >= len(signatures):
            return list(range(len(signatures)))
        policy = self.policy
        anchors = anchors_of(signatures, policy.anchor, policy.num_anchors, (policy.seed, self.index))
        order = order_of(signatures, anchors, policy.neighbourhoods)
        return pick(signatures, scores, order, places, policy.representative)

    def choose(self) -> tuple[list[list[int]], list[list[int]]]:
        """Places that every head keeps, and those of them that are representatives."""
        represents = self.representative_pages() if self.policy.page else self.representative_tokens()
        kept, held = [], []
        for head, count in enumerate(self.counts):
            own = [p for p in self.free[head] if p in represents]
            rest = [p for p in self.free[head] if p not in represents]
            room = count - len(self.protected[head]) - len(own)
            best = self.best_pages(rest, self.scores[head], room) if self.policy.page else self.best(rest, head, room)
            kept.append(sorted([*self.protected[head], *own, *best]))
            held.append(own)
        return kept, held

    def representative_tokens(self) -> set[int]:
        places = self.num_places()
        if not places:
            return set()
        shares, signatures = self.shares(), self.signatures()
        ranked = sorted(self.union, key=lambda p: (-shares[p], p))
        dropped = sorted(ranked[max(0, self.host - places) :])
        picks = self.represent([signatures[p] for p in dropped], [shares[p] for p in dropped], places)
        return {dropped[i] for i in picks}

    def best(self, rest: list[int], head: int, room: int) -> list[int]:
        return sorted(rest, key=lambda p: (-self.scores[head][p], p))[:room]

    def pages(self, places: list[int]) -> dict[int, list[int]]:
        pages: dict[int, list[int]] = {}
        for p in places:
            pages.setdefault(p // self.policy.page, []).append(p)
        return pages

    def representative_pages(self) -> set[int]:
        size = self.policy.page
        places = self.num_places() // size
        if not places:
            return set()
        shares, bits, pages = self.shares(), self.signatures(), self.pages(self.union)
        mean = {page: sum(shares[p] for p in members) / len(members) for page, members in pages.items()}
        room, dropped, full = self.host - places * size, [], False
        for page in sorted(pages, key=lambda page: (-mean[page], page)):
            room -= len(pages[page])
            full = full or room < 0
            if full:
                dropped.append(page)
        dropped.sort()
        width = sum(len(rows) for rows in self.rows)
        signatures = [
            [bits[p][row] if p in bits else 0 for row in range(width) for p in range(page * size, (page + 1) * size)]
            for page in dropped
        ]
        picks = self.represent(signatures, [mean[page] for page in dropped], places)
        return {p for i in picks for p in pages[dropped[i]]}

    def best_pages(self, rest: list[int], scores: Row, room: int) -> list[int]:
        pages = self.pages(rest)
        mean = {page: sum(scores[p] for p in members) / len(members) for page, members in pages.items()}
        chosen: list[int] = []
        for page in sorted(pages, key=lambda page: (-mean[page], page)):
            left = room - len(chosen)
            if len(pages[page]) > left:
                return chosen + sorted(pages[page], key=lambda p: (-scores[p], p))[:left]
            chosen += pages[page]
        return chosen
