"""Command line `ov_kvcrush-profile MODEL`: what compressing the KV cache of a model costs, head by head."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ov_kvcrush.cli.environment import describe_environment
from ov_kvcrush.cli.parse import check_at_least, parse_properties
from ov_kvcrush.contexts.context import DEFAULT_CONTEXT_POLICY
from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.calibrate.measure import empty_profile, measure_plans, measure_text, num_caches
from ov_kvcrush.eval.calibrate.meter import CacheMeter
from ov_kvcrush.eval.calibrate.prompt_reader import Prompt, PromptReader
from ov_kvcrush.eval.calibrate.prompts import CalibrationPrompt, calibration_prompts, prompts_from_files
from ov_kvcrush.eval.calibrate.rendering import PromptRenderer
from ov_kvcrush.model.default import default_model_path
from ov_kvcrush.policies.plans.profile import PROFILE_NAME, UNKNOWN_PROFILE_NAME, USES, KVProfile, read_profile
from ov_kvcrush.policies.registry import build
from ov_kvcrush.utils.checks import check_choice
from ov_kvcrush.utils.json_file import check_writable, write_json

app = typer.Typer(add_completion=False, rich_markup_mode="rich")

_NAMES = {"known": PROFILE_NAME, "unknown": UNKNOWN_PROFILE_NAME}
_POLICIES = {"known": "kvcrush", "unknown": DEFAULT_CONTEXT_POLICY}

HELP = f"""\
Measure what each choice costs each KV head of MODEL, and write {PROFILE_NAME} beside it.

--question unknown measures contexts instead, which are compressed before anything is asked, and writes \
{UNKNOWN_PROFILE_NAME}.

A pipeline then meets a budget of bytes, such as --budget 1/8, with the plan of least cost: which heads keep how many \
tokens, and at which precision. MODEL is the folder of an exported model; left out, it is SmolLM2-135M-Instruct.

Costs are KL divergences of the next-token distribution to the full cache, in nats, over the full cache's own answer \
to each calibration prompt. Prompts come with the package; --text takes your own files instead, which calibrate \
best if they are like the texts that will be compressed.

A run that was interrupted goes on where it stopped.

[bold]Examples[/bold]

  ov_kvcrush-profile my-model

  ov_kvcrush-profile my-model --text report.txt --text minutes.txt --policy snapkv

  ov_kvcrush-profile my-model --question unknown

  ov_kvcrush-chat my-model --budget 1/8
