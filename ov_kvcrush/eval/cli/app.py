"""Command line of the evaluation: `ov_kvcrush-eval SUITE [MODEL]`, `perplexity` and `results`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ov_kvcrush.cli.environment import describe_environment
from ov_kvcrush.cli.parse import parse_properties
from ov_kvcrush.errors import CrushError, RequestError
from ov_kvcrush.eval.cli.frontier import add_frontier
from ov_kvcrush.eval.cli.suites import add_suites
from ov_kvcrush.eval.likelihood.perplexity import DEFAULT_PRECISIONS, PerplexityRow, parse_precisions, perplexity
from ov_kvcrush.utils.json_file import check_writable, write_json

app = typer.Typer(add_completion=False, rich_markup_mode="rich", no_args_is_help=True)


@app.callback()
def main_options() -> None:
    """Measure what a compressed KV cache costs in accuracy."""


add_suites(app)
add_frontier(app)


HELP = f"""\
Next-token loss, and KL divergence to the f32 cache, of a text decoded on caches of several precisions.

MODEL is the folder of an exported model; left out, it is SmolLM2-135M-Instruct.

The first --context tokens of the text are read as a prompt, the next --positions are decoded one by one, whatever the \
model would have said (teacher forcing). Every cache sees the same tokens.

[bold]Columns[/bold]

[bold]KL[/bold]: mean over the positions of KL(f32 cache || this cache) of the next-token distribution, in nats.

[bold]loss[/bold]: mean negative log-likelihood of the text's next token, in nats; [bold]top-1[/bold]: positions whose \
most likely token is that of the f32 cache.

[bold]bytes/token[/bold]: of all layers, as held at the end, recent window included; [bold]settled[/bold]: of a token \
that left the recent window.

[bold]Examples[/bold]

  ov_kvcrush-eval perplexity my-model --text book.txt

  ov_kvcrush-eval perplexity my-model --text book.txt --context 8192 --precisions u8/u8,u4/u2 --json out.json

Precisions are keys/values; the default is {",".join(DEFAULT_PRECISIONS)}.
"""


@app.command(name="perplexity", help=HELP)
def perplexity_command(
    model: Annotated[
        Path | None, typer.Argument(help="Folder of an exported model; left out: SmolLM2-135M-Instruct.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="UTF-8 text, longer than context and positions.")
    ] = None,
    context: Annotated[int, typer.Option(metavar="N", help="Tokens read as a prompt.")] = 2048,
    positions: Annotated[int, typer.Option(metavar="N", help="Tokens decoded and measured.")] = 512,
    precisions: Annotated[str, typer.Option(metavar="K/V[,K/V...]", help="Precisions of keys and values.")] = ",".join(
        DEFAULT_PRECISIONS
    ),
    properties: Annotated[
        list[str] | None, typer.Option("--property", metavar="KEY=VALUE", help="Any OpenVINO property; repeatable.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write rows, settings and the machine.")
    ] = None,
) -> None:
    """Measure precisions; HELP has the text for the user."""
    console = Console(stderr=True)
    try:
        if text is None:
            raise RequestError("--text must be given: a UTF-8 file to measure on")
        if json_path is not None:
            check_writable(json_path)
        pairs = parse_precisions(precisions)
        options = parse_properties(properties or ())
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("tokens", total=(context + positions) * (len(pairs) + 1))
            rows = perplexity(
                model, text, context, positions, pairs, dict(options), lambda n: progress.advance(task, n)
            )
        Console().print(_table(rows))
        if json_path is not None:
            settings = {"text": str(text), "context": context, "positions": positions, "model": str(model)}
            write_json(json_path, _report(rows, settings))
            console.print(Text(f"written to {json_path}"))
    except CrushError as error:
        console.print(Text(f"error: {error}", style="red"))
        raise typer.Exit(2) from None


def _report(rows: list[PerplexityRow], settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "command": shlex.join(["ov_kvcrush-eval", *sys.argv[1:]]),
        "suite": "perplexity",
        "settings": settings,
        "environment": describe_environment(),
        "rows": [row.__dict__ for row in rows],
    }


def _table(rows: list[PerplexityRow]) -> Table:
    table = Table(title="next-token distribution against the f32 cache")
    for name in ("keys/values", "KL", "loss", "top-1 %", "bytes/token", "settled"):
        table.add_column(name, justify="left" if name == "keys/values" else "right")
    for r in rows:
        table.add_row(
            f"{r.key_precision}/{r.value_precision}", f"{r.kl:.2e}", f"{r.loss:.4f}", f"{100 * r.top1:.1f}",
            f"{r.bytes_per_token:.0f}", f"{r.settled_bytes_per_token:.0f}",
        )  # fmt: skip
    return table


def main() -> None:
    """Entry point of `ov_kvcrush-eval`."""
    app()


if __name__ == "__main__":
    main()
