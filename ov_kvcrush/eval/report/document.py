"""A front page of results and a page for each run: command line, machine, tables and pictures."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.benchmarks.fidelity import SUITE as FIDELITY
from ov_kvcrush.eval.benchmarks.longgen import SUITE as LONGGEN
from ov_kvcrush.eval.report.by_turn import by_turn
from ov_kvcrush.eval.report.fidelity import fidelity_grid
from ov_kvcrush.eval.report.figures import check_figures, write_figures
from ov_kvcrush.eval.report.holdout import holdout_of, markdown, worth_showing
from ov_kvcrush.eval.report.likelihood import losses
from ov_kvcrush.eval.report.tables import Grid, by_task, in_percent, summary, tasks_of
from ov_kvcrush.eval.runs.run_folder import Run, read_run
from ov_kvcrush.eval.statistics import RESAMPLES
from ov_kvcrush.utils.json_file import write_file

NOTES = "notes.md"
_MAX_TASK_COLUMNS = 20
_INTRODUCTION = f"""\
Each run has a page with its command, machine, tables and pictures. **Score** is the mean over items (of the average:
the mean of the tasks' means), **full score** that of the full cache of the same engine, the most precise one in the
table, **difference** the first less the second, with the 95 % interval of a paired bootstrap over items ({RESAMPLES}
resamples). **Kept tokens** and **bytes per prompt token** are what the cache held when the prompt had been read, of all
layers. `full` keeps everything; `random` and `streaming_llm` are floors; lines that begin with `genai` are of
openvino_genai.
"""


def write_results(folders: Sequence[Path], target: Path, remake: str = "", notes: Path | None = None) -> list[Path]:
    """Write `target`, and a page and the pictures of each run into a folder beside it named after its stem.

    folders: of finished runs, in this order; the text of a notes.md in one follows the heading of its page.
    remake: the command that writes these files again. notes: Markdown that the front page begins with.
    The same folders give the same files. Returns all paths written, the front page first.
    Raises CrushError for a folder that holds no finished run, two of the same name, and files that cannot be read or
    written.
    """
    check_figures()
    if not folders or len({folder.absolute().name for folder in folders}) < len(folders):
        names = ", ".join(str(folder) for folder in folders) or "none"
        raise CrushError(f"folders must be at least one, with different names, got {names}")
    runs = [read_run(folder) for folder in folders]
    beginning = "" if notes is None else f"{_text(notes)}\n"
    pages = target.parent / target.stem
    try:
        pages.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CrushError(f"--out must be a file that can be written, got {str(target)!r}: {error}") from None
    written = []
    for run in runs:
        stem = pages / run.folder.absolute().name
        drawn = write_figures(stem, run.rows, run.predictions, run.config.settings)
        page = stem.with_name(f"{stem.name}.md")
        write_file(page, "out", section(run, [path.relative_to(pages) for path in drawn]).encode())
        written += [page, *drawn]
    parts = ["# Results\n", beginning, _index(runs, Path(target.stem)).markdown(), _INTRODUCTION]
    if remake:
        parts.append(f"This page and those of the runs are written by\n\n{_shell(remake)}")
    write_file(target, "out", "\n".join(part for part in parts if part).encode())
    return [target, *written]


def _index(runs: Sequence[Run], pages: Path) -> Grid:
    """A line for each run, with a link to its page."""
    lines = []
    for run in runs:
        config, name = run.config, run.folder.absolute().name
        link = f"[{name}]({(pages / name).as_posix()}.md)"
        told = (Path(config.model).name, str(config.num_items), str(len(config.settings)), str(len(run.predictions)))
        lines.append((link, config.suite, *told))
    return Grid(("run", "suite", "model", "items", "settings", "answers"), tuple(lines), 3)


def section(run: Run, pictures: Sequence[Path]) -> str:
    """The page of a run, Markdown. pictures: relative to the page."""
    config = run.config
    tasks = tasks_of(run.rows)
    unit = "Scores are in percent." if in_percent(config.suite) else "Scores are nats per token: less is better."
    if config.suite == LONGGEN:
        unit += "\nKept tokens and bytes are those at the end of the answers; prompt tokens are all, with the answers'."
    parts = [f"# {config.suite}: {Path(config.model).name}\n"]
    notes = run.folder / NOTES
    if notes.is_file():
        parts.append(f"{_text(notes)}\n")
    grid = fidelity_grid(run) if config.suite == FIDELITY else summary(run.rows)
    parts += [_shell(config.command), f"{_machine(run)}\n", f"{unit}\n", grid.markdown()]
    if 1 < len(tasks) <= _MAX_TASK_COLUMNS:
        parts += [f"{len(tasks)} tasks:\n", by_task(run.rows).markdown()]
    nats = losses(run)
    if nats:
        parts += ["Next-token loss of `continue`, nats per token, less is better:\n", summary(nats).markdown()]
    turns = by_turn(run)
    if turns:
        parts += [f"By {turns.name}, averages of the tasks:\n", by_task(turns.rows).markdown()]
    if worth_showing(run):
        parts.append(markdown(holdout_of(run)))
    parts += [f"![{picture.stem}]({picture.as_posix()})\n" for picture in pictures]
    return "\n".join(parts)


def _machine(run: Run) -> str:
    """Items, model, machine and versions in a paragraph."""
    config, environment = run.config, run.config.environment
    versions = environment.get("versions")
    named = versions.items() if isinstance(versions, dict) else ()
    lines = (
        f"{config.num_items} items, {len(run.predictions)} answers, seed {config.seed}; "
        f"model {Path(config.model).name}, fingerprint `{config.fingerprint}`.",
        f"{environment.get('cpu')}, {environment.get('threads')} threads, {environment.get('kernel')}; "
        f"{environment.get('os')}, Python {environment.get('python')}, "
        f"{', '.join(f'{name} {version}' for name, version in named)}.",
    )
    return "\n".join(lines)


def _shell(command: str) -> str:
    """A code block with the command; absolute paths are cut to their names, which mean something elsewhere too."""
    try:
        words = [Path(word).name if Path(word).is_absolute() else word for word in shlex.split(command)]
    except ValueError:
        return f"```sh\n{command}\n```\n"
    return f"```sh\n{shlex.join(words)}\n```\n"


def _text(file: Path) -> str:
    """What a file of notes says, without blanks around it."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CrushError(f"{file} must be readable UTF-8 text, got {error}") from None
