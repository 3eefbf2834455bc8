"""The suites by name: from options to items and the tasks that score the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.benchmarks import fidelity, longbench, longgen, longqa, ruler, scbench
from ov_kvcrush.eval.benchmarks import needle_grid as needle
from ov_kvcrush.eval.benchmarks.haystack import Haystack, load_haystack
from ov_kvcrush.eval.benchmarks.items import Item, Task
from ov_kvcrush.eval.benchmarks.niah import NEEDLES, needles
from ov_kvcrush.eval.benchmarks.sizing import DEFAULT_SEED, CountTokens
from ov_kvcrush.utils.checks import check_choice, check_integer

DEFAULT_LENGTH = 4096
LONG_LENGTH = 2048  # of longgen, half of which are written one by one
DEFAULT_DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)


@dataclass(frozen=True)
class SuiteOptions:
    """Options of a suite; None and () mean the suite's own default.

    lengths: most tokens of prompt and answer; only `needle` takes several. limit: items of each task or grid point.
    tasks: names. data: folder of longbench and longqa, or what fidelity reads. haystack: text or folder to hide needles
    in, or to be continued. depths: percent, of `needle`. multi_turn: scbench as conversations. questions: of each
    context of longqa and fidelity.
    """

    lengths: tuple[int, ...] = ()
    limit: int | None = None
    seed: int = DEFAULT_SEED
    tasks: tuple[str, ...] = ()
    data: Path | None = None
    haystack: Path | None = None
    depths: tuple[float, ...] = ()
    multi_turn: bool = False
    questions: int | None = None

    def __post_init__(self) -> None:
        for length in self.lengths:
            check_integer("--length", length, 1)
        if self.limit is not None:
            check_integer("--limit", self.limit, 1)
        if self.questions is not None:
            check_integer("--questions", self.questions, 1)
        check_integer("--seed", self.seed, 0)

    @property
    def json(self) -> dict[str, Any]:
        """The options as a run folder records them, without the seed, which is a field of RunConfig."""
        values = {name: value for name, value in asdict(self).items() if name != "seed" and value not in (None, ())}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


@dataclass(frozen=True)
class Suite:
    """Items with the tasks that score them. max_tokens: longer prompts are cut in their middle; None = never."""

    name: str
    items: tuple[Item, ...]
    tasks: Mapping[str, Task]
    max_tokens: int | None = None


def load_suite(name: str, options: SuiteOptions, count_tokens: CountTokens, context_length: int | None) -> Suite:
    """The items of a suite. context_length: tokens of the model's context, None if it does not say.

    Raises CrushError for an unknown suite or task, missing data (telling where to get it), and a length that the model
    or a task does not allow.
    """
    check_choice("suite", name, SUITES)
    for length in options.lengths:
        if context_length is not None and length > context_length:
            raise CrushError(f"--length must be at most {context_length}, the model's context, got {length}")
    return SUITES[name](options, count_tokens, context_length)


def _needles(options: SuiteOptions, count_tokens: CountTokens, context_length: int | None) -> Suite:
    length = _one_length(options, context_length)
    essays = load_haystack(options.haystack)
    items = needles(_or(options.limit, 50), length, count_tokens, essays, options.seed)
    return _suite("needles", items, {NEEDLES.name: NEEDLES})


def _ruler(options: SuiteOptions, count_tokens: CountTokens, context_length: int | None) -> Suite:
    for task in options.tasks:
        check_choice("task", task, ruler.TASKS)
    essays = _essays_if_any(options.haystack)
    tasks = options.tasks or tuple(task for task in ruler.TASKS if essays or task not in ruler.ESSAY_TASKS)
    length = _one_length(options, context_length)
    items = ruler.ruler_items(tasks, _or(options.limit, 20), length, count_tokens, essays, options.seed)
    return _suite("ruler", items, ruler.TASKS)


def _scbench(options: SuiteOptions, count_tokens: CountTokens, context_length: int | None) -> Suite:
    length, count = _one_length(options, context_length), _or(options.limit, 10)
    tasks = options.tasks or tuple(scbench.TASKS)
    for task in tasks:
        check_choice("task", task, scbench.TASKS)
    made = (
        scbench.scbench_items(task, length, count, count_tokens, options.seed, options.multi_turn) for task in tasks
    )
    return _suite("scbench", (item for items in made for item in items), scbench.TASKS)


def _longbench(options: SuiteOptions, count_tokens: CountTokens, context_length: int | None) -> Suite:
    for task in options.tasks:
        check_choice("task", task, longbench.TASKS)
    if options.data is None:
        raise CrushError(f"--data must be a folder with LongBench's jsonl files, got none: {longbench.HOW_TO_GET}")
    length = options.lengths[0] if options.lengths else context_length
    items = longbench.load_longbench(options.data, options.tasks, options.limit)
    return _suite("longbench", items, longbench.TASKS, length)


def _needle(options: SuiteOptions, count_tokens: CountTokens, context_length: int | None) -> Suite:
    lengths = options.lengths or (_one_length(options, context_length),)
    depths = options.depths or DEFAULT_DEPTHS
    essays = load_haystack(options.haystack)
    items = needle.needle_items(lengths, depths, count_tokens, essays, _or(options.limit, 1), options.seed)
    return _suite("needle", items, {needle.TASK.name: needle.TASK})


def _longgen(options: SuiteOptions, count_tokens: CountTokens, context_length: int | None) -> Suite:
    for task in options.tasks:
        check_choice("task", task, longgen.TASKS)
    length = _one_length(options, context_length, LONG_LENGTH)
    tasks, text = options.tasks or tuple(longgen.TASKS), None
    if longgen.CONTINUE in tasks:
        text = load_haystack(options.haystack) if options.tasks else _essays_if_any(options.haystack)
        tasks = tuple(task for task in tasks if text or task != longgen.CONTINUE)
    items = longgen.longgen_items(tasks, _or(options.limit, 5), length, count_tokens, text, options.seed)
    return _suite(longgen.SUITE, items, longgen.TASKS)


def _longqa(options: SuiteOptions, count_tokens: CountTokens, context_length: int | None) -> Suite:
    if options.data is None:
        raise CrushError(f"--data must be a folder with {longqa.CONTEXTS} and {longqa.ITEMS}, or with such, got none")
    items, tasks = longqa.load_longqa(options.data, options.tasks, options.limit, options.questions)
    return _suite(longqa.SUITE, items, tasks, options.lengths[0] if options.lengths else context_length)


def _fidelity(options: SuiteOptions, count_tokens: CountTokens, context_length: int | None) -> Suite:
    if options.data is None:
        raise CrushError("--data must be a folder, a jsonl file or a text, got none")
    items, tasks = fidelity.load_fidelity(options.data, options.tasks, options.limit, _or(options.questions, 1))
    length = _one_length(options, context_length)
    return _suite(fidelity.SUITE, items, tasks, length)


_Load = Callable[[SuiteOptions, CountTokens, "int | None"], Suite]
SUITES: Mapping[str, _Load] = MappingProxyType(
    {
        "needles": _needles,
        "ruler": _ruler,
        "longbench": _longbench,
        "scbench": _scbench,
        "needle": _needle,
        longgen.SUITE: _longgen,
        longqa.SUITE: _longqa,
        fidelity.SUITE: _fidelity,
    }
)


def _suite(name: str, items: Iterable[Item], tasks: Mapping[str, Task], max_tokens: int | None = None) -> Suite:
    return Suite(name, tuple(items), tasks, max_tokens)


def _one_length(options: SuiteOptions, context_length: int | None, default: int = DEFAULT_LENGTH) -> int:
    if len(options.lengths) > 1:
        raise CrushError(f"--length must be one number but for the suite needle, got {len(options.lengths)}")
    if options.lengths:
        return options.lengths[0]
    if context_length is not None and context_length < default:
        raise CrushError(f"--length must be given for a model with a context of {context_length} tokens, got none")
    return default


def _or(limit: int | None, default: int) -> int:
    return default if limit is None else limit


def _essays_if_any(path: Path | None) -> Haystack | None:
    """The given essays, else the installed ones, else None: the tasks with essays are left out then."""
    if path is not None:
        return load_haystack(path)
    try:
        return load_haystack()
    except CrushError:
        return None
