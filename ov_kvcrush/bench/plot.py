"""Pictures of what the bench measured: cost per token over cached tokens, over requests, over threads."""

from __future__ import annotations

import importlib.util
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ov_kvcrush.bench.settings import OURS, RECALLING
from ov_kvcrush.errors import CrushError
from ov_kvcrush.utils.json_file import check_writable, write_file

AXES = {"context": "cached tokens per request", "batch": "requests together", "threads": "threads"}
_MAX_JSON_BYTES = 64 << 20
_FORMATS = ("png", "svg", "pdf")
_TYPES = ("key_precision", "value_precision")
_NEEDED = {
    "attention": (*AXES, *_TYPES, "stock_ms", "crush_ms", "bound_ms"),
    "rows": ("context", "batch", *_TYPES, "engine", "tokens_per_s"),
}


@dataclass(frozen=True)
class Point:
    """Milliseconds that a generated token costs. kind: "attention" or "whole model". threads: 0 where nobody tells.

    bound_of: label of the line that this is a lower bound of; "" for what was measured.
    """

    kind: str
    label: str
    context: int
    batch: int
    threads: int
    ms: float
    bound_of: str = ""


@dataclass(frozen=True)
class Panel:
    """One axis to be drawn; the points of all lines agree in everything else, which `title` says."""

    kind: str
    axis: str
    title: str
    lines: Mapping[str, list[tuple[int, float]]]
    bound_of: Mapping[str, str]


def check_plot(path: Path) -> None:
    """Raise CrushError if no picture can be written at `path`, or if there is nothing to draw it with."""
    if path.suffix[1:].lower() not in _FORMATS:
        raise CrushError(f"--plot must be a file that ends in .{', .'.join(_FORMATS)}, got {str(path)!r}")
    check_writable(path, "plot")
    if importlib.util.find_spec("matplotlib") is None:
        raise CrushError("--plot must have matplotlib, got none; pip install 'ov-kvcrush[plot]'")