"""


@app.command(help=HELP)
def profile(
    model: Annotated[
        Path | None, typer.Argument(help="Folder of an exported model; left out: SmolLM2-135M-Instruct.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="UTF-8 text to calibrate on; repeatable.")
    ] = None,
    texts: Annotated[int, typer.Option(metavar="N", help="How many of the package's prompts.")] = 12,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of a prompt; longer ones lose their middle.")] = 2048,
    answer_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of the answer that are compared.")] = 32,
    question: Annotated[
        str,
        typer.Option(metavar="|".join(USES), help="Whether it is there when the text is compressed; not of a context."),
    ] = USES[0],
    policy: Annotated[
        str | None,
        typer.Option(
            help=f"Which tokens an evicted head keeps; left out: kvcrush, of contexts {DEFAULT_CONTEXT_POLICY}."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write; left out: that name in MODEL.")
    ] = None,
    properties: Annotated[
        list[str] | None, typer.Option("--property", metavar="KEY=VALUE", help="Any OpenVINO property; repeatable.")
    ] = None,
) -> None:
    """Measure and write; HELP has the text for the user."""
    console = Console(stderr=True)
    try:
        for name, value, least in (("texts", texts, 1), ("tokens", tokens, 256), ("answer-tokens", answer_tokens, 4)):
            check_at_least(name, value, least)
        check_choice("question", question, USES)
        folder = model or default_model_path()
        path = out or folder / _NAMES[question]
        check_writable(path, "out")
        chosen = build(policy or _POLICIES[question])
        wanted = prompts_from_files(text) if text else calibration_prompts()[:texts]
        meter = CacheMeter(folder, dict(parse_properties(properties or ())))
        renderer = PromptRenderer(folder)
        prompts = _rendered(wanted, renderer, tokens, question)
        settings = {"tokens": tokens, "answer_tokens": answer_tokens}
        made_with = {
            "command": shlex.join(["ov_kvcrush-profile", *sys.argv[1:]]),
            **settings,
            "environment": describe_environment(),
        }
        empty = empty_profile(folder, meter, chosen, made_with, question)
        with closing(PromptReader(meter, chosen, answer_tokens, renderer.ends)) as reader:
            found = _measure(reader, empty, prompts, path, made_with, console)
        write_json(path, found.to_json(), "out")
        _part(path).unlink(missing_ok=True)
        Console().print(_table(found))
        console.print(Text(f"written to {path}"))
    except CrushError as error:
        console.print(Text(f"error: {error}", style="red"))
        raise typer.Exit(2) from None


def _rendered(
    wanted: Iterable[CalibrationPrompt], renderer: PromptRenderer, tokens: int, question: str
) -> list[Prompt]:
    if question == "known":
        return [Prompt(one.name, renderer.render(f"{one.text}\n\n{one.question}", tokens)) for one in wanted]
    asks = renderer.replay_prompt()
    return [Prompt(one.name, *renderer.render_context(one.text, one.question, tokens), asks) for one in wanted]


def _measure(
    reader: PromptReader,
    empty: KVProfile,
    prompts: list[Prompt],
    path: Path,
    made_with: dict[str, Any],
    console: Console,
) -> KVProfile:
    """Text by text, with what is done kept beside `path`."""
    profile = _resumed(_part(path), empty, prompts, made_with)
    total = num_caches(reader.meter.num_heads, len(prompts))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, refresh_per_second=1, transient=True) as bar:
        task = bar.add_task("", total=total, completed=total * len(profile.texts) // max(len(prompts), 1))

        def told(name: str, count: int) -> None:
            bar.update(task, description=name, advance=count)

        for prompt in prompts[len(profile.texts) :]:
            costs = measure_text(reader, prompt, told)
            profile = replace(profile, texts=(*profile.texts, costs))
            write_json(_part(path), profile.to_json(), "out")
        profile = measure_plans(reader, profile, prompts, told)
    console.print(Text(f"{total} caches of {len(prompts)} prompts were measured"))
    return profile


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _resumed(path: Path, empty: KVProfile, prompts: list[Prompt], made_with: dict[str, Any]) -> KVProfile:
    """What an interrupted run of the same settings left; else `empty`."""
    if not path.is_file():
        return empty
    try:
        found = read_profile(path, empty.model, empty.num_kv_heads)
    except CrushError:
        return empty
    same = all((found.made_with or {}).get(name) == made_with[name] for name in ("tokens", "answer_tokens"))
    names = [prompt.name for prompt in prompts[: len(found.texts)]]
    lengths = [len(prompt.ids) for prompt in prompts[: len(found.texts)]]
    same &= names == [text.name for text in found.texts] and lengths == [text.num_tokens for text in found.texts]
    same &= found.use == empty.use and dict(found.policy) == dict(empty.policy)
    return replace(found, made_with=made_with) if same else empty


def _table(profile: KVProfile) -> Table:
    table = Table(title="plans on the calibration texts: KL divergence to the full cache, nats")
    for name in ("bytes of bf16", "mean", "median", "90 %"):
        table.add_column(name, justify="right")
    for rung in profile.rungs:
        values = (float(np.mean(rung.kl)), float(np.median(rung.kl)), float(np.quantile(rung.kl, 0.9)))
        table.add_row(f"1/{1 / rung.of_bf16:.1f}", *(f"{value:.4f}" for value in values))
    return table


def main() -> None:
    """Entry point of `ov_kvcrush-profile`."""
    app()


if __name__ == "__main__":
    main()
