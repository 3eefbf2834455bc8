"""Command line `ov_kvcrush-serve [MODEL]`: its arguments, and a server that runs until it is told to end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ov_kvcrush.cli.policy_options import BudgetOption
from ov_kvcrush.errors import CrushError
from ov_kvcrush.server.settings import TOOL_FORMATS, ServerSettings

app = typer.Typer(add_completion=False, rich_markup_mode="rich")

HELP = """\
Serve MODEL over HTTP as OpenAI's API has it, with contexts that are compressed once and asked by many.

MODEL is a folder written by ov_kvcrush-export; without it the default model answers.

Logs go to standard error, one JSON object a line, without what was asked or answered. SIGTERM lets running requests \
end and answers new ones with 503; a second one ends at once.

[bold]Examples[/bold]

  ov_kvcrush-serve

  ov_kvcrush-serve my-model --host 0.0.0.0 --api-key "$KEY" --contexts /var/lib/kvcrush --max-kv-mb 8192

  curl localhost:8000/v1/chat/completions -H "Content-Type: application/json" \
-d '{"model": "SmolLM2-135M-Instruct", "messages": [{"role": "user", "content": "Hello!"}]}'
"""


@app.command(help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
def serve(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Folder of an exported model; the default model if omitted.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Where to listen. Others than this machine's need --api-key.")
    ] = ServerSettings.host,
    port: Annotated[int, typer.Option(help="Its port; 0 = any that is free.")] = ServerSettings.port,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            envvar="OV_KVCRUSH_API_KEYS",
            show_envvar=True,
            help="Who sends it may ask; repeatable. Each key has contexts and cached prefixes of its own. "
            "Others can read command lines: the variable, with blanks between keys, is for that.",
        ),
    ] = None,
    alias: Annotated[str | None, typer.Option(metavar="NAME", help="The model's name; that of its folder.")] = None,
    budget: BudgetOption = None,
    max_kv_mb: Annotated[
        int | None,
        typer.Option(metavar="N", help="Most MiB of keys and values. Default: half of the free memory."),
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(metavar="N", help="Requests that may wait; one more is answered with 429.")
    ] = ServerSettings.max_waiting,
    contexts: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep contexts here, also when the server ends. Left out: in memory only."),
    ] = None,
    max_contexts_mb: Annotated[
        int | None,
        typer.Option(metavar="N", help="MiB that contexts may hold at a time. Default: half of the store."),
    ] = None,
    max_contexts: Annotated[int, typer.Option(metavar="N", help="Contexts of one key.")] = ServerSettings.max_contexts,
    share_prefixes: Annotated[
        bool,
        typer.Option(
            "--share-prefixes", help="Keys share cached prefixes, and may find out by timing what others have asked."
        ),
    ] = False,
    max_body_mb: Annotated[
        int, typer.Option(metavar="N", help="MiB of a body, but for .kvc files.")
    ] = ServerSettings.max_body_mb,
    max_upload_mb: Annotated[int, typer.Option(metavar="N", help="MiB of a .kvc file.")] = ServerSettings.max_upload_mb,
    request_timeout: Annotated[
        float, typer.Option(metavar="S", help="Seconds that a request may take, waiting included.")
    ] = ServerSettings.request_timeout_s,
    drain_timeout: Annotated[
        float, typer.Option(metavar="S", help="Seconds that running requests have after SIGTERM.")
    ] = ServerSettings.drain_timeout_s,
    tool_format: Annotated[
        str,
        typer.Option(
            metavar="|".join(TOOL_FORMATS), help="How the model writes calls; auto goes by its chat template."
        ),
    ] = ServerSettings.tool_format,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="A LoRA adapter, answering as the model NAME; repeatable. PATH is PEFT's folder, or the file in it.",
        ),
    ] = None,
) -> None:
    """Serve until told to end; HELP has the text for the user."""
    console = Console(stderr=True)
    try:
        settings = ServerSettings(
            model=model,
            alias=alias,
            host=host,
            port=port,
            api_keys=tuple(api_key or ()),
            budget=budget,
            max_kv_mb=max_kv_mb,
            max_waiting=max_waiting,
            contexts_dir=contexts,
            max_contexts_mb=max_contexts_mb,
            max_contexts=max_contexts,
            share_prefixes=share_prefixes,
            max_body_mb=max_body_mb,
            max_upload_mb=max_upload_mb,
            request_timeout_s=request_timeout,
            drain_timeout_s=drain_timeout,
            tool_format=tool_format,
            adapters=tuple(adapter or ()),
        )
        _run(settings)
    except CrushError as error:
        console.print(Text(f"error: {error}", style="red"))
        raise typer.Exit(2) from None


def _run(settings: ServerSettings) -> None:
    parts = _parts()
    parts["log_to_stderr"]()
    pipeline = parts["load_pipeline"](settings)  # here, so that what is wrong with a model is said as other commands do
    server = parts["make_server"](parts["create_app"](settings, pipeline), settings)
    del pipeline
    server.run()
    if not server.started:
        raise typer.Exit(1)


def _parts() -> dict[str, Any]:
    """What needs the extra. Raises CrushError without it."""
    try:
        from ov_kvcrush.server.app import create_app, load_pipeline
        from ov_kvcrush.server.logs import log_to_stderr
        from ov_kvcrush.server.process import make_server
    except ImportError as error:
        raise CrushError(
            f"the extra 'serve' must be installed, got no {error.name}; pip install 'ov-kvcrush[serve]'"
        ) from None
    return {
        "create_app": create_app,
        "load_pipeline": load_pipeline,
        "log_to_stderr": log_to_stderr,
        "make_server": make_server,
    }


def main() -> None:
    """Entry point of `ov_kvcrush-serve`."""
    app()


if __name__ == "__main__":
    main()
