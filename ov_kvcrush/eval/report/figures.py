"""Pictures of a run: accuracy and frontier over bytes, tasks beside each other, a heat map of needles.

The same rows give the same file: neither the time nor the user's matplotlib style has an influence.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ov_kvcrush.config import ENGINES
from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.benchmarks.needle_grid import TASK as NEEDLE
from ov_kvcrush.eval.benchmarks.needle_grid import length_and_depth
from ov_kvcrush.eval.records import AVERAGE, FULL, Prediction, Setting, bits
from ov_kvcrush.eval.report.frontier import frontier, method_of, panels_of
from ov_kvcrush.eval.report.tables import in_percent, policy_label, row_label, sorted_rows, tasks_of
from ov_kvcrush.eval.statistics import ResultRow
from ov_kvcrush.utils.json_file import write_file

_MARKERS = "osD^vP*X<>phd8"
_MAX_SETTINGS = 16  # of colours that can be told apart
_MAX_SHARE = 150  # percent: beyond it one task with a tiny full score would hide all others


def check_figures() -> None:
    """Raise CrushError if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise CrushError("pictures must have matplotlib, got none; pip install 'ov-kvcrush[plot]'")


def write_figures(
    stem: Path, rows: Sequence[ResultRow], predictions: Sequence[Prediction], settings: Sequence[Setting]
) -> list[Path]:
    """Draw STEM-accuracy.png, -tasks, -frontier and -needles as far as the run has them; return those written.

    With more settings than colours can tell apart, STEM-ranking.png replaces the first two. The frontier is drawn where
    a method has several settings and all are compared with the full cache.
    Raises CrushError if matplotlib is missing, or if a file cannot be written.
    """
    check_figures()
    with _plain_style():
        if len({row_label(row) for row in rows}) > _MAX_SETTINGS:
            figures = {"ranking": ranking_figure(rows)}
        else:
            figures = {"accuracy": accuracy_figure(rows)}
            if len(tasks_of(rows)) > 1 and in_percent(rows[0].suite) and _compared(rows):
                figures["tasks"] = task_figure(rows)
        average = [row for row in rows if row.task == AVERAGE]
        if all(row.kl_mean is not None for row in average) and len({method_of(row) for row in average}) < len(average):
            figures["frontier"] = frontier_figure(rows)
        if any(prediction.task == NEEDLE.name for prediction in predictions):
            figures["needles"] = needle_figure(predictions, settings)
        return [save(figure, stem.with_name(f"{stem.name}-{name}.png")) for name, figure in figures.items()]


