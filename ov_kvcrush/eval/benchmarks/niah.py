"""Needles in a haystack: the needle family of RULER, and contexts of several needles that are asked one by one.

Wording and counts are those of NVIDIA's RULER (arXiv 2404.06654). Departures: sentences are split by a regular
expression, keys and values of one item never repeat, every item shuffles its needles anew.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.benchmarks.haystack import HOW_TO_GET, Haystack
from ov_kvcrush.eval.benchmarks.items import Item, Question, Task
from ov_kvcrush.eval.benchmarks.metrics import string_match_all
from ov_kvcrush.eval.benchmarks.sizing import DEFAULT_SEED, CountTokens, ItemRecipe, fit
from ov_kvcrush.eval.benchmarks.words import Words, load_words
from ov_kvcrush.utils.checks import check_integer

Kind = Literal["words", "numbers", "uuids"]

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
OPENING = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
QUESTION = "What are all the special magic {kind} for {query} mentioned in the provided text?"
ANSWER_PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
MAX_NEW_TOKENS = 128
# Enough for one number after its answer prefix.
MAX_NEW_TOKENS_SHORT = 32

# RULER hides needles at 40 even percentiles of the sentences.
DEPTHS = tuple(round(100 * i / 39) for i in range(40))


# The task of the items of `needles`.
NEEDLES = Task("needles", string_match_all)


@dataclass(frozen=True)
class Material:
    """Texts that tasks are made of; None if no requested task needs them."""

    essays: Haystack | None = None
    words: Words | None = None


@dataclass(frozen=True)
class NeedleTask:
    """One variant: num_keys keys with num_values values each are hidden, and one question asks for num_asked keys."""

    name: str
    haystack: Literal["noise", "essays", "needles"]
    keys: Kind = "words"
    values: Kind = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_asked: int = 1

    @property
    def uses_words(self) -> bool:
        """Whether it draws from the word list."""
        return "words" in (self.keys, self.values)


NIAH_TASKS = (
    NeedleTask("niah_single_1", "noise"),
    NeedleTask("niah_single_2", "essays"),
    NeedleTask("niah_single_3", "essays", values="uuids"),
    NeedleTask("niah_multikey_1", "essays", num_keys=4),
    NeedleTask("niah_multikey_2", "needles"),
    NeedleTask("niah_multikey_3", "needles", keys="uuids", values="uuids"),
    NeedleTask("niah_multivalue", "essays", num_values=4),
    NeedleTask("niah_multiquery", "essays", num_keys=4, num_asked=4),
)


class Draw:
    """Random keys and values of one item, without repeats."""

    def __init__(self, rng: random.Random, words: Words | None) -> None:
        self.rng = rng
        self._words = words
        self._given: set[str] = set()

    def text(self, kind: Kind) -> str:
        """A new "adjective-noun", seven-digit number or uuid."""
        while True:
            if kind == "numbers":
                text = str(self.rng.randint(10**6, 10**7 - 1))
            elif kind == "uuids":
                text = str(uuid.UUID(int=self.rng.getrandbits(128), version=4))
            else:
                assert self._words is not None, "the caller loads words for tasks that use them"
                text = self._words.key(self.rng)
            if text not in self._given:
                self._given.add(text)
                return text

    def needles(self, keys: Kind, values: Kind, num_keys: int, num_values: int) -> dict[str, list[str]]:
        """num_keys new keys, each with num_values new values."""
        return {self.text(keys): [self.text(values) for _ in range(num_values)] for _ in range(num_keys)}


def needle(kind: Kind, key: str, value: str) -> str:
    """The sentence that is hidden."""
    return NEEDLE.format(kind=kind, key=key, value=value)


def insert(units: Sequence[str], positions: Sequence[int], needles: Sequence[str]) -> list[str]:
    """The units with needle i before unit positions[i] (after the last one for len(units)); positions are sorted."""
    out: list[str] = []
    begin = 0
    for position, text in zip(positions, needles, strict=True):
        out += [*units[begin:position], text]
        begin = position
    return [*out, *units[begin:]]


def opening(kind: Kind, single: bool) -> str:
    """The sentences before the haystack."""
    return _worded(OPENING, kind, single)


def ask(kind: Kind, keys: Sequence[str], answers: Sequence[str], max_new_tokens: int = MAX_NEW_TOKENS) -> Question:
    """The question for all values of some keys, in the singular for one answer."""
    query = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    single = len(answers) == 1
    return Question(
        text=_worded(QUESTION, kind, single, query),
        answers=tuple(answers),
        max_new_tokens=max_new_tokens,
        answer_prefix=_worded(ANSWER_PREFIX, kind, single, query),
    )


def _worded(template: str, kind: Kind, single: bool, query: str = "") -> str:
    if single:
        template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
    return template.format(kind=kind[:-1] if single else kind, query=query)


def niah_recipe(task: NeedleTask, item_id: str, seed: str, material: Material) -> ItemRecipe:
    """The recipe of a task's item. Size: words of the essays, or lines."""

    def build(size: int) -> Item:
        draw = Draw(random.Random(seed), material.words)
        hidden = draw.needles(task.keys, task.values, task.num_keys, task.num_values)
        sentences = [needle(task.values, key, value) for key, values in hidden.items() for value in values]
        draw.rng.shuffle(sentences)
        asked = draw.rng.sample(list(hidden), task.num_asked)
        question = ask(task.values, asked, [value for key in asked for value in hidden[key]])
        haystack = _hide(task, draw, sentences, size, material.essays)
        context = f"{opening(task.values, len(question.answers) == 1)}{haystack}\n"
        return Item(id=item_id, task=task.name, context=context, questions=(question,))

    return ItemRecipe(build, smallest=50 if task.haystack == "essays" else 5)


