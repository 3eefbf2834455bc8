"""`ov_kvcrush-eval SUITE [MODEL]`, `ov_kvcrush-eval halves FOLDER` and `ov_kvcrush-eval results FOLDER...`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from ov_kvcrush.cli.console import out
from ov_kvcrush.cli.environment import describe_environment
from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.benchmarks.fidelity import REFERENCE
from ov_kvcrush.eval.benchmarks.fidelity import SUITE as FIDELITY
from ov_kvcrush.eval.benchmarks.longgen import SUITE as LONGGEN
from ov_kvcrush.eval.benchmarks.longqa import SUITE as LONGQA
from ov_kvcrush.eval.benchmarks.suites import SUITES, Suite, load_suite
from ov_kvcrush.eval.cli.help import HELP, HOLDOUT, RESULTS
from ov_kvcrush.eval.cli.options import SuiteArguments, command_of
from ov_kvcrush.eval.report.by_turn import by_turn
from ov_kvcrush.eval.report.document import write_results
from ov_kvcrush.eval.report.fidelity import fidelity_grid, fidelity_rows
from ov_kvcrush.eval.report.holdout import chosen_grid, holdout_of, judged_grid, write_page
from ov_kvcrush.eval.report.likelihood import losses
from ov_kvcrush.eval.report.tables import by_task, summary, tasks_of
from ov_kvcrush.eval.runs.long_answers import check_long
from ov_kvcrush.eval.runs.plan import Planned, left_out, make_plan
from ov_kvcrush.eval.runs.prompts import ItemEncoder, ItemPrompts, encode_items
from ov_kvcrush.eval.runs.run_config import RunConfig
from ov_kvcrush.eval.runs.run_folder import Run, RunFolder, default_folder, read_run, report_of
from ov_kvcrush.eval.runs.runner import run_suite
from ov_kvcrush.model.default import default_model_path
from ov_kvcrush.model.fingerprints import model_fingerprint
from ov_kvcrush.model.folder import check_model_folder
from ov_kvcrush.model.info import read_model_info
from ov_kvcrush.pipelines.loading import load_tokenizer
from ov_kvcrush.utils.json_file import check_writable, write_json

_TASK_COLUMNS = 6  # of one table, so that names of settings stay readable


def add_suites(app: typer.Typer) -> None:
    """Add a command for every suite, `halves` and `results`."""
    for suite in SUITES:
        app.command(name=suite, help=HELP[suite])(command_of(suite, _run_command))
    app.command(name="halves", help=HOLDOUT)(_holdout_command)
    app.command(name="results", help=RESULTS)(_results_command)


def _run_command(suite: str, given: dict[str, Any]) -> None:
    console = Console(stderr=True)
    with _errors(console):
        run = evaluate(suite, SuiteArguments.of(given, REFERENCE if suite == FIDELITY else None), console)
        show(run)
        if given["json_path"] is not None:
            more = {"rows": fidelity_rows(run)} if suite == FIDELITY else {}
            write_json(given["json_path"], {**report_of(run), **more})
            console.print(Text(f"written to {given['json_path']}"))


def _holdout_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    engine: Annotated[str | None, typer.Option(metavar="crush|genai", help="Only this engine's settings.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write both halves' rows.")
    ] = None,
    page: Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Also write the tables.")] = None,
) -> None:
    console = Console(stderr=True)
    with _errors(console):
        for option, path in (("json", json_path), ("markdown", page)):
            if path is not None:
                check_writable(path, option)
        run = read_run(folder)
        holdout = holdout_of(run, engine)
        out().print(judged_grid(holdout).rich("differences to the full cache on both halves of the items"))
        if holdout.chosen:
            out().print(chosen_grid(holdout).rich("chosen on the first half, shown on the second"))
        if json_path is not None:
            write_json(json_path, {"command": _command(), "suite": run.config.suite, **holdout.json})
            console.print(Text(f"written to {json_path}"))
        if page is not None:
            write_page(holdout, page)
            console.print(Text(f"written to {page}"))


def _results_command(
    folders: Annotated[list[Path], typer.Argument(help="Folders of finished runs, in the order of the page.")],
    target: Annotated[
        Path,
        typer.Option(
            "--out", metavar="FILE", help="The front page; the runs' pages and pictures lie in a folder of its name."
        ),
    ],
    notes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Markdown that the front page begins with.")
    ] = None,
) -> None:
    console = Console(stderr=True)
    with _errors(console):
        for path in write_results(folders, target, _command(), notes):
            console.print(Text(f"written to {path}"))


def evaluate(name: str, asked: SuiteArguments, console: Console) -> Run:
    """Run a suite, or resume it, in its folder. Raises CrushError for invalid options before a model is loaded."""
    plan = make_plan(asked.plan)
    for line in left_out(asked.plan, plan):
        console.print(Text(line), soft_wrap=True)
    if asked.json_path is not None:
        check_writable(asked.json_path)
    model = asked.model if asked.model is not None else default_model_path()
    check_model_folder(model, tokenizer=True)
    suite, prompts = _items(name, asked, model)
    if name == LONGGEN:
        check_long(plan, [item.task for item in suite.items])
    config = _config(suite, asked, model, plan)
    path = asked.out or _beside_json(name, asked.json_path) or default_folder(name, model, datetime.now())
    total = len(plan) * sum(len(p.asked) for p in prompts)
    with RunFolder(path, config) as folder:
        console.print(Text(f"{len(prompts)} items, {len(plan)} settings, {total} answers; run folder {path}"))
        with _progress(console, name, total) as advance:
            return run_suite(
                folder, prompts, suite.tasks, plan, model, asked.properties, advance, compares=asked.compares
            )


def _beside_json(name: str, json_path: Path | None) -> Path | None:
    """The folder of a run that is known by its JSON file, so that the same command goes on with it."""
    return Path(f"{json_path}.run") if json_path is not None and name in (LONGQA, FIDELITY) else None


def show(run: Run) -> None:
    """Print the tables of a run."""
    console = out()
    if run.config.suite == FIDELITY:
        console.print(fidelity_grid(run).rich(f"how far from the full cache: {Path(run.config.model).name}"))
        return
    console.print(summary(run.rows).rich(f"{run.config.suite}: {Path(run.config.model).name}"))
    tasks = tasks_of(run.rows)
    for begin in range(0, len(tasks) if len(tasks) > 1 else 0, _TASK_COLUMNS):
        console.print(by_task(run.rows, tasks[begin : begin + _TASK_COLUMNS]).rich("scores by task"))
    nats = losses(run)
    if nats:
        console.print(summary(nats).rich("next-token loss of continue, nats"))
    turns = by_turn(run)
    if turns:
        console.print(by_task(turns.rows).rich(f"scores by {turns.name}"))


def _items(name: str, asked: SuiteArguments, model: Path) -> tuple[Suite, list[ItemPrompts]]:
    info = read_model_info(model)
    context_length = info.context_length if info else None
    encoder = ItemEncoder(load_tokenizer(model, {}))
    suite = load_suite(name, asked.suite, encoder.count, context_length)
    return suite, encode_items(suite.items, encoder, context_length, suite.max_tokens)


def _config(suite: Suite, asked: SuiteArguments, model: Path, plan: list[Planned]) -> RunConfig:
    return RunConfig(
        command=_command(),
        suite=suite.name,
        model=str(model),
        fingerprint=model_fingerprint(model),
        settings=tuple(planned.setting for planned in plan),
        num_items=len(suite.items),
        seed=asked.suite.seed,
        environment=describe_environment(),
        options={
            **asked.suite.json,
            **({"properties": asked.properties} if asked.properties else {}),
            **({} if asked.compares else {"kl": False}),
        },
    )


@contextmanager
def _progress(console: Console, name: str, total: int) -> Iterator[Any]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, refresh_per_second=1, speed_estimate_period=600) as bars:
        task = bars.add_task(name, total=total)
        started = False

        def advance(number: int) -> None:
            nonlocal started
            if started:
                bars.advance(task, number)
            else:  # answers of an earlier run must not count in the estimate of the time left
                bars.reset(task, completed=number)
                started = True

        yield advance


@contextmanager
def _errors(console: Console) -> Iterator[None]:
    """Print an error in one line and exit with 2; exit with 130 if the user interrupts."""
    try:
        yield
    except CrushError as error:
        console.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print("interrupted; the same command with --out and the folder of this run goes on")
        raise typer.Exit(130) from None


def _command() -> str:
    return shlex.join(["ov_kvcrush-eval", *sys.argv[1:]])
