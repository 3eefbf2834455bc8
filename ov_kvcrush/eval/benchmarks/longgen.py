"""Long answers, for policies that act while they are written: from a seed, with no data but words and a text.

copy: lines of random words are repeated. list: numbered records, out of order, are written down in order. Both are
scored by the lines that are right, in order. continue: a text's second half after its first, token by token as it
stands (teacher forcing), scored by how likely the model found it. Prompt and answer are about equally long.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.benchmarks.haystack import Haystack
from ov_kvcrush.eval.benchmarks.items import Item, Question, Task
from ov_kvcrush.eval.benchmarks.metrics import lines_in_order
from ov_kvcrush.eval.benchmarks.niah import require_essays
from ov_kvcrush.eval.benchmarks.sizing import DEFAULT_SEED, CountTokens, ItemRecipe, fit
from ov_kvcrush.eval.benchmarks.words import Words, load_words
from ov_kvcrush.utils.checks import check_choice, check_integer

SUITE = "longgen"
CONTINUE = "continue"

_WORDS_OF_A_LINE = 4
_FIRST_NUMBER = 101  # so that no number is the end of another
_MORE = 1.1  # times the tokens of the answer: what a model may write beside it
_SAID_FIRST = 8  # last words of a text's first half, which take the place of a question
_LOSS = re.compile(r"(\d+\.\d+) nats per token")


def likelihood(prediction: str, question: Question) -> float:
    """Geometric mean of the probabilities of the reference's tokens, read from a text that `loss_text` wrote."""
    found = _LOSS.search(prediction)
    if found is None:
        raise CrushError(f"prediction of {CONTINUE} must tell a loss, got {prediction[:60]!r}")
    return math.exp(-float(found[1]))


def loss_text(loss: float, num_tokens: int) -> str:
    """The prediction that a run records for a forced text. loss: mean negative log-likelihood, nats."""
    return f"{loss:.9f} nats per token, {num_tokens} tokens"


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "copy": Task("copy", lines_in_order),
        "list": Task("list", lines_in_order),
        CONTINUE: Task(CONTINUE, likelihood, is_forced=True),
    }
)


def longgen_items(
    tasks: Collection[str],
    count: int,
    length: int,
    count_tokens: CountTokens,
    text: Haystack | None = None,
    seed: int = DEFAULT_SEED,
) -> Iterator[Item]:
    """`count` items of each task, task by task, made one at a time.

    length: most tokens of prompt and answer together, without a chat template. text: for `continue`.
    Raises CrushError before the first item for an unknown task, no text, or a missing word list; while iterating for a
    length that a task cannot be made for, a text that is too short among them.
    """
    check_integer("count", count, 1)
    check_integer("length", length, 1)
    for task in tasks:
        check_choice("task", task, TASKS)
    words = load_words() if {"copy", "list"} & set(tasks) else None
    if CONTINUE in tasks:
        text = require_essays(text, CONTINUE)
    ids = [
        (task, f"{task}-{length}-{index}", f"{seed}/{SUITE}/{task}/{index}") for task in tasks for index in range(count)
    ]
    return (
        fit(_recipe(task, item_id, own, words, text, count_tokens), length, count_tokens) for task, item_id, own in ids
    )


def _recipe(
    task: str, item_id: str, seed: str, words: Words | None, text: Haystack | None, count_tokens: CountTokens
) -> ItemRecipe:
    if task == CONTINUE:
        assert text is not None, "the caller checks that there is a text"
        return _continue(item_id, seed, text, count_tokens)
    assert words is not None, "the caller loads words"
    make = _copy if task == "copy" else _list

    def build(size: int) -> Item:
        context, asked, lines = make(random.Random(seed), words, size)
        first, *rest = lines  # the first is given: a small model may not see from words alone what is wanted
        max_new_tokens = math.ceil(_MORE * count_tokens("\n".join(rest))) + 1
        return Item(item_id, task, context, (Question(asked, tuple(rest), max_new_tokens, f"{first}\n"),))

    return ItemRecipe(build, smallest=3)


def _copy(rng: random.Random, words: Words, size: int) -> tuple[str, str, list[str]]:
    """No two lines begin alike: the place in the list is told by the line before."""
    first = rng.sample(words.nouns, size) if size <= len(words.nouns) else []
    if not first:
        raise CrushError(f"length must be less for copy, there are {len(words.nouns)} words to begin lines with")
    lines = [" ".join([word, *rng.choices(words.adjectives, k=_WORDS_OF_A_LINE - 1)]) for word in first]
    context = f"Below is a list of {size} lines.\n\n" + "\n".join(lines) + "\n\n"
    return context, "Repeat all lines of the list, in the same order and without any change. Write nothing else.", lines


def _list(rng: random.Random, words: Words, size: int) -> tuple[str, str, list[str]]:
    first, last = _FIRST_NUMBER, _FIRST_NUMBER + size - 1
    lines = [f"{number}: {words.key(rng)}" for number in range(first, last + 1)]
    context = f"Below are {size} records in no order.\n\n" + "\n".join(rng.sample(lines, size)) + "\n\n"
    asked = (
        f"Write down all records in the order of their numbers, from {first} to {last}, one in each line, as they are "
        "above. Write nothing else."
    )
    return context, asked, lines


def _continue(item_id: str, seed: str, text: Haystack, count_tokens: CountTokens) -> ItemRecipe:
    def build(size: int) -> Item:
        start = random.Random(seed).randrange(len(text.sentences))
        words = " ".join(text.first(size, start)).split()
        half = len(words) // 2
        context, said, rest = words[: half - _SAID_FIRST], words[half - _SAID_FIRST : half], words[half:]
        answer = " " + " ".join(rest)
        question = Question(" " + " ".join(said), (answer,), count_tokens(answer))
        return Item(item_id, CONTINUE, " ".join(context), (question,), chat=False)

    num_words = sum(len(sentence.split()) for sentence in text.sentences)
    return ItemRecipe(build, smallest=min(4 * _SAID_FIRST, num_words), largest=num_words)
