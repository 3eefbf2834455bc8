"""Budget allocators: each equals a slow, obvious one, and its numbers add up within the bounds of every head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
from covering import covering, rarely
from policy_states import cache_state

from ov_kvcrush.errors import CrushError
from ov_kvcrush.policies.base import BudgetAllocator, CacheState, Inputs, Scores
from ov_kvcrush.policies.budgets.ada_kv import AdaKV
from ov_kvcrush.policies.budgets.global_threshold import GlobalThreshold
from ov_kvcrush.policies.budgets.head_profile import HeadProfile
from ov_kvcrush.policies.budgets.kv_compress import PageAllocator
from ov_kvcrush.policies.budgets.pyramid_kv import PyramidKV
from ov_kvcrush.policies.budgets.uniform import Uniform
from ov_kvcrush.policies.budgets.whole_heads import WholeHeads

Counts = list[int]  # of all heads, one after the other


@dataclass(frozen=True)
class Case:
    """A cache and scores to split by, the same for the same case."""

    name: str
    scores: str = "random"
    heads: tuple[int, ...] = (2, 2, 2, 2)
    length: int = 120
    protected: int = 10
    answering: bool = False
    seed: int = 0

    def state(self) -> CacheState:
        protected = np.zeros(self.length, bool)
        protected[np.random.default_rng(self.seed).permutation(self.length)[: self.protected]] = True
        return cache_state(self.seed, Inputs(), "random", protected, self.heads, answering=self.answering)

    def values(self, state: CacheState) -> Scores:
        rng = np.random.default_rng(self.seed + 1)
        number = 0
        scores: Scores = []
        for layer in state.layers:
            scores.append([])
            for head in layer:
                drawn = rng.normal(size=len(head))
                if self.scores == "ties":
                    drawn = np.round(drawn)
                elif self.scores == "constant":
                    drawn[:] = 0.5
                elif self.scores == "constant heads":
                    drawn[:] = number % 3
                elif self.scores == "one head dominates":
                    drawn += 100 * (number == 3)
                scores[-1].append(drawn.astype(np.float32))
                number += 1
        return scores


CASES = [
    *(Case(f"prompt, {kind}", kind) for kind in ("random", "ties", "constant", "constant heads", "one head dominates")),
    *(Case(f"answer, {kind}", kind, answering=True) for kind in ("random", "ties", "constant", "one head dominates")),
    Case("one head", heads=(1,)),
    Case("one layer", heads=(5,), answering=True),
    Case("one head a layer", "ties", heads=(1,) * 7),
    Case("layers of different width", "ties", heads=(1, 4, 2, 3), answering=True, seed=5),
    Case("all protected", protected=120),
    Case("many protected", "one head dominates", protected=100, answering=True),
    Case("none protected", "ties", protected=0, answering=True),
    Case("one token", length=1, protected=0),
    Case("empty heads", length=3, protected=0, answering=True, seed=2),
]
TOKENS = (1, 7, 30, 61, 111, 119, 120, 1000)
ALLOCATORS = [
    Uniform(), PyramidKV(), PyramidKV(beta=1), PyramidKV(beta=3), AdaKV(), AdaKV(floor=0), AdaKV(floor=1.0),
    GlobalThreshold(), GlobalThreshold(floor=0.3), PageAllocator(), PageAllocator(page_tokens=1),
    PageAllocator(page_tokens=7), PageAllocator(page_tokens=500), WholeHeads(),
]  # fmt: skip


def allocators_and_cases() -> list[Any]:
    """Every class with every case, its settings by turns; with --exhaustive all settings with every case."""
    found = []
    for number, case in enumerate(CASES):
        for allocator in ALLOCATORS:
            same = [other for other in ALLOCATORS if type(other) is type(allocator)]
            marks = () if same[number % len(same)] is allocator else pytest.mark.exhaustive
            found.append(pytest.param(allocator, case, marks=marks, id=f"{allocator}-{case.name}"))
    return found


# -- the slow ones -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """A head of a case: its layer, numbers of protected and cached tokens, (score, place) of those that compete."""

    layer: int
    low: int
    high: int
    free: list[tuple[float, int]]


def flat(counts: list[Counts]) -> Counts:
    return [count for layer in counts for count in layer]


def heads_of(state: CacheState, scores: Scores) -> list[Head]:
    found = []
    for index, layer in enumerate(state.layers):
        for head, values in zip(layer, scores[index], strict=True):
            tokens = list(zip(values.tolist(), head.positions.tolist(), strict=True))
            free = [(value, place) for value, place in tokens if not state.protected[place]]
            found.append(Head(index, len(tokens) - len(free), len(tokens), free))
    return found


def slow_total(heads: list[Head], tokens: int) -> int:
    least, most = sum(head.low for head in heads), sum(head.high for head in heads)
    return max(least, min(most, tokens * len(heads)))


def slow_fit(wanted: list[Fraction], lows: Counts, highs: Counts, total: int) -> Counts:
    """One token at a time to the head that is farthest below the whole part of its wish."""
    wanted = [round(wish * 10**6) / Fraction(10**6) for wish in wanted]
    counts = list(lows)
    while sum(counts) < total:
        open_heads = [i for i in range(len(counts)) if counts[i] < highs[i]]
        counts[min(open_heads, key=lambda i: (counts[i] - wanted[i] // 1, -(wanted[i] % 1), i))] += 1
    return counts


def slow_uniform(heads: list[Head], length: int, tokens: int) -> Counts:
    """One token at a time to the head that has the fewest."""
    counts = [head.low for head in heads]
    while sum(counts) < slow_total(heads, tokens):
        open_heads = [i for i, head in enumerate(heads) if counts[i] < head.high]
        counts[min(open_heads, key=lambda i: (counts[i], i))] += 1
    return counts


def slow_pyramid(heads: list[Head], length: int, tokens: int, beta: int) -> Counts:
    window = Fraction(sum(head.low for head in heads), len(heads))
    mean = tokens - window
    layers = heads[-1].layer + 1
    last = mean / beta
    first = 2 * mean - last
    if first >= length - window:
        first = length - window
        last = 2 * mean - first
    if layers == 1 or mean <= 0 or length < 2 * mean:
        first = last = mean
    wanted = [window + first - head.layer * (first - last) / max(1, layers - 1) for head in heads]
    return slow_fit(wanted, [h.low for h in heads], [h.high for h in heads], slow_total(heads, tokens))


def slow_compete(heads: list[Head], total: int, floor: Fraction) -> Counts:
    """All tokens in one line, the best first; among equals the lower place, then the first head."""
    line = sorted((-value, place, i) for i, head in enumerate(heads) for value, place in head.free)
    free = total - sum(head.low for head in heads)
    best = [i for _, _, i in line[:free]]
    wanted = [
        head.low + (1 - floor) * best.count(i) + floor * Fraction(free, len(heads)) for i, head in enumerate(heads)
    ]
    return slow_fit(wanted, [head.low for head in heads], [head.high for head in heads], total)


def slow_ada(heads: list[Head], length: int, tokens: int, floor: float) -> Counts:
    layers = [[head for head in heads if head.layer == i] for i in range(heads[-1].layer + 1)]
    lows, highs = ([sum(getattr(h, end) for h in layer) for layer in layers] for end in ("low", "high"))
    totals = slow_fit([Fraction(tokens * len(layer)) for layer in layers], lows, highs, slow_total(heads, tokens))
    counts: Counts = []
    for layer, total in zip(layers, totals, strict=True):
        counts += slow_compete(layer, total, Fraction(str(floor)))
    return counts


def slow_global(heads: list[Head], length: int, tokens: int, floor: float) -> Counts:
    return slow_compete(heads, slow_total(heads, tokens), Fraction(str(floor)))


def slow_pages(heads: list[Head], length: int, tokens: int, page_tokens: int) -> Counts:
    """Pages are written down one by one; tokens go one by one."""
    pages = []
    for i, head in enumerate(heads):
        rising = sorted(value for value, _ in head.free)
        for number, begin in enumerate(range(0, len(rising), page_tokens)):
            page = rising[begin : begin + page_tokens]
            pages.append((max(page), number, i, len(page)))
    counts = [head.high for head in heads]
    for _, _, i, size in sorted(pages):
        for _ in range(size):
            if sum(counts) > slow_total(heads, tokens):
                counts[i] -= 1
    return counts


def slow_heads(heads: list[Head], length: int, tokens: int) -> Counts:
    """One token at a time to the head whose best token is the best of those that still miss one."""
    counts = [head.low for head in heads]
    best = [max((value for value, _ in head.free), default=0) for head in heads]
    while sum(counts) < slow_total(heads, tokens):
        counts[max((i for i, head in enumerate(heads) if counts[i] < head.high), key=lambda i: (best[i], -i))] += 1
    return counts


SLOW: dict[str, Callable[..., Counts]] = {
    "uniform": slow_uniform,
    "pyramid": slow_pyramid,
    "ada": slow_ada,
    "global": slow_global,
    "kv_compress": slow_pages,
    "heads": slow_heads,
}


# -- laws --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("allocator", "case"), allocators_and_cases())
def test_equals_the_slow_one_and_adds_up_within_the_bounds_of_every_head(
    allocator: BudgetAllocator, case: Case
) -> None:
    state = case.state()
    scores = case.values(state)
    heads = heads_of(state, scores)
    for tokens in TOKENS:
        by_layer = allocator.allocate(state, scores, tokens)
        assert [len(layer) for layer in by_layer] == list(case.heads)
        counts = flat(by_layer)
        assert counts == SLOW[allocator.name](heads, case.length, tokens, *vars(allocator).values())
        assert sum(counts) == slow_total(heads, tokens)
        assert all(type(n) is int and head.low <= n <= head.high for n, head in zip(counts, heads, strict=True))


@pytest.mark.parametrize(
    ("seed", "allocator"), [*covering(range(14), ALLOCATORS), *rarely(*product(range(14, 30), ALLOCATORS))], ids=repr
)
def test_equals_the_slow_one_on_random_caches(allocator: BudgetAllocator, seed: int) -> None:
    rng = np.random.default_rng(seed)
    case = Case(
        "random",
        scores=str(rng.choice(["random", "ties", "constant heads"])),
        heads=tuple(int(n) for n in rng.integers(1, 4, size=rng.integers(1, 6))),
        length=int(rng.integers(1, 60)),
        protected=int(rng.integers(0, 30)),
        answering=bool(rng.integers(2)),
        seed=seed,
    )
    state = case.state()
    scores = case.values(state)
    tokens = int(rng.integers(1, case.length + 1))
    counts = flat(allocator.allocate(state, scores, tokens))
    assert counts == SLOW[allocator.name](heads_of(state, scores), case.length, tokens, *vars(allocator).values())


@pytest.mark.parametrize("allocator", [AdaKV(), AdaKV(floor=0), GlobalThreshold()], ids=repr)
def test_heads_that_cannot_be_told_apart_keep_the_same(allocator: BudgetAllocator) -> None:
    """Also where every token of every head has the same score, as after an underflow."""
    case = Case("equal", "constant", heads=(4, 4))
    state = case.state()
    assert allocator.allocate(state, case.values(state), 40) == [[40] * 4] * 2


@pytest.mark.parametrize("allocator", [AdaKV(floor=0), GlobalThreshold(), PageAllocator(), WholeHeads()], ids=repr)
def test_a_head_that_dominates_takes_all_that_is_not_protected(allocator: BudgetAllocator) -> None:
    case = Case("dominated", "one head dominates", heads=(2, 2))
    state = case.state()
    low = case.protected
    taken = allocator.allocate(state, case.values(state), 30)[1]
    rivals = 2 if allocator.name == "ada" else 4
    assert taken == [low, low + rivals * 20]


def test_scores_of_protected_tokens_do_not_count() -> None:
    case = Case("protected", heads=(2, 2))
    state = case.state()
    scores = case.values(state)
    for filler in (1e9, -1e9):
        other = [[values.copy() for values in layer] for layer in scores]
        for layer, layer_scores in zip(state.layers, other, strict=True):
            for head, values in zip(layer, layer_scores, strict=True):
                values[state.is_protected(head)] = filler
        for allocator in ALLOCATORS:
            assert allocator.allocate(state, other, 40) == allocator.allocate(state, scores, 40)


def test_pyramid_falls_in_a_line_to_a_twentieth_of_the_mean() -> None:
    case = Case("pyramid", heads=(1,) * 11, length=1000, protected=50)
    state = case.state()
    counts = [layer[0] - 50 for layer in PyramidKV().allocate(state, case.values(state), 250)]
    assert (counts[0], counts[-1], sum(counts)) == (390, 10, 11 * 200)
    assert np.diff(counts).tolist() == [-38] * 10


def test_heads_that_change_their_input_most_keep_most() -> None:
    case = Case("baklava", heads=(4, 4), length=1000, protected=0)
    state = case.state()
    heads = HeadProfile((0.1, 0.9, 0.5, 0.5, 0.2, 0.8, 0.6, 0.4), low_share=0.25, high_share=0.25, spread=2.0)
    counts = heads.allocate(state, case.values(state), 220)
    assert np.sum(counts) == 8 * 220
    np.testing.assert_allclose(counts, np.array([[0.5, 2, 1, 1]] * 2) * 220 / 1.125, atol=1)
    equal = HeadProfile((1.0,) * 8, spread=1.0).allocate(state, case.values(state), 220)
    assert equal == Uniform().allocate(state, case.values(state), 220)


def test_pages_that_go_are_whole_but_for_one() -> None:
    case = Case("pages", heads=(3, 3), length=163, protected=3)
    state = case.state()
    counts = np.array(PageAllocator().allocate(state, case.values(state), 77))
    assert np.count_nonzero((163 - counts) % 16) <= 1


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: PyramidKV(beta=0), "beta must be an integer of at least 1, got 0"),
        (lambda: AdaKV(floor=1.5), "floor must be a fraction"),
        (lambda: GlobalThreshold(floor=-0.1), "floor must be a fraction"),
        (lambda: HeadProfile((0.1,), low_share=0.6, high_share=0.6), r"low_share \+ high_share must be a fraction"),
        (lambda: HeadProfile((0.1,), spread=0.5), "spread must be a finite number of at least 1, got 0.5"),
        (lambda: PageAllocator(page_tokens=0), "page_tokens must be an integer of at least 1, got 0"),
    ],
)
def test_bad_fields_are_refused(build: Callable[[], BudgetAllocator], text: str) -> None:
    with pytest.raises(CrushError, match=text.replace("[", r"\[")):
        build()
