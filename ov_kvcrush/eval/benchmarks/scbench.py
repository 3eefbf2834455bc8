"""Stand-ins for tasks of SCBench (arXiv:2412.10319) that need no data: a context and five questions, from a seed.

kv: values of keys in a JSON object. prefix_suffix: the string with a given beginning and end. vt: variables that hold a
value, after RULER. mf: the largest, smallest and middle numbers of a list. passkey: numbers hidden in noise. The real
ones are ten to a hundred times as long; their prompts, metrics and answer lengths are followed
(github.com/microsoft/MInference, scbench/), with 96 tokens instead of 150 for a string, and 10 instead of 5 for a
number with words around it.

multi_turn items are one conversation: the text of a question follows the answer to the one before, which is the
reference (gold_text) unless a runner inserts the model's own. In the others (multi-request) each question follows the
context alone.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import string
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.benchmarks.items import Item, Metric, Question, Task
from ov_kvcrush.eval.benchmarks.metrics import first_number, substring, variable_fraction
from ov_kvcrush.eval.benchmarks.sizing import DEFAULT_SEED, CountTokens, largest
from ov_kvcrush.utils.checks import check_choice, check_integer

TURNS = 5

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_COLOURS = ("red", "blue", "green", "white", "black", "brown", "grey", "pink", "orange", "purple")
_AFFIX = 4  # letters of a prefix or a suffix
_HOPS = 4
_RANKS = ("largest", "second largest", "smallest", "second smallest", "median")

# A context and its questions, of a size that grows with the length in tokens.
_Build = Callable[[random.Random, int], tuple[str, tuple[Question, ...]]]


@dataclass(frozen=True)
class _TaskRecipe:
    """build: context and questions of a size from smallest to greatest; None = no limit."""

    build: _Build
    metric: Metric
    smallest: int
    greatest: int | None = None


def scbench_items(
    task: str,
    length: int,
    count: int,
    count_tokens: CountTokens,
    seed: int = DEFAULT_SEED,
    multi_turn: bool = False,
) -> list[Item]:
    """`count` items of a task, as long as `length` tokens allow, the answers included, without a chat template.

    count_tokens: tokens of a text. The same arguments give the same items. Raises CrushError for a task that is none of
    TASKS, and for a length that is too short for five questions or longer than the task can fill.
    """
    check_choice("task", task, TASKS)
    check_integer("length", length, 1)
    check_integer("count", count, 1)
    return [_fitted(task, length, f"{seed}/{task}/{index}", count_tokens, multi_turn, index) for index in range(count)]


def conversation_tokens(item: Item, count_tokens: CountTokens) -> int:
    """Tokens of the longest prompt of an item, with the references of earlier turns, and of its answer."""
    longest, before = 0, item.context
    for question in item.questions:
        prompt = before + question.text + question.answer_prefix
        longest = max(longest, count_tokens(prompt) + question.max_new_tokens)
        if item.multi_turn:
            before = prompt + gold_text(question)
    return longest


def gold_text(question: Question) -> str:
    """The text that stands for the model's answer in a conversation: all references."""
    return ", ".join(question.answers)


def _fitted(task: str, length: int, seed: str, count_tokens: CountTokens, multi_turn: bool, index: int) -> Item:
    recipe, mode = _TASK_RECIPES[task], "-turns" if multi_turn else ""

    def build(size: int) -> Item:
        context, questions = recipe.build(random.Random(seed), size)
        return Item(f"{task}-{length}-{index}{mode}", task, context, questions, multi_turn=multi_turn)

    def tokens(item: Item) -> int:
        return conversation_tokens(item, count_tokens)

    item, used = largest(build, tokens, length, recipe.smallest, recipe.greatest)
    if used > length:
        raise CrushError(f"length must be at least {used} for {task} with {TURNS} questions, got {length}")
    if recipe.greatest is not None and used < 0.9 * length and item == build(recipe.greatest):
        raise CrushError(f"length must be at most {used} for {task}, there is no more to fill it, got {length}")
    return item


def _kv(rng: random.Random, size: int) -> tuple[str, tuple[Question, ...]]:
    pairs = {_uuid(rng): _uuid(rng) for _ in range(size)}
    asked = rng.sample(sorted(pairs), TURNS)
    context = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
    return f"{context}{json.dumps(pairs)}\n\n", tuple(
        Question(f'Key: "{key}"\nThe value associated with the specified key is: ', (pairs[key],), 96) for key in asked
    )


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _prefix_suffix(rng: random.Random, size: int) -> tuple[str, tuple[Question, ...]]:
    """No two strings share both prefix and suffix; each string asked for shares one of them with others."""
    middles: dict[tuple[str, str], str] = {}
    asked = []
    for _ in range(TURNS):
        prefix, suffix = _letters(rng, _AFFIX), _letters(rng, _AFFIX)
        asked.append((prefix, suffix))
        for ends in ((prefix, suffix), (prefix, _letters(rng, _AFFIX)), (_letters(rng, _AFFIX), suffix)):
            middles.setdefault(ends, _letters(rng, 2 * _AFFIX))
    while len(middles) < size:
        middles.setdefault((_letters(rng, _AFFIX), _letters(rng, _AFFIX)), _letters(rng, 2 * _AFFIX))
    texts = [prefix + middle + suffix for (prefix, suffix), middle in middles.items()]
    rng.shuffle(texts)
    return f"Below is a list of strings.\n\n{json.dumps(texts)}\n\n", tuple(
        Question(
            f'Find the string in the list that begins with "{prefix}" and ends with "{suffix}". The string is: ',
            (prefix + middles[prefix, suffix] + suffix,),
            96,
        )
        for prefix, suffix in asked
    )


