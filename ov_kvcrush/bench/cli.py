"""Command line of the benchmark: `ov_kvcrush-bench [MODEL]`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from ov_kvcrush.bench.compare import CellResult, Report, measure, num_stages
from ov_kvcrush.bench.environment import describe_environment
from ov_kvcrush.bench.process import WorkerError
from ov_kvcrush.bench.report import Row, check_writable, make_ratios, make_report, make_rows, write_json
from ov_kvcrush.bench.settings import BenchSettings, parse_numbers, parse_properties
from ov_kvcrush.bench.table import ratios_table, rows_table
from ov_kvcrush.errors import CrushError

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


# Paragraphs by blank lines only: the help keeps every line break.
HELP = """\
Measure speed and memory of the engine on this machine, alone or beside openvino_genai.

MODEL is the folder of an exported model; left out, it is SmolLM2-135M-Instruct.

Requests of random token ids are added at once and run to their end. \
All engines get the same prompts, chunk size, cache capacity and OpenVINO properties, ignore the end of sequence, \
and reuse nothing from earlier runs. For each context and batch, each engine runs in a process of its own; \
after a warm-up they take turns, run by run.

[bold]Columns[/bold] (medians over the runs)

[bold]TTFT[/bold]: from adding the requests to the first token of a request; mean over the requests.

[bold]TPOT[/bold]: (time of the last token - time of the first) / (tokens - 1) of a request; mean over the requests.

[bold]tokens/s[/bold]: tokens generated after every request had its first, per second from then to the end: decoding \
alone. The file also has total_tokens_per_s, prompts included.

[bold]KV[/bold]: peak of the cache, as the engine tells it: of openvino_genai what it allocated, of ours what was \
used of that.

[bold]peak[/bold]: largest resident memory of the engine's process, loading the model included.

[bold]overhead[/bold]: time per step outside of the inference itself while all requests decode; of our engine only.

[bold]Examples[/bold]

  ov_kvcrush-bench    [dim]# the default model, 1024 tokens[/dim]

  ov_kvcrush-bench my-model --context 1024,4096 --batch 1,8 --against genai

  ov_kvcrush-bench my-model --context 16384 --kv-precision u8 --json out.json

  ov_kvcrush-bench my-model --runs 5 --property INFERENCE_NUM_THREADS=2

Close other programs first, and believe no single run: the ratios show medians, best runs and pairs side by side.
"""


@app.command(help=HELP)
def bench(
    model: Annotated[
        Path | None, typer.Argument(help="Folder of an exported model; left out: SmolLM2-135M-Instruct.")
    ] = None,
    context: Annotated[
        str, typer.Option(metavar="N[,N...]", help="Prompt tokens per request; several make several rows.")
    ] = "1024",
    new_tokens: Annotated[int, typer.Option(metavar="M", help="Tokens generated per request, at least 2.")] = 64,
    batch: Annotated[str, typer.Option(metavar="B[,B...]", help="Requests that are added at once.")] = "1",
    against: Annotated[
        str | None, typer.Option(metavar="ENGINE", help="Compare with: genai (openvino_genai, driven directly).")
    ] = None,
    runs: Annotated[int, typer.Option(metavar="R", help="Measured runs per engine, after a warm-up.")] = 3,
    max_num_batched_tokens: Annotated[
        int, typer.Option(metavar="N", help="Rows of one inference: how prompts are cut into chunks.")
    ] = 512,
    kv_precision: Annotated[
        str | None, typer.Option(metavar="TYPE", help="KV_CACHE_PRECISION: u8, u4, bf16, f16, f32, ...")
    ] = None,
    inference_precision: Annotated[
        str | None, typer.Option(metavar="TYPE", help="INFERENCE_PRECISION_HINT: f32, bf16, f16.")
    ] = None,
    properties: Annotated[
        list[str] | None,
        typer.Option("--property", metavar="KEY=VALUE", help="Any OpenVINO property, for all engines; repeatable."),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write all runs, settings and the machine.")
    ] = None,
) -> None:
    """Measure speed and memory; HELP has the text for the user."""
    console = Console(stderr=True)
    try:
        if json_path is not None:
            check_writable(json_path)
        named = {"KV_CACHE_PRECISION": kv_precision, "INFERENCE_PRECISION_HINT": inference_precision}
        options = {
            "contexts": parse_numbers("context", context),
            "batches": parse_numbers("batch", batch),
            "new_tokens": new_tokens,
            "runs": runs,
            "against": against,
            "max_num_batched_tokens": max_num_batched_tokens,
            "properties": parse_properties(properties or (), **named),
        }
        settings = BenchSettings.for_model(model, **options)
        rows = _measure(settings, console)
        if json_path is not None:
            command = shlex.join(["ov_kvcrush-bench", *sys.argv[1:]])
            write_json(json_path, make_report(rows, settings, describe_environment(), command))
            console.print(Text(f"written to {json_path}"))
    except CrushError as error:
        _say_error(console, error)
        raise typer.Exit(2) from None
    except WorkerError as error:
        _say_error(console, error)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("interrupted; the workers are ended")
        raise typer.Exit(130) from None


def _measure(settings: BenchSettings, console: Console) -> list[Row]:
    """Measure all cells and print them, also those that were complete when something went wrong."""
    results: list[CellResult] = []
    try:
        with _progress(settings, console) as report:
            for result in measure(settings, report):
                results.append(result)
    finally:
        rows = make_rows(results, settings)
        _print_tables(rows)
    return rows


def _print_tables(rows: list[Row]) -> None:
    if not rows:
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a pipe has no width, and 80 columns would cut the numbers
    console.print(rows_table(rows))
    ratios = make_ratios(rows)
    if ratios:
        console.print(ratios_table(ratios))


@contextmanager
def _progress(settings: BenchSettings, console: Console) -> Iterator[Report]:
    """Yield a function that shows what begins now: on a terminal as a bar, else line by line."""
    if not console.is_terminal:
        yield lambda stage: console.print(Text(stage))
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    # Drawn once a second: a livelier bar would take time from what is measured.
    with Progress(*columns, console=console, refresh_per_second=1, transient=True) as bars:
        task = bars.add_task("", total=num_stages(settings))
        first = True

        def report(stage: str) -> None:
            nonlocal first
            bars.update(task, description=stage, advance=0 if first else 1)
            first = False

        yield report


def _say_error(console: Console, error: Exception) -> None:
    console.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