def read_reports(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The reports in files that --json wrote. Raises CrushError naming the first that is none."""
    reports = [_read_report(path) for path in paths]
    subjects = sorted({_subject(report) for report in reports})
    if len(subjects) > 1:
        raise CrushError(f"--from must be files about one model and one machine, got {' and '.join(subjects)}")
    return reports


def _subject(report: Mapping[str, Any]) -> str:
    """Model and machine."""
    return f"{Path(report['settings']['model']).name}, {report['environment']['cpu']}"


def _read_report(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            report = json.loads(file.read(_MAX_JSON_BYTES))
    except OSError as error:
        raise CrushError(f"--from must be a file that can be read, got {str(path)!r}: {error.strerror}") from None
    except ValueError:
        raise CrushError(f"--from must be a file written by --json, got {str(path)!r}, which is no JSON") from None
    try:
        _subject(report)
    except (KeyError, TypeError):
        raise CrushError(f"--from must be a file written by --json, got {str(path)!r} with other content") from None
    found = False
    for part, names in _NEEDED.items():
        rows = report.get(part, [])
        found = found or bool(rows)
        if not isinstance(rows, list) or not all(_is_row(row, names) for row in rows):
            raise CrushError(f"--from must be a file written by --json, got {str(path)!r} with other {part!r}")
    if not found:
        raise CrushError(f"--from must be a file written by --json, got {str(path)!r} without measurements")
    return dict(report)


def _is_row(row: Any, names: Sequence[str]) -> bool:
    """Whether all names are there: engines and precisions as text, everything else as numbers above 0."""
    if not isinstance(row, dict):
        return False
    values = [(name, row.get(name)) for name in names]
    return all(
        isinstance(value, str) if name == "engine" or name.endswith("precision") else _is_positive(value)
        for name, value in values
    )


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def points_of(report: Mapping[str, Any]) -> list[Point]:
    """What a report says of the cost of a token."""
    points = []
    for row in report.get("attention", []):
        types = f"{row['key_precision']}/{row['value_precision']}"
        place = (row["context"], row["batch"], row["threads"])
        ours = f"CrushAttention {types}"
        for label, name, bound_of in (
            ("PagedAttention u8/u8", "stock_ms", ""),
            (ours, "crush_ms", ""),
            (f"reading {types} at memory speed", "bound_ms", ours),
        ):
            points.append(Point("attention", label, *place, row[name] / row["batch"], bound_of))
    for row in report.get("rows", []):
        engine = OURS if row["engine"] == RECALLING else row["engine"]
        label = f"{engine} {row['key_precision']}/{row['value_precision']}"
        if row.get("recall_tokens"):
            label += f" recall {row['recall_tokens']}"
        if row.get("policy", "none") != "none":
            label += f" {row['policy']}"
        points.append(Point("whole model", label, row["context"], row["batch"], 0, 1e3 / row["tokens_per_s"]))
    return points


def panels_of(points: Sequence[Point]) -> list[Panel]:
    """A panel for each kind and axis along which something was measured: at least two values, all else equal."""
    panels = []
    for kind in dict.fromkeys(point.kind for point in points):
        for axis in AXES:
            panel = _panel(kind, axis, [point for point in points if point.kind == kind])
            if panel:
                panels.append(panel)
    return panels


def _panel(kind: str, axis: str, points: Sequence[Point]) -> Panel | None:
    fixed = [name for name in AXES if name != axis]
    groups: dict[tuple[int, ...], list[Point]] = defaultdict(list)
    for point in points:
        groups[tuple(getattr(point, name) for name in fixed)].append(point)

    def wealth(place: tuple[int, ...]) -> tuple[int, int, int, int]:
        """The most values along the axis; among equals few requests, many tokens and threads."""
        values = dict(zip(fixed, place, strict=True))
        count = len({getattr(point, axis) for point in groups[place]})
        return count, -values.get("batch", 0), values.get("context", 0), values.get("threads", 0)

    best = max(groups, key=wealth)
    if wealth(best)[0] < 2:
        return None
    lines: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for point in groups[best]:
        lines[point.label][getattr(point, axis)].append(point.ms)
    title = ", ".join(f"{name} {value}" for name, value in zip(fixed, best, strict=True) if value)
    medians = {
        label: sorted((x, median(ms)) for x, ms in line.items()) for label, line in lines.items() if len(line) > 1
    }
    return Panel(kind, axis, title, medians, {p.label: p.bound_of for p in groups[best] if p.bound_of})


def write_plot(path: Path, reports: Sequence[Mapping[str, Any]]) -> None:
    """Draw all panels into one picture. Raises CrushError if there are none, or if it cannot be written."""
    panels = panels_of([point for report in reports for point in points_of(report)])
    if not panels:
        raise CrushError("--plot must have two values of --context, --batch or --threads to draw, got one of each")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(panel.kind for panel in panels))
    columns = max(sum(panel.kind == kind for panel in panels) for kind in kinds)
    figure = Figure(figsize=(max(4.6 * columns, 7), 4.2 * len(kinds)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_subject(reports[0]), fontsize=10)
    for part, kind in zip(figure.subfigures(len(kinds), 1, squeeze=False)[:, 0], kinds, strict=True):
        _draw_row(part, [panel for panel in panels if panel.kind == kind], columns)
    file = io.BytesIO()
    figure.savefig(file, format=path.suffix[1:].lower(), dpi=150)
    write_file(path, "plot", file.getvalue())


def _draw_row(part: Any, panels: Sequence[Panel], columns: int) -> None:
    """The panels of one kind beside each other, with one legend below."""
    labels = list(dict.fromkeys(label for panel in panels for label in panel.lines if label not in panel.bound_of))
    shown: dict[str, Any] = {}
    for column, panel in enumerate(panels):
        axes = part.add_subplot(1, columns, column + 1)
        for label, line in panel.lines.items():
            bounded = panel.bound_of.get(label)
            style = {"linestyle": "--", "linewidth": 1} if bounded else {"marker": "o", "markersize": 4}
            colour = f"C{labels.index(bounded or label)}"  # a bound has the colour of what it bounds
            shown[label] = axes.plot(*zip(*line, strict=True), color=colour, **style)[0]
        _finish(axes, panel)
    part.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3, fontsize=8)


def _finish(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import LogFormatter

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())  # 20 instead of 2 x 10^1
    axes.yaxis.set_minor_formatter(LogFormatter())
    ticks = sorted({x for line in panel.lines.values() for x, _ in line})
    axes.set_xticks(ticks, [f"{x // 1024}k" if x % 1024 == 0 else str(x) for x in ticks])
    axes.set_xlabel(AXES[panel.axis])
    axes.set_ylabel("ms per generated token")
    axes.set_title(f"{panel.kind}: {panel.title}", fontsize=10)
    axes.grid(True, which="both", alpha=0.3)