def save(figure: Any, path: Path) -> Path:
    """Write a picture whole or not at all, and return its path. Raises CrushError if that fails."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    write_file(path, "out", file.getvalue())
    return path


def accuracy_figure(rows: Sequence[ResultRow]) -> Any:
    """Score over bytes per prompt token on the average of all tasks: a line per policy, a marker per precision.

    A panel per query; openvino_genai's lines are dotted, its markers hollow.
    """
    average = sorted_rows([row for row in rows if row.task == AVERAGE])
    queries = sorted({row.query for row in average}, reverse=True)
    figure = _figure(5.2 * len(queries) + 2.6, 4.8)
    colours = _colours(list(dict.fromkeys(_colour_name(row) for row in average)))
    precisions = sorted({row.precisions for row in average}, key=lambda name: (-bits(name), name))
    markers = {name: _MARKERS[i % len(_MARKERS)] for i, name in enumerate(precisions)}
    panels = figure.subplots(1, len(queries), squeeze=False, sharey=True)[0]
    lines: dict[str, Any] = {}
    for axes, query in zip(panels, queries, strict=True):
        shown = [row for row in average if row.query == query]
        lines.update(_draw_lines(axes, shown, colours, markers))
        title = f"{shown[0].suite}, query-{query}" if len(queries) > 1 else shown[0].suite
        _finish(axes, title, "bytes of the cache per prompt token, all layers")
    panels[0].set_ylabel("score, average of tasks (%)" if in_percent(average[0].suite) else "nats per token")
    keys = [_key(marker) for marker in markers.values()]
    labels = [f"{name} keys/values" for name in markers]
    figure.legend([*lines.values(), *keys], [*lines, *labels], loc="outside right upper", fontsize=8)
    return figure


def frontier_figure(rows: Sequence[ResultRow]) -> Any:
    """A curve per method over bytes per prompt token, of its best settings only (`frontier`); a panel per measure."""
    average = [row for row in rows if row.task == AVERAGE]
    panels = panels_of(average)
    figure = _figure(5.4 * len(panels) + 2.4, 4.8)
    colours = _colours(list(dict.fromkeys(method_of(row) for row in average)))
    drawn: dict[str, Any] = {}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, own in frontier(average, panel).items():
            places = [row.bytes_per_prompt_token for row in own], [panel.value(row) for row in own]
            style = "-" if own[0].engine == ENGINES[0] else ":"
            (drawn[name],) = axes.plot(*places, f"o{style}", color=colours[name], linewidth=1.3, markersize=4)
        if panel.is_loss:
            axes.set_yscale("log")
        axes.set_ylabel(panel.name)
        _finish(axes, average[0].suite, "bytes of the cache per prompt token, all layers")
    figure.legend([*drawn.values()], [*drawn], loc="outside right upper", fontsize=8)
    return figure


def ranking_figure(rows: Sequence[ResultRow]) -> Any:
    """Difference to the full cache with its interval on the average of all tasks, a line per setting, best first."""
    average = [row for row in rows if row.task == AVERAGE]
    ranked = sorted(average, key=lambda row: row.score)
    scale = 100 if in_percent(average[0].suite) else 1
    figure = _figure(9, 1.2 + 0.22 * len(ranked))
    axes = figure.subplots()
    values = scale * np.array([(row.difference, row.low, row.high) for row in ranked])
    errors = np.abs(values[:, 1:] - values[:, :1]).T
    axes.errorbar(values[:, 0], np.arange(len(ranked)), xerr=errors, fmt="o", markersize=4, elinewidth=1)
    axes.axvline(0, color="0.3", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(ranked)), [row_label(row) for row in ranked], fontsize=7)
    axes.set_xlabel("difference to the full cache" + (" (points)" if scale == 100 else " (nats)"))
    axes.set_title(average[0].suite, fontsize=10)
    axes.grid(True, axis="x", alpha=0.3)
    return figure


def task_figure(rows: Sequence[ResultRow]) -> Any:
    """Score as a share of the full cache's, a group of bars for each task and the average; no bar where that is 0."""
    groups = [AVERAGE, *tasks_of(rows)]
    table: dict[str, dict[str, ResultRow]] = defaultdict(dict)
    for row in _compared(rows):
        table[row_label(row)][row.task] = row
    colours = _colours(list(table))
    figure = _figure(min(max(8.0, 3.2 + len(groups) * (0.35 + 0.11 * len(table))), 40), 4.8)
    axes = figure.subplots()
    width = 0.84 / len(table)
    for number, (label, own) in enumerate(table.items()):
        places = np.arange(len(groups)) + (number - (len(table) - 1) / 2) * width
        shares = [_share(own[task]) for task in groups]
        axes.bar(places, shares, width, label=label, color=colours[label])
        for place, share in zip(places, shares, strict=True):
            if share > _MAX_SHARE:
                axes.text(place, _MAX_SHARE - 2, f"{share:.0f}", rotation=90, ha="center", va="top", fontsize=7)
    axes.axhline(100, color="0.3", linestyle="--", linewidth=1)
    axes.set_ylim(0, min(max(105.0, axes.get_ylim()[1]), _MAX_SHARE))
    axes.set_xticks(range(len(groups)), groups, rotation=35, ha="right")
    axes.set_ylabel("score (% of the full cache's)")
    axes.set_title(rows[0].suite, fontsize=10)
    axes.grid(True, axis="y", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def needle_figure(predictions: Sequence[Prediction], settings: Sequence[Setting]) -> Any:
    """A map for each setting: mean score by the length of the prompt and the depth of the needle."""
    found = [p for p in predictions if p.task == NEEDLE.name]
    points = {p.item_id: length_and_depth(p.item_id) for p in found}
    lengths, depths = (sorted(set(values)) for values in zip(*points.values(), strict=True))
    columns = min(4, len(settings))
    lines = math.ceil(len(settings) / columns)
    cell_width, cell_height = max(2.6, 0.55 * len(lengths) + 0.8), max(2.2, 0.32 * len(depths) + 1)
    figure = _figure(columns * cell_width + 1.2, lines * cell_height + 0.4)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, setting in zip(panels, settings, strict=False):
        sums = np.zeros((2, len(depths), len(lengths)))
        for p in found:
            if p.setting_key == setting.key:
                length, depth = points[p.item_id]
                sums[:, depths.index(depth), lengths.index(length)] += (p.score, 1)
        with np.errstate(invalid="ignore"):
            _draw_map(axes, sums[0] / sums[1])
        axes.set_xticks(range(len(lengths)), [str(int(n)) for n in lengths], rotation=45, ha="right", fontsize=7)
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=7)
        axes.set_title(row_label(setting).replace(" (", "\n("), fontsize=8)
    for axes in panels[len(settings) :]:
        axes.set_axis_off()
    figure.supxlabel("length of the prompt (tokens)", fontsize=9)
    figure.supylabel("depth of the needle (%)", fontsize=9)
    figure.colorbar(panels[0].images[0], ax=list(panels), label="score (%)")
    return figure


