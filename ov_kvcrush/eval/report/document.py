"""docs/results.md from run folders: of each run its command line, machine, tables and pictures."""

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
from ov_kvcrush.eval.report.tables import by_task, in_percent, summary, tasks_of
from ov_kvcrush.eval.runs.run_folder import Run, read_run
from ov_kvcrush.eval.statistics import RESAMPLES
from ov_kvcrush.utils.json_file import write_file

NOTES = "notes.md"
_MAX_TASK_COLUMNS = 20
_INTRODUCTION = f"""\
# Results

Every table has the command that made it. **Score** is the mean over items (of the average: the mean of the tasks'
means), **full score** that of the full cache of the same engine, the most precise one in the table, **difference** the
first less the second, with the 95 % interval of a paired bootstrap over items ({RESAMPLES} resamples). **Kept tokens**
and **bytes per prompt token** are what the cache held when the prompt had been read, of all layers. `full` keeps
everything; `random` and `streaming_llm` are floors; lines that begin with `genai` are of openvino_genai.
"""


def write_results(folders: Sequence[Path], target: Path, remake: str = "") -> list[Path]:
    """Write `target`, and the pictures into a folder beside it named after its stem; return all paths written.

    folders: of finished runs, a section each in this order; the text of a notes.md in one follows its heading.
    remake: the command that writes this file again. The same folders give the same files.
    Raises CrushError for a folder that holds no finished run, two of the same name, and files that cannot be written.
    """
    check_figures()
    if not folders or len({folder.absolute().name for folder in folders}) < len(folders):
        names = ", ".join(str(folder) for folder in folders) or "none"
        raise CrushError(f"folders must be at least one, with different names, got {names}")
    runs = [read_run(folder) for folder in folders]
    pictures = target.parent / target.stem
    try:
        pictures.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CrushError(f"--out must be a file that can be written, got {str(target)!r}: {error}") from None
    parts, written = [_INTRODUCTION], []
    if remake:
        parts.append(f"This file and its pictures are written by\n\n{_shell(remake)}")
    for run in runs:
        stem = pictures / run.folder.absolute().name
        drawn = write_figures(stem, run.rows, run.predictions, run.config.settings)
        written += drawn
        parts.append(section(run, [path.relative_to(target.parent) for path in drawn]))
    write_file(target, "out", "\n".join(parts).encode())
    return [target, *written]


def section(run: Run, pictures: Sequence[Path]) -> str:
    """Markdown of a run. pictures: relative to the file that the text goes into."""
    config = run.config
    tasks = tasks_of(run.rows)
    unit = "Scores are in percent." if in_percent(config.suite) else "Scores are nats per token: less is better."
    if config.suite == LONGGEN:
        unit += "\nKept tokens and bytes are those at the end of the answers; prompt tokens are all, with the answers'."
    parts = [f"## {config.suite}: {Path(config.model).name}\n"]
    notes = _notes(run.folder)
    if notes:
        parts.append(f"{notes}\n")
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


def _notes(folder: Path) -> str:
    """The text of the run's notes.md, or ""."""
    file = folder / NOTES
    try:
        return file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise CrushError(f"{file} must be readable UTF-8 text, got {error}") from None
