"""Small folders as longqa's data has them, for tiny models whose tokens are bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# By task: the metric, and its questions with answers and choices.
TASKS: Mapping[str, tuple[str, Sequence[dict[str, Any]]]] = {
    "facts": (
        "f1",
        [
            {"question": "Who sold the boat?", "answers": ["the miller", "a miller"]},
            {"question": "Where does it lie?", "answers": ["Anstruther"]},
            {"question": "How old is it?", "answers": ["nine years"]},
        ],
    ),
    "labels": ("label_em", [{"question": "query: my card is gone\nintent:", "answers": ["lost card"]}]),
    "picks": (
        "mc_acc",
        [
            {"question": "What colour is it?", "choices": ["Red as a rose.", "Blue."], "answers": ["B"]},
            {"question": "Who rows?", "choices": ["Anna", "Nobody does", "The old miller"], "answers": ["A"]},
        ],
    ),
}


def text(seed: int) -> str:
    return " ".join(f"On day {i} the crew of boat {seed} saw {seed * i % 11} whales." for i in range(1, 9))


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), "utf-8")
    return path


def write_task(folder: Path, task: str, contexts: int = 2) -> Path:
    """A folder with the task's files; each context has all of its questions."""
    metric, questions = TASKS[task]
    write_lines(folder / "contexts.jsonl", [{"context_id": f"c{i}", "context": text(i + 2)} for i in range(contexts)])
    write_lines(
        folder / "items.jsonl",
        [
            {"id": f"{task}-{i}-{n}", "context_id": f"c{i}", "metric": metric, **question}
            for i in range(contexts)
            for n, question in enumerate(questions)
        ],
    )
    return folder


def write_tasks(folder: Path, contexts: int = 2) -> Path:
    for task in TASKS:
        write_task(folder / task, task, contexts)
    return folder