def _draw_lines(
    axes: Any, rows: Sequence[ResultRow], colours: dict[str, Any], markers: dict[str, str]
) -> dict[str, Any]:
    lines: dict[str, list[ResultRow]] = defaultdict(list)
    for row in rows:
        lines[policy_label(row)].append(row)
    scale = 100 if in_percent(rows[0].suite) else 1
    drawn = {}
    for label, own in lines.items():
        own = sorted(own, key=lambda row: (row.bytes_per_prompt_token, row.score))
        style = "-" if own[0].engine == ENGINES[0] else ":"
        places = [row.bytes_per_prompt_token for row in own], [scale * row.score for row in own]
        drawn[label] = axes.plot(*places, style, color=colours[_colour_name(own[0])], linewidth=1.3)[0]
        for row, x, y in zip(own, *places, strict=True):
            colour = colours[_colour_name(row)]
            inside = colour if row.engine == ENGINES[0] else "white"
            axes.plot(x, y, markers[row.precisions], color=colour, markersize=6, markerfacecolor=inside)
    full = next((row for row in rows if row.policy == FULL), None)
    if full is not None:
        axes.axhline(scale * full.full_score, color="0.3", linestyle="--", linewidth=1)
    return drawn


def _draw_map(axes: Any, scores: np.ndarray) -> None:
    """scores: float64 (depths, lengths), 0 to 1, NaN where nothing was asked."""
    axes.imshow(100 * scores, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    if scores.size > 150:
        return
    for (y, x), value in np.ndenumerate(scores):
        if not math.isnan(value):
            colour = "black" if value > 0.6 else "white"
            axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=6, color=colour)


def _finish(axes: Any, title: str, xlabel: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", rotation=35)
    axes.set_xlabel(xlabel)
    axes.set_title(title, fontsize=10)
    axes.grid(True, which="both", alpha=0.3)


def _compared(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """All rows but those of the full caches that the others are compared with."""
    full = [row for row in rows if row.policy == FULL and row.task == AVERAGE]
    measures = {row_label(row) for row in full if row.difference == row.low == row.high == 0}
    return [row for row in sorted_rows(rows) if row_label(row) not in measures]


def _share(row: ResultRow) -> float:
    return 100 * row.score / row.full_score if row.full_score else math.nan


def _colour_name(row: ResultRow) -> str:
    """Both engines' lines of a policy have the same colour."""
    return policy_label(row).removeprefix(f"{row.engine} ")


def _colours(labels: Sequence[str]) -> dict[str, Any]:
    from matplotlib import colormaps

    palette: Any = colormaps["tab10" if len(labels) <= 10 else "tab20"]
    return {label: palette.colors[i % palette.N] for i, label in enumerate(labels)}


def _key(marker: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color="0.3", marker=marker, linestyle="none", markersize=6)


def _figure(width: float, height: float) -> Any:
    """A white figure that needs neither a display nor the state of pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


@contextmanager
def _plain_style() -> Iterator[None]:
    """matplotlib's defaults, whatever the user's matplotlibrc says."""
    from matplotlib import rc_context, rcdefaults

    with rc_context():
        rcdefaults()
        yield
