"""RULER's tasks that need no question-answering data: eight with needles, variable tracking, common and frequent words.

Wording, counts and answer prefixes are those of NVIDIA's RULER (arXiv 2404.06654), so that a prompt is context +
question + answer prefix. Departures: every item has a generator of its own, seeded by (seed, task, index), where RULER
draws all of a task from one and shuffles word lists alike; an item's length is searched for that very item; the example
of variable tracking is at most an eighth of the length, which is less than RULER's 500 tokens below a length of 4,000.
"""

from __future__ import annotations

import itertools
import math
import random
import string
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from ov_kvcrush.eval.benchmarks.haystack import Haystack
from ov_kvcrush.eval.benchmarks.items import Item, Question, Task
from ov_kvcrush.eval.benchmarks.metrics import string_match_all
from ov_kvcrush.eval.benchmarks.niah import NIAH_TASKS, NOISE, Material, insert, niah_recipe, require_essays
from ov_kvcrush.eval.benchmarks.sizing import DEFAULT_SEED, CountTokens, ItemRecipe, fit, largest
from ov_kvcrush.eval.benchmarks.words import Words, load_words
from ov_kvcrush.utils.checks import check_choice, check_integer

TASKS: Mapping[str, Task] = MappingProxyType(
    {name: Task(name, string_match_all) for name in (*(task.name for task in NIAH_TASKS), "vt", "cwe", "fwe")}
)
ESSAY_TASKS = tuple(task.name for task in NIAH_TASKS if task.haystack == "essays")
WORD_TASKS = (*(task.name for task in NIAH_TASKS if task.uses_words), "cwe")

NUM_HOPS = 4
VT_CONTEXT = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
VT_QUESTION = "Question: Find all variables that are assigned the value {query} in the text above."
# "assgined" is how RULER has it.
VT_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{num_v} variables are assgined the value {query}, they are: "
)
VT_EXAMPLE_TOKENS = 500

NUM_COMMON = 10
CWE_CONTEXT = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
)
CWE_QUESTION = "Question: What are the 10 most common words in the above list?"
CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"

FWE_CONTEXT = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
)
FWE_QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"


def ruler_items(
    tasks: Collection[str],
    count: int,
    length: int,
    count_tokens: CountTokens,
    essays: Haystack | None = None,
    seed: int = DEFAULT_SEED,
) -> Iterator[Item]:
    """`count` items of each task, task by task, made one at a time.

    tasks: names of TASKS. length: most tokens of prompt, answer prefix and answer together, without a chat template.
    essays: needed by ESSAY_TASKS alone. Raises CrushError before the first item for an unknown task, missing essays or
    a missing word list; while iterating for a length that a task cannot be made for.
    """
    check_integer("count", count, 1)
    check_integer("length", length, 1)
    for task in tasks:
        check_choice("task", task, TASKS)
        if task in ESSAY_TASKS:
            require_essays(essays, task)
    words = load_words() if any(task in WORD_TASKS for task in tasks) else None
    material = Material(essays, words)
    recipes = (_recipe(task, index, length, count_tokens, material, seed) for task in tasks for index in range(count))
    return (fit(recipe, length, count_tokens) for recipe in recipes)


def _recipe(task: str, index: int, length: int, count_tokens: CountTokens, material: Material, seed: int) -> ItemRecipe:
    item_id, item_seed = f"{task}-{length}-{index}", f"{seed}/{task}/{index}"
    if task == "vt":
        return _vt_recipe(item_id, item_seed, length, count_tokens)
    if task == "cwe":
        assert material.words is not None, "cwe is one of WORD_TASKS"
        return _cwe_recipe(item_id, item_seed, length, material.words)
    if task == "fwe":
        return _fwe_recipe(item_id, item_seed, length)
    return niah_recipe(next(t for t in NIAH_TASKS if t.name == task), item_id, item_seed, material)


