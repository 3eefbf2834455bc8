"""Command line of the export: `ov_kvcrush-export SOURCE OUT`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from model_export.export import Progress as Report
from model_export.export import export_model
from ov_kvcrush.errors import CrushError

app = typer.Typer(add_completion=False, rich_markup_mode="rich")

FORMATS_HELP = (
    "How weights are stored: fp32 (exact, large), fp16, int8 (usual choice), int4 (smallest). "
    "Left out: int8; for a GGUF its own quantisation as it is."
)
SCORES_HELP = (
    "Also write openvino_model_scores.xml, a model over the same weights with an output for each layer: how much the "
    "last W tokens of a step attend to each cached token, mean over them, per head. See docs/attention_scores.md."
)


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="Hugging Face folder, hub id (owner/name), or a .gguf file.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    weight_format: Annotated[str | None, typer.Option(help=FORMATS_HELP)] = None,
    group_size: Annotated[
        int | None, typer.Option(help="int4: weights that share one scale; smaller is more exact and larger on disk.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="int4: fraction of the weights that become int4, in (0, 1]; the rest is int8.")
    ] = None,
    sym: Annotated[
        bool | None, typer.Option("--sym/--asym", help="int8, int4: without or with zero points (default: with).")
    ] = None,
    attention_scores: Annotated[int | None, typer.Option(metavar="W", help=SCORES_HELP)] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model. Read it first.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Exchange a model folder that is at OUT.")] = False,
) -> None:
    """Turn a language model into an OpenVINO folder for ov_kvcrush (and for openvino_genai).

    SOURCE is a Hugging Face folder, a hub id (owner/name), or a .gguf file. OUT must not exist or be empty; it appears
    only when it is complete: an interrupted export leaves nothing that looks finished. A model that the engine cannot
    run is refused at once, with the reason.

    [bold]Examples[/bold]

      ov_kvcrush-export Qwen/Qwen2.5-Coder-0.5B-Instruct qwen --weight-format int8

      ov_kvcrush-export ./my-finetuned-model my-model-int4 --weight-format int4 --group-size 64

      ov_kvcrush-export model.Q8_0.gguf my-model    [dim]# keeps the weights of the GGUF, needs no torch[/dim]

      ov_kvcrush-export ./my-model my-model-int8 --attention-scores 32

    Then: ov_kvcrush-chat OUT
    """
    console = Console(stderr=True)
    try:
        with _stages(console) as report:
            info = export_model(
                source,
                out,
                weight_format,
                group_size=group_size,
                ratio=ratio,
                sym=sym,
                attention_scores=attention_scores,
                trust_remote_code=trust_remote_code,
                overwrite=overwrite,
                progress=report,
            )
    except CrushError as error:
        console.print(f"[bold red]error:[/bold red] {_escaped(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print("interrupted; nothing was left behind")
        raise typer.Exit(130) from None
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    heads = f"{info.num_layers} layers, {info.num_heads} heads, {info.num_kv_heads} KV heads"
    console.print(f"{info.architecture}, {heads}, {info.weight_format}, {size:.0f} MB", highlight=False)
    print(out)


@contextmanager
def _stages(console: Console) -> Iterator[Report]:
    """Yield a function that shows the named stage with its time: as a moving line on a terminal, else line by line."""
    if not console.is_terminal:
        yield lambda name: console.print(name, highlight=False, markup=False)
        return
    columns = (SpinnerColumn(finished_text="[green]✓[/green]"), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:

        def begin(name: str) -> None:
            _finish(bars)
            bars.add_task(name, total=1)

        yield begin
        _finish(bars)


def _finish(bars: Progress) -> None:
    for task in bars.tasks:
        bars.update(task.id, completed=1)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