def _letters(rng: random.Random, number: int, alphabet: str = string.ascii_lowercase) -> str:
    return "".join(rng.choices(alphabet, k=number))


def _vt(rng: random.Random, size: int) -> tuple[str, tuple[Question, ...]]:
    values = [str(value) for value in rng.sample(range(10_000, 100_000), TURNS)]
    names = _distinct_names(rng, TURNS * (_HOPS + 1))
    chains = [names[i::TURNS] for i in range(TURNS)]
    lines: list[tuple[float, str]] = []
    for value, chain in zip(values, chains, strict=True):
        steps = [f"VAR {chain[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(chain))]
        lines += zip(sorted(rng.random() for _ in steps), steps, strict=True)
    context = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text. For example, after "
        "VAR ABC = 12 and VAR DEF = VAR ABC the variables assigned the value 12 are: ABC, DEF\n\n"
    )
    return f"{context}{_among_noise(lines, size)}\n\n", tuple(
        Question(
            f"Question: Find all variables that are assigned the value {value} in the text above.",
            tuple(chain),
            30,
            "Answer: According to the chain(s) of variable assignment in the text above, "
            f"{_HOPS + 1} variables are assigned the value {value}, they are: ",
        )
        for value, chain in zip(values, chains, strict=True)
    )


def _distinct_names(rng: random.Random, number: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < number:
        names[_letters(rng, 5, string.ascii_uppercase)] = None
    return list(names)


def _among_noise(lines: list[tuple[float, str]], size: int) -> str:
    """Lines between `size` lines of noise; each comes with its depth, 0 to 1."""
    noise = [((i + 0.5) / size, _NOISE) for i in range(size)]
    return "\n".join(line for _, line in sorted([*noise, *lines], key=lambda line: line[0]))


def _mf(rng: random.Random, size: int) -> tuple[str, tuple[Question, ...]]:
    """Different numbers, and an odd number of them, so that each question has one answer."""
    numbers = rng.sample(range(1_000, 10_000), 2 * size + 1)
    ordered = sorted(numbers)
    answers = (ordered[-1], ordered[-2], ordered[0], ordered[1], statistics.median(ordered))
    ranks = rng.sample(list(zip(_RANKS, answers, strict=True)), TURNS)
    return f"Below is a list of numbers.\n\n{numbers}\n\n", tuple(
        Question(
            f"What is the {rank} number in the list? You should answer with only one number, no other words. "
            f"The {rank} number of the list is: ",
            (str(answer),),
            10,
        )
        for rank, answer in ranks
    )


def _passkey(rng: random.Random, size: int) -> tuple[str, tuple[Question, ...]]:
    """A key in each fifth of the noise."""
    keys = dict(zip(rng.sample(_COLOURS, TURNS), map(str, rng.sample(range(10_000, 100_000), TURNS)), strict=True))
    lines = [
        ((i + rng.random()) / TURNS, f"The pass key of the {colour} door is {key}. Remember it. {key} is the pass key.")
        for i, (colour, key) in enumerate(keys.items())
    ]
    context = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about the important information.\n\n"
    )
    return f"{context}{_among_noise(lines, size)}\n\n", tuple(
        Question(
            f"What is the pass key of the {colour} door?", (keys[colour],), 15, f"The pass key of the {colour} door is"
        )
        for colour in rng.sample(sorted(keys), TURNS)
    )


_TASK_RECIPES: Mapping[str, _TaskRecipe] = MappingProxyType(
    {
        "kv": _TaskRecipe(_kv, substring, TURNS),
        "prefix_suffix": _TaskRecipe(_prefix_suffix, substring, 3 * TURNS),
        "vt": _TaskRecipe(_vt, variable_fraction, 1),
        "mf": _TaskRecipe(_mf, first_number, 2, 4_499),
        "passkey": _TaskRecipe(_passkey, first_number, 1),
    }
)

TASKS: Mapping[str, Task] = MappingProxyType(
    {name: Task(name, recipe.metric) for name, recipe in _TASK_RECIPES.items()}
)