def _vt_recipe(item_id: str, seed: str, length: int, count_tokens: CountTokens) -> ItemRecipe:
    """Variable tracking: a number handed on through NUM_HOPS variables. Its size is lines of noise."""
    budget = min(VT_EXAMPLE_TOKENS, length // 8)
    example, _ = largest(partial(_vt_example, f"{seed}/example"), count_tokens, budget, NUM_HOPS + 1)

    def build(size: int) -> Item:
        context, question = _chain(random.Random(seed), size, num_letters=5)
        return Item(id=item_id, task="vt", context=f"{example}\n\n{context}", questions=(question,))

    return ItemRecipe(build, smallest=NUM_HOPS + 1)


def _vt_example(seed: str, num_lines: int) -> str:
    context, question = _chain(random.Random(seed), num_lines, num_letters=3)
    return f"{context}{question.text}{question.answer_prefix} {' '.join(question.answers)}"


def _chain(rng: random.Random, num_lines: int, num_letters: int) -> tuple[str, Question]:
    names: list[str] = []
    while len(names) <= NUM_HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=num_letters))
        # VAR would read as the keyword; a name twice would close the chain to a ring.
        names += [name] * (name not in (*names, "VAR"))
    # The example's values end in 0 and no others do: the value that is asked is never the example's.
    value = rng.randrange(1000, 10000) * 10 + (0 if num_letters == 3 else rng.randrange(1, 10))
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(names))]
    positions = sorted(rng.sample(range(num_lines), len(chain)))
    context = VT_CONTEXT.format(context="\n".join(insert([NOISE] * num_lines, positions, chain)))
    question = Question(
        text=VT_QUESTION.format(query=value),
        answers=tuple(names),
        max_new_tokens=30,
        answer_prefix=VT_PREFIX.format(num_v=len(names), query=value),
    )
    return context, question


def _cwe_recipe(item_id: str, seed: str, length: int, words: Words) -> ItemRecipe:
    """Common words: ten words come ten times as often as the others, in short lists six. Its size is distinct words."""
    vocabulary = words.every()
    short = length < 4096
    example, answers = _word_list(random.Random(f"{seed}/example"), vocabulary, *((20, 3, 1) if short else (40, 10, 3)))
    solved = f"{CWE_CONTEXT.format(context=example)}{CWE_QUESTION}{CWE_PREFIX} {_numbered(answers)}\n"

    def build(size: int) -> Item:
        context, common = _word_list(random.Random(seed), vocabulary, size, *((6, 1) if short else (30, 3)))
        question = Question(text=CWE_QUESTION, answers=tuple(common), max_new_tokens=120, answer_prefix=CWE_PREFIX)
        context = solved + CWE_CONTEXT.format(context=context)
        return Item(id=item_id, task="cwe", context=context, questions=(question,))

    return ItemRecipe(build, smallest=2 * NUM_COMMON, largest=len(vocabulary))


def _word_list(
    rng: random.Random, vocabulary: list[str], num_words: int, common: int, uncommon: int
) -> tuple[str, list[str]]:
    drawn = rng.sample(vocabulary, num_words)
    entries = drawn[:NUM_COMMON] * common + drawn[NUM_COMMON:] * uncommon
    rng.shuffle(entries)
    return _numbered(entries), drawn[:NUM_COMMON]


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def _fwe_recipe(item_id: str, seed: str, length: int) -> ItemRecipe:
    """Frequent words: made-up words, the k-th as often as 1 / k^2. Its size is their number, but for rounding down."""
    rng = random.Random(f"{seed}/words")
    vocabulary: dict[str, None] = {"...": None}  # the most frequent is noise, which RULER writes as dots
    while len(vocabulary) < max(length // 50, 10):
        vocabulary["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    ranked = list(vocabulary)

    def build(size: int) -> Item:
        counts = [int(size / k**2 / (math.pi**2 / 6)) for k in range(1, len(ranked) + 1)]
        text = [word for word, n in zip(ranked, counts, strict=True) for _ in range(n)]
        random.Random(seed).shuffle(text)
        question = Question(FWE_QUESTION, tuple(ranked[1:4]), max_new_tokens=50, answer_prefix=FWE_PREFIX)
        context = FWE_CONTEXT.format(context=" ".join(text))
        return Item(id=item_id, task="fwe", context=context, questions=(question,))

    # From 100 on the fourth rank is more frequent than the fifth.
    return ItemRecipe(build, smallest=100)