def _hide(task: NeedleTask, draw: Draw, needles: list[str], size: int, essays: Haystack | None) -> str:
    if task.haystack == "essays":
        assert essays is not None, "the caller checks that there are essays for tasks that use them"
        return " ".join(_scatter(draw.rng, essays.first(size), needles))
    positions = sorted(draw.rng.sample(range(size), len(needles)))
    lines = [NOISE] * size
    if task.haystack == "needles":
        lines = [needle(task.values, draw.text(task.keys), draw.text(task.values)) for _ in range(size)]
    return "\n".join(insert(lines, positions, needles))


def _scatter(rng: random.Random, sentences: list[str], needles: list[str]) -> list[str]:
    depths = sorted(rng.sample(DEPTHS, len(needles)))
    return insert(sentences, [len(sentences) * depth // 100 for depth in depths], needles)


def needles(
    num_items: int,
    length: int,
    count_tokens: CountTokens,
    essays: Haystack | None,
    seed: int = DEFAULT_SEED,
    num_needles: int = 4,
) -> Iterator[Item]:
    """Items of task "needles": essays with num_needles numbers under different keys, each asked by its own question.

    For compressing a context once and asking it many times. Every item starts at another sentence of the essays.
    length: most tokens of context, one question and its answer. Raises CrushError before the first item.
    """
    check_integer("num_items", num_items, 1)
    check_integer("length", length, 1)
    check_integer("num_needles", num_needles, 1)
    if num_needles > len(DEPTHS):
        raise CrushError(f"num_needles must be at most {len(DEPTHS)}, got {num_needles}")
    essays, words = require_essays(essays, NEEDLES.name), load_words()
    ids = [f"needles-{length}-{index}" for index in range(num_items)]
    recipes = (_needles_recipe(x, f"{seed}/needles/{i}", num_needles, essays, words) for i, x in enumerate(ids))
    return (fit(recipe, length, count_tokens) for recipe in recipes)


def _needles_recipe(item_id: str, seed: str, num_needles: int, essays: Haystack, words: Words) -> ItemRecipe:
    def build(size: int) -> Item:
        draw = Draw(random.Random(seed), words)
        hidden = [(key, value) for key, (value,) in draw.needles("words", "numbers", num_needles, 1).items()]
        start = draw.rng.randrange(len(essays.sentences))
        sentences = [needle("numbers", key, value) for key, value in hidden]
        haystack = " ".join(_scatter(draw.rng, essays.first(size, start), sentences))
        questions = tuple(ask("numbers", [key], [value], MAX_NEW_TOKENS_SHORT) for key, value in hidden)
        context = f"{opening('numbers', num_needles == 1)}{haystack}\n"
        return Item(id=item_id, task=NEEDLES.name, context=context, questions=questions)

    return ItemRecipe(build, smallest=50)


def require_essays(essays: Haystack | None, task: str) -> Haystack:
    """The essays. Raises CrushError with the way to get some if there are none."""
    if essays is None:
        raise CrushError(f"--haystack must be given for {task}, got none: {HOW_TO_GET}")
    return essays
