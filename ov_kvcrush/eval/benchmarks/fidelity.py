"""Prompts of any source to compare caches on: longqa's folders, LongBench's jsonl files, plain texts.

No answer is scored. The full cache writes its own, and every other cache is given its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.benchmarks import longbench, longqa
from ov_kvcrush.eval.benchmarks.items import Item, Question, Task
from ov_kvcrush.eval.calibrate.prompts import QUESTION, text_of_file
from ov_kvcrush.utils.checks import check_choice

SUITE = "fidelity"
TEXTS = "texts"  # the task of plain texts
REFERENCE = ("f32", "f32")  # precisions of the full cache that all others are compared with
ANSWER_TOKENS = 32  # of the full cache's answer, at most
_SUFFIXES = (".txt", ".md")


def load_fidelity(
    data: Path, tasks: Sequence[str] = (), limit: int | None = None, questions: int = 1
) -> tuple[list[Item], dict[str, Task]]:
    """Items of a file or a folder, and their tasks.

    data: a folder of longqa or one that has such, with LongBench's jsonl files and texts (.txt, .md) beside them; one
    jsonl file; or one text. tasks: names of folders and files, and TEXTS; none = all. limit: first items of each task.
    questions: of each item, spread evenly over all of its. Raises CrushError where there is none, and naming FILE:LINE
    for a line that is not as it should be.
    """
    found = dict(_sources(data))
    for task in tasks:
        check_choice("task", task, found)
    items: list[Item] = []
    for task in tasks or found:
        items += [_compared(item, task) for item in _load(found[task], limit, questions)]
    return items, {item.task: Task(item.task, _unscored, is_compared=True) for item in items}


def _sources(data: Path) -> Iterator[tuple[str, list[Path]]]:
    """Names of tasks, and the folder or files of each."""
    if data.is_file():
        yield (data.stem if data.suffix == ".jsonl" else TEXTS), [data]
        return
    if longqa.is_task(data):
        yield data.absolute().name, [data]
        return
    folders = [path.parent for path in sorted(data.glob(f"*/{longqa.CONTEXTS}")) if longqa.is_task(path.parent)]
    files = sorted(data.glob("*.jsonl"))
    texts = sorted(path for path in data.glob("*") if path.suffix in _SUFFIXES)
    if not (folders or files or texts):
        raise CrushError(
            f"--data must be a jsonl file, a text, or a folder with some or with {longqa.CONTEXTS} and {longqa.ITEMS}, "
            f"got {str(data)!r}"
        )
    yield from ((path.name, [path]) for path in folders)
    yield from ((path.stem, [path]) for path in files)
    if texts:
        yield TEXTS, texts


def _load(paths: list[Path], limit: int | None, questions: int) -> list[Item]:
    (first, *_) = paths
    if first.is_dir():
        return longqa.load_longqa(first, (), limit, questions)[0]
    if first.suffix == ".jsonl":
        return longbench.load_file(first, limit)
    return [_text(path) for path in paths[:limit]]


def _text(path: Path) -> Item:
    return Item(path.name, TEXTS, f"{text_of_file(path).rstrip()}\n\n", (Question(QUESTION, ("",), ANSWER_TOKENS),))


def _compared(item: Item, task: str) -> Item:
    """With the reference as what is forced; empty where there is none."""
    asked = (
        replace(q, max_new_tokens=ANSWER_TOKENS, forced=q.answers[:1] if q.answers[0].strip() else ())
        for q in item.questions
    )
    return replace(item, task=task, questions=tuple(asked))


def _unscored(prediction: str, question: Question) -> float:
    raise AssertionError("a comparison scores no answer")
