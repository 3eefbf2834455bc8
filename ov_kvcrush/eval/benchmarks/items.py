"""What every suite is made of: items with a context and questions about it, and tasks that score the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ov_kvcrush.errors import CrushError
from ov_kvcrush.utils.checks import check_integer


@dataclass(frozen=True)
class Question:
    """One question about a context.

    text: what follows the context in the prompt. answers: references, never empty; the metric decides whether one or
    all of them are needed. max_new_tokens: limit of the answer. answer_prefix: beginning of the answer, put after the
    generation prompt of the chat template. classes: labels of a classification, else empty. forced: texts whose
    probability as an answer is measured: the choices of a question that is answered by the likeliest, or the reference
    where caches are compared.
    """

    text: str
    answers: tuple[str, ...]
    max_new_tokens: int
    answer_prefix: str = ""
    classes: tuple[str, ...] = ()
    forced: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_integer("max_new_tokens", self.max_new_tokens, 1)
        if not self.answers:
            raise CrushError(f"answers must have at least one reference, got none for {self.text[:80]!r}")


@dataclass(frozen=True)
class Item:
    """A context and the questions about it. The prompt of a question is context + question.text.

    context: everything before the question; what a query-agnostic policy compresses.
    chat: put the prompt into the model's chat template, context and question in one user turn.
    multi_turn: the questions are turns of one conversation, in order; else each follows the context alone.
    """

    id: str
    task: str
    context: str
    questions: tuple[Question, ...]
    chat: bool = True
    multi_turn: bool = False

    def __post_init__(self) -> None:
        if not (self.id and self.task and self.questions):
            raise CrushError(f"item must have an id, a task and a question, got {self.id!r} of {self.task!r}")


# The score, 0 to 1, of a prediction for a question.
Metric = Callable[[str, Question], float]


@dataclass(frozen=True)
class Task:
    """How answers are generated and scored.

    first_line: only the first line of the prediction counts. stop: strings at which generation ends.
    min_new_tokens: the answer does not end before. is_forced: the reference is decoded token by token (teacher
    forcing) in place of an answer, and the prediction tells how likely it was. is_compared: caches are compared with
    the full one, and no answer is scored.
    """

    name: str
    metric: Metric
    first_line: bool = False
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0
    is_forced: bool = False
    is_compared: bool = False

    def __post_init__(self) -> None:
        check_integer("min_new_tokens", self.min_new_tokens, 0)
        if not self.name or not all(self.stop):
            raise CrushError(f"task must have a name and no empty stop string, got {self.name!r} with {self.stop}")


def score(task: Task, prediction: str, question: Question) -> float:
    """The score, 0 to 1, of what the model wrote."""
    if task.first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return float(task.metric(prediction, question))


def truncate_middle(ids: Sequence[int], max_tokens: int, num_after: int = 0) -> list[int]:
    """Cut ids in their middle so that they and the num_after tokens behind them are at most max_tokens.

    The first max_tokens // 2 tokens stay, and the last ones of ids + what follows; the cut part is taken from ids only.
    Raises CrushError if num_after leaves no room.
    """
    check_integer("max_tokens", max_tokens, 1)
    check_integer("num_after", num_after, 0)
    room = max_tokens - num_after
    if room < 1:
        raise CrushError(f"max_tokens must be more than the {num_after} tokens after the context, got {max_tokens}")
    if len(ids) <= room:
        return list(ids)
    head = min(max_tokens // 2, room)
    return [*ids[:head], *ids[len(ids) - (room - head) :]]
