"""Rows as tables, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from ov_kvcrush.config import ENGINES, parse_budget
from ov_kvcrush.eval.records import AVERAGE, FULL, Setting, bits
from ov_kvcrush.eval.statistics import ResultRow

# Their scores are nats; all others go from 0 to 1 and are shown in percent.
_NATS = ("perplexity", "fidelity")
_COSTS = ("kept tokens", "bytes per prompt token")
_AMOUNTS = ("kept_tokens", "budget")  # among the settings of a row, but not of its policy

Labelled = ResultRow | Setting


@dataclass(frozen=True)
class Grid:
    """A table as text cells. num_names: leading columns that hold words; the others hold numbers."""

    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    num_names: int

    def rich(self, title: str) -> Table:
        """For the terminal."""
        table = Table(box=box.SIMPLE_HEAD, title=Text(title))
        for number, name in enumerate(self.header):
            is_name = number < self.num_names
            justify: Literal["left", "right"] = "left" if is_name else "right"
            table.add_column(
                name.replace(" ", "\n").replace("_", "_\n"),
                justify=justify, no_wrap=not is_name, min_width=24 if number == 0 else None,
            )  # fmt: skip
        for line in self.lines:
            table.add_row(*map(Text, line))
        return table

    def markdown(self) -> str:
        """A GitHub table; ends with a line break."""
        rule = ["---"] * self.num_names + ["---:"] * (len(self.header) - self.num_names)
        lines = [self.header, tuple(rule), *self.lines]
        return "".join(f"| {' | '.join(map(_escape, line))} |\n" for line in lines)


def _escape(cell: str) -> str:
    """A bar would end the cell."""
    return cell.replace("|", "\\|")


def summary(rows: Sequence[ResultRow], task: str = AVERAGE) -> Grid:
    """A line per setting on one task: score beside the full cache's, the difference and its interval, and the cost."""
    chosen = sorted_rows([row for row in rows if row.task == task])
    queries = len({row.query for row in chosen}) > 1
    header = ("policy", "kept", "keys/values", *(("query",) if queries else ()))
    compared = ("KL mean", "KL median", "same top %") if any(row.kl_mean is not None for row in chosen) else ()
    numbers = ("n", "score", "full score", "difference", "95 % interval", *compared, *_COSTS)
    lines = []
    for row in chosen:
        names = (policy_label(row), kept_label(row), row.precisions, *((row.query,) if queries else ()))
        beside = divergence_cells(row) if compared else ()
        lines.append((*names, str(row.n), *score_cells(row), *beside, *cost_cells(row)))
    return Grid((*header, *numbers), tuple(lines), len(header))


def by_task(rows: Sequence[ResultRow], tasks: Sequence[str] = ()) -> Grid:
    """A line per setting, a column per task, of all if none are named: scores, the average first."""
    settings: dict[str, dict[str, ResultRow]] = {}
    for row in sorted_rows(rows):
        settings.setdefault(row_label(row), {})[row.task] = row
    tasks = tasks or tasks_of(rows)
    lines = [(label, *(_score(own[task]) for task in (AVERAGE, *tasks))) for label, own in settings.items()]
    return Grid(("setting", AVERAGE, *tasks), tuple(lines), 1)


def tasks_of(rows: Sequence[ResultRow]) -> list[str]:
    """Names of the tasks in the order of the rows, without the average."""
    return [task for task in dict.fromkeys(row.task for row in rows) if task != AVERAGE]


def sorted_rows(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Full caches first, then by what was kept, most first, and policy; openvino_genai's beside ours."""

    def place(row: ResultRow) -> tuple[object, ...]:
        engine = ENGINES.index(row.engine) if row.engine in ENGINES else len(ENGINES)
        return (
            row.policy != FULL,
            *_amount(row),
            row.policy,
            _options(row),
            engine,
            row.query,
            -bits(row.precisions),
            row.precisions,
        )

    return sorted(rows, key=place)


def policy_label(row: Labelled) -> str:
    """Policy with its settings; the engine in front where it is not ours."""
    name = "full" if row.policy == FULL else row.policy
    engine = "" if row.engine == ENGINES[0] else f"{row.engine} "
    return f"{engine}{name}{_options(row)}"


def kept_label(row: Labelled) -> str:
    """The requested budget: a percentage, a number of tokens, or bytes."""
    if row.kept is None and "budget" in row.settings:
        return f"{row.settings['budget']} of bf16"
    return f"{row.settings['kept_tokens']} tokens" if row.kept is None else f"{100 * row.kept:g} %"


def row_label(row: Labelled) -> str:
    """The whole setting in a few words, the same on every task."""
    kept = "" if row.policy == FULL else f" {kept_label(row)}"
    return f"{policy_label(row)}{kept} {row.precisions}{'' if row.query == 'aware' else f' {row.query}'}"


def score_cells(row: ResultRow) -> tuple[str, str, str, str]:
    """Score, full score, difference and its interval."""
    scale, digits = _scale(row)
    return _score(row), f"{scale * row.full_score:.{digits}f}", *difference_cells(row)


def difference_cells(row: ResultRow) -> tuple[str, str]:
    """Difference and its interval; empty for the full cache that the others are compared with."""
    if row.policy == FULL and row.difference == row.low == row.high == 0:
        return "", ""
    scale, digits = _scale(row)
    difference, low, high = (f"{scale * value:+.{digits}f}" for value in (row.difference, row.low, row.high))
    return difference, f"{low} to {high}"


def divergence_cells(row: ResultRow) -> tuple[str, str, str]:
    """Mean and median of KL, and the agreement of the most likely token in percent; empty where not measured."""
    if row.kl_mean is None or row.kl_median is None or row.top1 is None:
        return "", "", ""
    return f"{row.kl_mean:.4f}", f"{row.kl_median:.4f}", f"{100 * row.top1:.1f}"


def cost_cells(row: ResultRow) -> tuple[str, str]:
    """Kept tokens, and bytes per prompt token."""
    return f"{row.kept_tokens:.0f}", f"{row.bytes_per_prompt_token:.0f}"


def in_percent(suite: str) -> bool:
    """Whether the scores of a suite go from 0 to 1."""
    return suite not in _NATS


def _options(row: Labelled) -> str:
    own = ", ".join(f"{name}={value}" for name, value in sorted(row.settings.items()) if name not in _AMOUNTS)
    return f" ({own})" if own else ""


def _amount(row: ResultRow) -> tuple[int, float]:
    """Order of the requested budgets: fractions, then tokens, then bytes; the largest first."""
    if row.kept is not None:
        return 0, -row.kept
    if "budget" in row.settings:
        return 2, -parse_budget(row.settings["budget"])
    return 1, -row.settings["kept_tokens"]


def _score(row: ResultRow) -> str:
    scale, digits = _scale(row)
    return f"{scale * row.score:.{digits}f}"


def _scale(row: ResultRow) -> tuple[int, int]:
    return (100, 1) if in_percent(row.suite) else (1, 4)
