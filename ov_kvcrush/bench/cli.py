"""Command line of the benchmark: `ov_kvcrush-bench [MODEL]`."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ov_kvcrush.bench.attention.measure import AttentionRow, AttentionSettings, layers_of, measure_attention
from ov_kvcrush.bench.compare import CellResult, measure, num_stages
from ov_kvcrush.bench.help import HELP
from ov_kvcrush.bench.peers import LLAMA_CPP, peer_versions
from ov_kvcrush.bench.plot import check_plot, read_reports, write_plot
from ov_kvcrush.bench.process import WorkerError
from ov_kvcrush.bench.report import (
    BenchRow,
    make_attention_report,
    make_ratios,
    make_report,
    make_rows,
)
from ov_kvcrush.bench.settings import BenchSettings
from ov_kvcrush.bench.table import attention_table, ratios_tables, rows_table, traffic_table
from ov_kvcrush.bench.traffic import TrafficRow, measure_traffic, traffic_report
from ov_kvcrush.bench.traffic import num_stages as traffic_stages
from ov_kvcrush.cli.console import out, progress
from ov_kvcrush.cli.environment import describe_environment
from ov_kvcrush.cli.parse import check_at_least, parse_numbers, parse_properties
from ov_kvcrush.cli.policy_options import (
    NAME_OR_LIST,
    BudgetOption,
    KeptOption,
    KeptTokensOption,
    LookupOption,
    OtherOptions,
    PolicyOptions,
    RecallOption,
    WeightsOption,
    explain_if_asked,
)
from ov_kvcrush.config import PRECISIONS
from ov_kvcrush.errors import CrushError
from ov_kvcrush.model.default import default_model_path
from ov_kvcrush.utils.json_file import check_writable, write_json

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


# What each mode takes beside the options that all take.
_PLOT_ONLY = {"plot", "from_paths"}
_ATTENTION_ONLY = {"threads", "layers"}
_WHOLE_ONLY = {"new_tokens", "against", "gguf", "max_num_batched_tokens", "max_kv_mb", "policy", "budget"}
_WHOLE_ONLY |= {"recall_tokens", "weights", "scaling", "traffic", "prompt_lookup", "warm_up"}
_TRAFFIC_ONLY = {"max_step_ms"}
_NOT_TRAFFIC = {"new_tokens", "policy", "plot", "scaling", "warm_up"}
_POLICY_ONLY = {"kept", "kept_tokens", "min_tokens", "policy_options"}
_OPTION_NAMES = {
    "contexts": "context",
    "from_paths": "from",
    "json_path": "json",
    "properties": "property",
    "policy_options": "policy-option",
}


@app.command(help=HELP)
def bench(
    context: typer.Context,
    model: Annotated[
        Path | None,
        typer.Argument(help="Folder of an exported model, or a GGUF file; left out: SmolLM2-135M-Instruct."),
    ] = None,
    contexts: Annotated[
        str,
        typer.Option("--context", metavar="N[,N...]", help="Prompt tokens per request; several make several rows."),
    ] = "1024",
    new_tokens: Annotated[int, typer.Option(metavar="M", help="Tokens generated per request, at least 2.")] = 64,
    batch: Annotated[str, typer.Option(metavar="B[,B...]", help="Requests that are added at once.")] = "1",
    against: Annotated[
        str | None,
        typer.Option(
            metavar="ENGINE",
            help="Compare with openvino_genai, driven directly: genai keeps all tokens, genai-policy as many as "
            "--policy, with an eviction of its own. Or with llama.cpp, on the GGUF file that MODEL is or was.",
        ),
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --against llama.cpp: the file that the folder MODEL was made of."),
    ] = None,
    scaling: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]",
            help="Instead of --context: the cost of a token over as many prompt tokens, of our engine, the same with "
            "--recall-tokens if given, and --against, by default genai.",
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar=NAME_OR_LIST,
            callback=explain_if_asked,
            is_eager=True,
            help="What stays in our KV cache, a quarter unless more is said; everything if left out.",
        ),
    ] = None,
    kept: KeptOption = None,
    kept_tokens: KeptTokensOption = None,
    min_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="A prompt of as many tokens is kept whole. Default: 128, or --kept-tokens."),
    ] = None,
    policy_options: OtherOptions = None,
    budget: BudgetOption = None,
    recall_tokens: RecallOption = None,
    weights: WeightsOption = None,
    prompt_lookup: LookupOption = False,
    runs: Annotated[
        int | None,
        typer.Option(metavar="R", help="Measured runs per engine, after a warm-up: 3, with --attention 15."),
    ] = None,
    warm_up: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens of each prompt that the warm-up reads; all if left out."),
    ] = None,
    max_num_batched_tokens: Annotated[
        int, typer.Option(metavar="N", help="Rows of one inference: how prompts are cut into chunks.")
    ] = 512,
    key_precision: Annotated[
        str | None, typer.Option(metavar="TYPE", help=f"Cached keys: {', '.join(PRECISIONS)}; u8 if left out.")
    ] = None,
    value_precision: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Cached values; they need fewer bits than keys.")
    ] = None,
    kv_precision: Annotated[str | None, typer.Option(metavar="TYPE", help="Both keys and values.")] = None,
    max_kv_mb: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Most MiB in our store: requests wait until they fit. openvino_genai gets what the requests need.",
        ),
    ] = None,
    inference_precision: Annotated[
        str | None, typer.Option(metavar="TYPE", help="INFERENCE_PRECISION_HINT: f32, bf16, f16.")
    ] = None,
    properties: Annotated[
        list[str] | None,
        typer.Option("--property", metavar="KEY=VALUE", help="Any OpenVINO property, for all engines; repeatable."),
    ] = None,
    attention: Annotated[
        bool, typer.Option("--attention", help="Measure attention alone, ours and OpenVINO's; no weights.")
    ] = False,
    traffic: Annotated[
        bool, typer.Option("--traffic", help="Measure what answers and a short prompt wait while a prompt is read.")
    ] = False,
    max_step_ms: Annotated[
        float, typer.Option(metavar="MS", help="With --traffic: SchedulerConfig.max_step_ms of our engine.")
    ] = 200,
    threads: Annotated[
        str | None,
        typer.Option(metavar="T[,T...]", help="With --attention: threads of the inference; all if omitted."),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(metavar="L", help="With --attention: only the model's first L layers.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write all runs, settings and the machine.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw what was measured: a .png, .svg or .pdf file.")
    ] = None,
    from_paths: Annotated[
        list[Path] | None,
        typer.Option("--from", metavar="FILE", help="With --plot: draw these files of --json, measure nothing."),
    ] = None,
) -> None:
    """Measure speed and memory, or draw what was measured; HELP has the text for the user."""
    console = Console(stderr=True)
    try:
        given = {n for n in context.params if getattr(context.get_parameter_source(n), "name", "") == "COMMANDLINE"}
        _check_modes(given)
        for path, check in ((json_path, check_writable), (plot, check_plot)):
            if path is not None:
                check(path)
        if from_paths:
            assert plot is not None, "--from without --plot is refused above"
            write_plot(plot, read_reports(from_paths))
            console.print(Text(f"written to {plot}"))
            return
        key_precision, value_precision = _precisions(key_precision, value_precision, kv_precision)
        options: dict[str, Any] = {
            "contexts": parse_numbers("scaling" if scaling else "context", scaling or contexts),
            "batches": parse_numbers("batch", batch),
            "key_precision": key_precision,
            "value_precision": value_precision,
            "properties": parse_properties(properties or (), INFERENCE_PRECISION_HINT=inference_precision),
            "runs": runs,
        }
        if attention:
            options["threads"] = None if threads is None else parse_numbers("threads", threads)
        if plot is not None and all(len(options.get(x) or "1") == 1 for x in ("contexts", "batches", "threads")):
            raise CrushError("--plot must have two values of --context, --batch or --threads to draw, got one of each")
        if traffic and against == LLAMA_CPP:
            raise CrushError(f"--against {LLAMA_CPP} must be left out with --traffic, got it")
        if scaling:
            against = against or "genai"
        if attention:
            report = _attention_report(model, layers, _given(options), console)
        else:
            options |= {"new_tokens": new_tokens, "against": against, "max_kv_mb": max_kv_mb}
            options |= {"budget": budget, "recall_tokens": recall_tokens, "weights": weights, "gguf": gguf}
            options |= {"prompt_lookup": prompt_lookup or None, "warm_up": warm_up}
            options["recalls_beside"] = scaling is not None and recall_tokens is not None
            wanted = PolicyOptions(policy, kept, kept_tokens, min_tokens, tuple(policy_options or ()))
            options["policy"] = None if policy is None else wanted.build(policy)
            options["max_num_batched_tokens"] = max_num_batched_tokens
            settings = BenchSettings.for_model(model, **_given(options))
            run = partial(_traffic_report, settings, max_step_ms) if traffic else partial(_whole_report, settings)
            report = run(console)
        _write(report, json_path, plot, console)
    except CrushError as error:
        _say_error(console, error)
        raise typer.Exit(2) from None
    except WorkerError as error:
        _say_error(console, error)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("interrupted; the workers are ended")
        raise typer.Exit(130) from None


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _check_modes(given: set[str]) -> None:
    """Raise CrushError for an option that the mode chosen by the others does nothing with."""
    mode, unused = "without --attention", given & _ATTENTION_ONLY
    if "from_paths" in given:
        if "plot" not in given:
            raise CrushError("--from must come with --plot, got it alone")
        mode, unused = "with --from", given - _PLOT_ONLY
    elif "attention" in given:
        mode, unused = "with --attention", given & (_WHOLE_ONLY | _POLICY_ONLY)
    elif not unused and "scaling" in given and "contexts" in given:
        mode, unused = "with --scaling", {"contexts"}
    elif not unused and "traffic" in given:
        mode, unused = "with --traffic", given & (_NOT_TRAFFIC | _POLICY_ONLY)
    elif not unused and given & _TRAFFIC_ONLY:
        mode, unused = "without --traffic", given & _TRAFFIC_ONLY
    elif not unused and "policy" not in given:
        mode, unused = "without --policy", given & _POLICY_ONLY
    for name in sorted(unused):
        option = "--" + _OPTION_NAMES.get(name, name).replace("_", "-") if name != "model" else "MODEL"
        raise CrushError(f"{option} must be left out {mode}, got it")


def _precisions(key: str | None, value: str | None, both: str | None) -> tuple[str | None, str | None]:
    if both is not None and (key is not None or value is not None):
        raise CrushError(f"--kv-precision must be left out with --key-precision or --value-precision, got {both!r}")
    return key or both, value or both


def _traffic_report(settings: BenchSettings, max_step_ms: float, console: Console) -> dict[str, Any]:
    """Measure what others wait and print the table. Returns the content of the JSON file."""
    rows: list[TrafficRow] = []
    try:
        with progress(traffic_stages(settings), console) as report:
            rows.extend(measure_traffic(settings, max_step_ms, report))
    finally:
        if rows:
            out().print(traffic_table(rows))
    return traffic_report(rows, describe_environment(), _command())


def _whole_report(settings: BenchSettings, console: Console) -> dict[str, Any]:
    """Measure the engines and print the tables. Returns the content of the JSON file."""
    rows = _measure(settings, console)
    environment = describe_environment()
    environment["versions"] |= peer_versions(settings.engines)
    return make_report(rows, settings, environment, _command())


def _attention_report(
    model: Path | None, num_layers: int | None, options: dict[str, Any], console: Console
) -> dict[str, Any]:
    """Measure attention alone and print the table. Returns the content of the JSON file."""
    settings = AttentionSettings(**options)
    check_at_least("layers", 1 if num_layers is None else num_layers, 1)
    if model is None:
        model = default_model_path()
    layers = layers_of(model, num_layers)
    rows: list[AttentionRow] = []
    try:
        with progress(settings.num_stages, console) as report:
            rows.extend(measure_attention(layers, settings, report))
    finally:
        if rows:
            out().print(attention_table(rows))
    return make_attention_report(rows, model, settings, describe_environment(), _command())


def _command() -> str:
    return shlex.join(["ov_kvcrush-bench", *sys.argv[1:]])


def _write(report: dict[str, Any], json_path: Path | None, plot: Path | None, console: Console) -> None:
    if json_path is not None:
        write_json(json_path, report)
        console.print(Text(f"written to {json_path}"))
    if plot is not None:
        write_plot(plot, [report])
        console.print(Text(f"written to {plot}"))


def _measure(settings: BenchSettings, console: Console) -> list[BenchRow]:
    """Measure all cells and print them, also those that were complete when something went wrong."""
    results: list[CellResult] = []
    try:
        with progress(num_stages(settings), console) as report:
            for result in measure(settings, report):
                results.append(result)
    finally:
        rows = make_rows(results, settings)
        _print_tables(rows)
    return rows


def _print_tables(rows: list[BenchRow]) -> None:
    if not rows:
        return
    console = out()
    console.print(rows_table(rows))
    for table in ratios_tables(make_ratios(rows)):
        console.print(table)


def _say_error(console: Console, error: Exception) -> None:
    console.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
