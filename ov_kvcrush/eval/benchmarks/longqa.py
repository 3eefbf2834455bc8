"""Long texts with many questions each, from folders with contexts.jsonl and items.jsonl, a task each.

contexts.jsonl: context_id, context. items.jsonl: id, context_id, question, answers, metric, and choices with "mc_acc",
whose answers are letters. An item of the suite is a context with its questions. Questions of a text are asked in
LongBench's words; those of many-shot classification ("label_em") complete their context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.benchmarks.items import Item, Metric, Question, Task
from ov_kvcrush.eval.benchmarks.jsonl import records, text_of, texts_of
from ov_kvcrush.eval.benchmarks.metrics import exact_match, qa_f1, rouge_l
from ov_kvcrush.utils.checks import check_choice, check_integer

SUITE = "longqa"
CONTEXTS, ITEMS = "contexts.jsonl", "items.jsonl"
CHOICE = "mc_acc"


@dataclass(frozen=True)
class _Kind:
    """How questions of a metric are asked. opening: in front of the context; asking: around the question."""

    metric: Metric
    max_new_tokens: int
    opening: str = "Read the following text and answer briefly.\n\n"
    asking: str = (
        "Now, answer the following question based on the above text, only give me the answer and do not output any "
        "other words.\n\nQuestion: {}\nAnswer:"
    )
    chat: bool = True
    stop: tuple[str, ...] = ()

    def task(self, name: str) -> Task:
        return Task(name, self.metric, first_line=bool(self.stop), stop=self.stop, min_new_tokens=len(self.stop))


_KINDS: Mapping[str, _Kind] = MappingProxyType(
    {
        "f1": _Kind(qa_f1, 64),
        "rouge_l_or_f1": _Kind(qa_f1, 64),  # rouge takes "Paris." and "Paris" for different words
        "rouge_l": _Kind(
            rouge_l, 128,
            "You are given a meeting transcript and a query containing a question or instruction. Answer the query in "
            "one or more sentences.\n\nTranscript:\n",
            "Now, answer the query based on the above meeting transcript in one or more sentences.\n\n"
            "Query: {}\nAnswer:",
        ),
        "label_em": _Kind(exact_match, 16, "", "{}", chat=False, stop=("\n",)),
        CHOICE: _Kind(exact_match, 32),
    }
)  # fmt: skip


def is_task(folder: Path) -> bool:
    """Whether a folder has the two files."""
    return (folder / CONTEXTS).is_file() and (folder / ITEMS).is_file()


def load_longqa(
    folder: Path, tasks: Sequence[str] = (), contexts: int | None = None, questions: int | None = None
) -> tuple[list[Item], dict[str, Task]]:
    """Contexts with their questions, and the tasks that score them.

    folder: of one task, or with a folder for each. tasks: names of folders; none = all. contexts: first ones of each
    task that have questions. questions: of each context, spread evenly over all of its. Raises CrushError for a task
    that there is not, and naming FILE:LINE for a line that is not as it should be.
    """
    for name, value in (("contexts", contexts), ("questions", questions)):
        if value is not None:
            check_integer(name, value, 1)
    found = _folders(folder)
    for task in tasks:
        check_choice("task", task, found)
    items: list[Item] = []
    scored: dict[str, Task] = {}
    for name in tasks or found:
        made, scored[name] = _load(found[name], name, contexts, questions)
        items += made
    return items, scored


def _folders(folder: Path) -> dict[str, Path]:
    if is_task(folder):
        return {folder.absolute().name: folder}
    found = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{CONTEXTS}")) if is_task(path.parent)}
    if not found:
        raise CrushError(
            f"--data must be a folder with {CONTEXTS} and {ITEMS}, or with such folders, got {str(folder)!r}"
        )
    return found


def _load(folder: Path, task: str, contexts: int | None, questions: int | None) -> tuple[list[Item], Task]:
    texts: dict[str, str] = {}
    for where, record in records(folder / CONTEXTS):
        name = text_of(record, "context_id", where)
        if name in texts:
            raise CrushError(f"{where}: context_id must be of one line only, got {name!r} again")
        texts[name] = text_of(record, "context", where)
    asked: dict[str, list[Question]] = {name: [] for name in texts}
    seen: set[str] = set()
    metric = ""
    for where, record in records(folder / ITEMS):
        name, own = text_of(record, "context_id", where), text_of(record, "id", where)
        if name not in texts:
            raise CrushError(f"{where}: context_id must be one of {CONTEXTS}, got {name!r}")
        if own in seen:
            raise CrushError(f"{where}: id must be of one line only, got {own!r} again")
        seen.add(own)
        given = text_of(record, "metric", where)
        metric = metric or given
        if given != metric or given not in _KINDS:
            rule = f"{metric!r} as in the lines before" if metric in _KINDS else f"one of {', '.join(_KINDS)}"
            raise CrushError(f"{where}: metric must be {rule}, got {given!r}")
        asked[name].append(_question(record, metric, where))
    if not seen:
        raise CrushError(f"{folder / ITEMS} must have at least one line, got none")
    kind = _KINDS[metric]
    made = [
        Item(name, task, f"{kind.opening}{texts[name].rstrip()}\n\n", _spread(own, questions), chat=kind.chat)
        for name, own in asked.items()
        if own
    ]
    return made[:contexts], kind.task(task)


def _question(record: dict[str, Any], metric: str, where: str) -> Question:
    kind = _KINDS[metric]
    answers = texts_of(record, "answers", where)
    choices: tuple[str, ...] = ()
    if metric == CHOICE:
        choices = texts_of(record, "choices", where)
        letters = [chr(ord("A") + i) for i in range(len(choices))]
        if len(set(choices)) < max(len(choices), 2) or not all(choices):
            raise CrushError(f"{where}: choices must be at least two, all different, got {list(choices)}")
        if not set(answers) <= set(letters):
            raise CrushError(f"{where}: answers must be among {', '.join(letters)}, got {', '.join(answers)}")
        answers = tuple(choices[letters.index(letter)] for letter in answers)
    text = kind.asking.format(text_of(record, "question", where))
    return Question(text, answers, kind.max_new_tokens, forced=choices)


def _spread(questions: Sequence[Question], count: int | None) -> tuple[Question, ...]:
    """So many of them, evenly over all: those of a text often come in its order."""
    if count is None or count >= len(questions):
        return tuple(questions)
    return tuple(questions[i * len(questions) // count] for i in range(count))
