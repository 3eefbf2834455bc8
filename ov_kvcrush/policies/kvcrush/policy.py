"""KVCrush: tokens that the heads attend to in the same way can represent each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from ov_kvcrush.errors import CrushError
from ov_kvcrush.policies.base import (
    BudgetAllocator,
    CacheState,
    Inputs,
    Policy,
    Scorer,
    Selection,
    top,
    top_with_protected,
)
from ov_kvcrush.policies.budgets.uniform import Uniform
from ov_kvcrush.policies.kvcrush.bits import ANCHORS, THRESHOLDS, anchor_distances, threshold_bits
from ov_kvcrush.policies.kvcrush.buckets import (
    REPRESENTATIVES,
    best_picks,
    centroid_picks,
    even_picks,
    order_by_distance,
)
from ov_kvcrush.policies.kvcrush.layer import KeptOfLayer, LayerChoice, layer_table
from ov_kvcrush.policies.kvcrush.pages import (
    Pages,
    dropped_pages,
    genai_picks,
    genai_scores,
    keep_pages,
    page_order,
)
from ov_kvcrush.policies.scorers.snapkv import SnapKV
from ov_kvcrush.utils.checks import check_choice, check_fraction, check_integer

DEFAULT_WINDOW = 16


@dataclass(frozen=True)
class KVCrush(Policy):
    """A host's best tokens, and with the rest of the budget one representative for each group of similar tokens.

    Paper: https://arxiv.org/abs/2503.00022. Needs what its components need, and with bits="attention" the attention of
    the scorer's window (of 16 query rows if it has none) or of its second prefill. Cost of a layer: that of its
    components and O(H S), H query heads.

    1. Every evictable token of a layer gets a bit per query head: 1 where the head's attention to it exceeds the head's
       threshold over these tokens.
    2. The host keeps its best budget - n tokens, by the mean over the KV heads of their scores as shares
       (`LayerTable.shares`). n = share * budget, rounded; at most what each head has beside its protected tokens.
    3. The tokens it drops are sorted by their Hamming distance to the anchor and cut into n equal buckets. The member
       of each bucket nearest to its centroid (majority of bits) is a representative; among equals the higher share,
       then the lower position.
    4. Every KV head keeps its protected tokens, the representatives that it holds, and up to its budget its own best by
       the host's scores.

    Departures and choices: the paper leaves the threshold open; here "median" is the lower middle, and equal values get
    equal bits. "mean" anchors are the majority over the dropped tokens, a tie is 0; over all tokens no median's bit has
    a majority. Where heads hold different tokens (after earlier evictions), a token that a head lacks has bit 0 and
    share 0 there; if it is a representative, the head keeps one more token of the host's.

    Page mode (page > 0): the same on pages (see pages.py), with floor(n / page) representatives; a page's signature has
    the bits of all its tokens. A head fills its budget with its best whole pages and the best tokens of one more.

    page_rule="genai" decides as openvino_genai does. Scores are the host's summed over the heads, then the highest of
    each token and of the 6 after it; pages are the same for all heads, among equals the later one stays; one bit a
    token, 1 for the higher half; "mean" is over all evictable pages; picks have a constant stride. Its own host is
    SnapKV(window=8, pooling="none"). Departures: its representatives come on top of its budget, these are inside; its
    random anchors go on from one eviction to the next, these begin anew; pages of equal distance keep their order,
    which it leaves open.

    scorer: the host. allocator: how many tokens each head keeps.
    threshold: "median", "mean", "quantile" (with `quantile`, in [0, 1]) or "topk" (with `topk` bits of 1 a head).
    anchor: "mean", "inverse_mean", "alternating" (0, 1, 0, ...), "random" (with `seed`), "zeros" or "ones".
    num_anchors: with more than one, tokens are ordered by the nearest anchor, then by the distance to it;
        `anchor_distances` tells which the further ones are.
    representative: "centroid"; "best": of the highest share, whatever its bits; or "even": the first of each bucket.
    neighbourhoods: runs of the text into which the dropped tokens are cut, each of which has buckets of its own.
    share: of the budget, for representatives, in [0, 1]. share_mode: "static"; or "adaptive": not `share`, but what is
        left beside the fewest tokens with `mass` of the attention to evictable tokens (bits="scores": of the shares).
    page: tokens of a page, 0 = single tokens. page_rule: "crush" or "genai".
    bits: from "attention", a bit per query head (of the second prefill if the scorer has one); or from the host's
        "scores", a bit per KV head.
    Raises CrushError for anything else, and for options that page_rule="genai" does not have.
    """

    name: ClassVar[str] = "kvcrush"
    scorer: Scorer = field(default_factory=SnapKV, kw_only=True)
    allocator: BudgetAllocator = field(default_factory=Uniform, kw_only=True)
    threshold: str = field(default="median", kw_only=True)
    quantile: float = field(default=0.5, kw_only=True)
    topk: int = field(default=128, kw_only=True)
    anchor: str = field(default="mean", kw_only=True)
    seed: int = field(default=0, kw_only=True)
    num_anchors: int = field(default=1, kw_only=True)
    representative: str = field(default="centroid", kw_only=True)
    neighbourhoods: int = field(default=1, kw_only=True)
    share: float = field(default=0.25, kw_only=True)
    share_mode: str = field(default="static", kw_only=True)
    mass: float = field(default=0.9, kw_only=True)
    page: int = field(default=0, kw_only=True)
    page_rule: str = field(default="crush", kw_only=True)
    bits: str = field(default="attention", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("threshold", self.threshold, THRESHOLDS)
        check_fraction("quantile", self.quantile, zero=True)
        check_integer("topk", self.topk, 1)
        check_choice("anchor", self.anchor, ANCHORS)
        check_integer("seed", self.seed, 0)
        check_integer("num_anchors", self.num_anchors, 1)
        check_choice("representative", self.representative, REPRESENTATIVES)
        check_integer("neighbourhoods", self.neighbourhoods, 1)
        check_fraction("share", self.share, zero=True)
        check_choice("share_mode", self.share_mode, ("static", "adaptive"))
        check_fraction("mass", self.mass)
        check_integer("page", self.page, 0)
        check_choice("page_rule", self.page_rule, ("crush", "genai"))
        check_choice("bits", self.bits, ("attention", "scores"))
        if self.page_rule == "genai":
            self._check_genai()

    def _check_genai(self) -> None:
        if self.page == 0:
            raise CrushError('page must be at least 1 with page_rule="genai", got 0; openvino_genai has 32 on a CPU')
        for name, only in (("threshold", "median"), ("num_anchors", 1), ("neighbourhoods", 1)):
            if getattr(self, name) != only:
                raise CrushError(f'{name} must be {only!r} with page_rule="genai", got {getattr(self, name)!r}')

    @property
    def inputs(self) -> Inputs:
        inputs = self.scorer.inputs | self.allocator.inputs
        if self.bits == "attention" and not inputs.window and not inputs.replay:
            inputs |= Inputs(window=DEFAULT_WINDOW, reduce=inputs.reduce)
        return inputs

    def select(self, state: CacheState, tokens: int) -> Selection:
        scores = [self.scorer.score(layer, index, state.length) for index, layer in enumerate(state.layers)]
        counts = self.allocator.allocate(state, scores, tokens)
        chosen = []
        for index, layer in enumerate(state.layers):
            table = layer_table(layer, state.protected)
            choice = LayerChoice(layer, index, state.protected, scores[index], counts[index], table)
            chosen.append(self._choose_pages(choice) if self.page else self._choose_tokens(choice))
        return Selection([kept for kept, _ in chosen], [representatives for _, representatives in chosen])

    def update(self, state: CacheState) -> list[list[np.ndarray]] | None:
        return self.scorer.update_all(state) if self.inputs.state else None

    def _choose_tokens(self, choice: LayerChoice) -> KeptOfLayer:
        table = choice.table
        represents = np.zeros(len(table), bool)
        num_picks = self._num_picks(choice)
        if num_picks:
            shares = table.shares(choice.scores)
            drops = np.ones(len(table), bool)
            drops[top(shares, choice.host_room(num_picks))] = False
            dropped = np.flatnonzero(drops)
            represents[self._pick(self._bits(choice), shares, dropped, num_picks, choice.index)] = True
        held = [table.in_head(head, represents) for head in range(len(choice.layer))]
        kept = [
            top_with_protected(values, must | own, count)
            for values, must, own, count in zip(choice.scores, table.protected, held, choice.counts, strict=True)
        ]
        return kept, [np.flatnonzero(own).astype(np.int32) for own in held]

    def _choose_pages(self, choice: LayerChoice) -> KeptOfLayer:
        pages = Pages.of(choice.table.positions, self.page)
        num_picks = self._num_picks(choice) // self.page
        genai = self.page_rule == "genai"
        values = genai_scores(choice, choice.score_rows) if genai else choice.table.shares(choice.scores)
        represents = np.zeros(len(pages), bool)
        if num_picks:
            means = pages.means(values)
            dropped = dropped_pages(pages, page_order(means, genai), choice.host_room(num_picks * self.page))
            num_picks = min(num_picks, len(dropped))
            if genai:
                seen = genai_scores(choice, self._bit_values(choice))
                picks = genai_picks(pages, seen, dropped, num_picks, (self.anchor, self.seed, choice.index))
            else:
                picks = self._pick(pages.signatures(self._bits(choice)), means, dropped, num_picks, choice.index)
            represents[picks] = True
        return keep_pages(choice, pages, represents, values if genai else None)

    def _num_picks(self, choice: LayerChoice) -> int:
        """Tokens of the layer's budget for representatives."""
        if self.share_mode == "static":
            wanted = int(self.share * sum(choice.counts) / len(choice.counts) + 0.5)
        else:
            table = choice.table
            values = table.shares(choice.scores) if self.bits == "scores" else table.sums(self._bit_values(choice))
            held = np.cumsum(np.sort(values)[::-1])
            wanted = choice.host_room(int(np.count_nonzero(held < self.mass * held[-1:])) + 1)
        return max(0, min(wanted, choice.spare))

    def _bit_values(self, choice: LayerChoice) -> list[np.ndarray]:
        """[K] float32 (R, S): the values that become bits."""
        if self.bits == "scores":
            return choice.score_rows
        rows = [head.attention if head.replayed is None else np.nan_to_num(head.replayed) for head in choice.layer]
        return [x for x in rows if x is not None]

    def _bits(self, choice: LayerChoice) -> np.ndarray:
        """bool (sum of R, E)"""
        return choice.table.bits(
            self._bit_values(choice), lambda rows: threshold_bits(rows, self.threshold, self.quantile, self.topk)
        )

    def _pick(
        self, signatures: np.ndarray, scores: np.ndarray, dropped: np.ndarray, num_picks: int, index: int
    ) -> np.ndarray:
        """int64, ascending: representatives of the items `dropped` (C,) of all: signatures (D, N), scores (N,)."""
        if num_picks >= len(dropped):
            return dropped
        distances = anchor_distances(signatures, dropped, self.anchor, self.num_anchors, (self.seed, index))
        order = dropped[order_by_distance(distances, self.neighbourhoods)]
        if self.representative == "even":
            return even_picks(order, num_picks)
        if self.representative == "best":
            return best_picks(scores, order, num_picks)
        return centroid_picks(signatures, scores, order, num_picks)
