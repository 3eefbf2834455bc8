"""The frontier of a run: of each method the settings that none of its own beats, over the bytes that they take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ov_kvcrush.eval.report.tables import in_percent, policy_label
from ov_kvcrush.eval.statistics import ResultRow


class Panel(NamedTuple):
    """What is drawn over bytes: a name for the axis, a value of each row, and whether less of it is better."""

    name: str
    value: Callable[[ResultRow], float]
    is_loss: bool


def method_of(row: ResultRow) -> str:
    """The curve of a row: the policy with its settings, apart where a plan says how much of what stays."""
    return f"{policy_label(row)}, plan" if row.budget is not None else policy_label(row)


def panels_of(rows: Sequence[ResultRow]) -> list[Panel]:
    """KL divergence where every row has one, and scores where they are shares."""
    panels = []
    if all(row.kl_mean is not None for row in rows):
        panels.append(Panel("KL divergence to the full cache, nats", lambda row: row.kl_mean or 0.0, True))
    if in_percent(rows[0].suite):
        panels.append(Panel("score, average of tasks (%)", lambda row: 100 * row.score, False))
    return panels


def frontier(rows: Sequence[ResultRow], panel: Panel) -> dict[str, list[ResultRow]]:
    """By method its rows, all of one task, fewest bytes first, without those that another one of the method beats.

    A row stays if no row of as few bytes is as good.
    """
    methods: dict[str, list[ResultRow]] = defaultdict(list)
    for row in rows:
        methods[method_of(row)].append(row)
    sign = -1 if panel.is_loss else 1
    curves = {}
    for name, own in methods.items():
        best: list[ResultRow] = []
        for row in sorted(own, key=lambda row: (row.bytes_per_prompt_token, -sign * panel.value(row))):
            if not best or sign * panel.value(row) > sign * panel.value(best[-1]):
                best.append(row)
        curves[name] = best
    return curves
