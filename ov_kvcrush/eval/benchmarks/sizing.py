"""Sizes of generated items: search the largest item whose prompt and answer fit into a number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.benchmarks.items import Item
from ov_kvcrush.utils.checks import check_integer

T = TypeVar("T")
CountTokens = Callable[[str], int]

# Every generated suite draws from this seed unless told otherwise; it is RULER's.
DEFAULT_SEED = 42


@dataclass(frozen=True)
class ItemRecipe:
    """How to make one item. build: returns the item of a size from smallest to largest; deterministic."""

    build: Callable[[int], Item]
    smallest: int
    largest: int | None = None


def fit(recipe: ItemRecipe, length: int, count_tokens: CountTokens) -> Item:
    """The largest item of a recipe whose tokens, answer included, are at most `length`.

    Raises CrushError if the smallest item is longer, or if the largest one fills less than nine tenths of `length`.
    """
    check_integer("length", length, 1)

    def tokens(item: Item) -> int:
        return item_tokens(item, count_tokens)

    item, used = largest(recipe.build, tokens, length, recipe.smallest, recipe.largest)
    if used > length:
        raise CrushError(f"length must be at least {used} for {item.id}, got {length}")
    # Refuse only if the recipe has no larger size: in a short item one size more may be a big step.
    if recipe.largest is not None and used < 0.9 * length and item == recipe.build(recipe.largest):
        raise CrushError(f"length must be at most {used} for {item.id}, there is no more to fill it, got {length}")
    return item


def item_tokens(item: Item, count_tokens: CountTokens) -> int:
    """Tokens of the longest question's prompt and answer, without a chat template."""
    return max(count_tokens(item.context + q.text + q.answer_prefix) + q.max_new_tokens for q in item.questions)


def largest(
    build: Callable[[int], T], tokens: Callable[[T], int], budget: int, smallest: int, greatest: int | None = None
) -> tuple[T, int]:
    """The largest result of `build` with at most `budget` tokens, or the smallest one if none fits; and its tokens.

    The search ends early within half a percent of the budget. Tokens need not grow strictly with size: only a result
    that was measured to fit is returned.
    """
    low, high = smallest, None
    best = build(low)
    used = tokens(best)
    while used < budget - budget // 200 and (high is None or high - low > 1):
        size = 2 * low if high is None else (low + high) // 2
        if greatest is not None and size >= greatest:
            if low == greatest:
                break
            size = greatest
        candidate = build(size)
        if (count := tokens(candidate)) <= budget:
            low, best, used = size, candidate, count
        else:
            high = size
    return best, used
