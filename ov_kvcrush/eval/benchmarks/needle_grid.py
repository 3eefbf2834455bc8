"""Length x depth grid: one needle at a given depth of essays of a given length, for the heat map of retrieval."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.benchmarks.haystack import Haystack
from ov_kvcrush.eval.benchmarks.items import Item, Task
from ov_kvcrush.eval.benchmarks.metrics import string_match_all
from ov_kvcrush.eval.benchmarks.niah import MAX_NEW_TOKENS_SHORT, Draw, ask, insert, needle, opening, require_essays
from ov_kvcrush.eval.benchmarks.sizing import DEFAULT_SEED, CountTokens, ItemRecipe, fit
from ov_kvcrush.eval.benchmarks.words import Words, load_words
from ov_kvcrush.utils.checks import check_integer

TASK = Task("needle", string_match_all)


def needle_items(
    lengths: Sequence[int],
    depths: Sequence[float],
    count_tokens: CountTokens,
    essays: Haystack | None,
    count: int = 1,
    seed: int = DEFAULT_SEED,
) -> Iterator[Item]:
    """`count` items of every length and depth, length by length; their ids can be read with `length_and_depth`.

    lengths: most tokens of prompt and answer. depths: percent of the haystack's words before the needle, 0 to 100; the
    needle goes to the nearest end of a sentence. The needle and the start of the essays depend on seed and index only,
    so that the points of the grid differ in nothing but length and depth. Raises CrushError before the first
    item for bad settings.
    """
    check_integer("count", count, 1)
    for length in lengths:
        check_integer("length", length, 1)
    for depth in depths:
        if not 0 <= depth <= 100:
            raise CrushError(f"depth must be a percentage from 0 to 100, got {depth}")
    essays, words = require_essays(essays, TASK.name), load_words()
    grid = itertools.product(lengths, depths, range(count))
    return (fit(_recipe(*point, essays, words, seed), point[0], count_tokens) for point in grid)


def length_and_depth(item_id: str) -> tuple[int, float]:
    """Length in tokens and depth in percent of an item of this suite."""
    task, length, depth, _ = item_id.split("-")
    assert task == TASK.name, item_id
    return int(length), float(depth)


def _recipe(length: int, depth: float, index: int, essays: Haystack, words: Words, seed: int) -> ItemRecipe:
    def build(size: int) -> Item:
        draw = Draw(random.Random(f"{seed}/{TASK.name}/{index}"), words)
        key, value = draw.text("words"), draw.text("numbers")
        sentences = essays.first(size, start=draw.rng.randrange(len(essays.sentences)))
        hidden = insert(sentences, [nearest_end(sentences, depth)], [needle("numbers", key, value)])
        return Item(
            id=f"{TASK.name}-{length}-{round(depth, 2):g}-{index}",
            task=TASK.name,
            context=f"{opening('numbers', single=True)}{' '.join(hidden)}\n",
            questions=(ask("numbers", [key], [value], MAX_NEW_TOKENS_SHORT),),
        )

    return ItemRecipe(build, smallest=50)


def nearest_end(sentences: Sequence[str], depth: float) -> int:
    """Number of leading sentences whose words are closest to `depth` percent of all words."""
    words = list(itertools.accumulate((len(sentence.split()) for sentence in sentences), initial=0))
    return min(range(len(words)), key=lambda i: abs(words[i] - depth / 100 * words[-1]))
