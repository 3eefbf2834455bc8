"""`ov_kvcrush-eval frontier`: plans of a profiled model beside uniform settings, at the bytes that each takes."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ov_kvcrush.cli.console import progress
from ov_kvcrush.cli.environment import describe_environment
from ov_kvcrush.cli.parse import check_numbers, parse_fractions, parse_numbers, parse_properties, parse_words
from ov_kvcrush.config import CacheConfig
from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.calibrate.frontier import (
    FRACTIONS,
    METHODS,
    Compared,
    FrontierRow,
    against_uniform,
    measure_frontier,
    read_texts,
    summary,
)
from ov_kvcrush.eval.calibrate.kv_sharer import find_shared_layers
from ov_kvcrush.eval.calibrate.meter import CacheMeter
from ov_kvcrush.eval.calibrate.prompts import calibration_prompts
from ov_kvcrush.eval.calibrate.rendering import PromptRenderer
from ov_kvcrush.kvcache.planning import default_policy, find_profile
from ov_kvcrush.policies.plans.profile import PROFILE_NAME, KVProfile
from ov_kvcrush.utils.json_file import check_writable, write_json

HELP = f"""\
KL divergence to the full cache over bytes: plans of MODEL's profile ({PROFILE_NAME}) beside uniform settings.

Each text is read once, the full cache answers it greedily, and every other cache is given the same tokens. Texts are \
the "prompt" fields of the jsonl files in --data, such as MiniLongBench's, and the contexts, each with its first \
question, of folders with contexts.jsonl and items.jsonl; they must not be those of the profile. \
A run that was interrupted goes on with the texts that its --json file lacks.

[bold]Example[/bold]

  ov_kvcrush-eval frontier my-model --data minilongbench/ --per-file 5 --json frontier.json
"""


def add_frontier(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="frontier", help=HELP)(frontier_command)


def frontier_command(
    model: Annotated[Path, typer.Argument(help="Folder of an exported model with a profile.")],
    data: Annotated[Path, typer.Option(metavar="FOLDER", help="jsonl files with a field prompt, or such folders.")],
    per_file: Annotated[int, typer.Option(metavar="N", help="Texts of each file, its first ones.")] = 5,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of a prompt; longer ones lose their middle.")] = 2048,
    answer_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of the answer that are compared.")] = 32,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write all rows.")] = None,
    methods: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="What to measure, a pass over the answer each. equal: uniform settings of the plans' bytes.",
        ),
    ] = ",".join(METHODS),
    fractions: Annotated[
        str, typer.Option(metavar="F,...", help="Fractions of the tokens that uniform settings keep.")
    ] = ",".join(map("{:g}".format, FRACTIONS)),
    shared_layers: Annotated[
        str,
        typer.Option(metavar="N,...", help="Also numbers of layers that read another's keys and values (KVSharer)."),
    ] = "",
    properties: Annotated[
        list[str] | None, typer.Option("--property", metavar="KEY=VALUE", help="Any OpenVINO property; repeatable.")
    ] = None,
) -> None:
    """Measure and print; HELP has the text for the user."""
    console = Console(stderr=True)
    try:
        if json_path is not None:
            check_writable(json_path)
        texts = list(read_texts(data, per_file))
        own = dict(parse_properties(properties or ()))
        counts = parse_numbers("shared-layers", shared_layers) if shared_layers else ()
        if shared_layers:
            check_numbers("shared-layers", counts)
        compared = Compared(parse_words(methods), parse_fractions("fractions", fractions))
        meter = CacheMeter(model, own)
        profile = find_profile(meter.model, meter.config)
        if profile is None:
            raise CrushError(f"model must have a profile, got none in {str(model)!r}; ov_kvcrush-profile makes it")
        renderer, policy = PromptRenderer(model), default_policy(profile)
        run = {"model": profile.model, "tokens": tokens, "answer_tokens": answer_tokens, "shared_layers": list(counts)}
        if compared != Compared():
            run |= {"methods": list(compared.methods), "fractions": list(compared.fractions)}
        done = _Done.resume(json_path, run, profile)
        left = [(name, text) for name, text in texts if name not in done.names]
        sharing = [_sharing_meter(model, count, own, console) for count in counts if left]
        with progress(len(left), console) as report:

            def told(name: str, rows: list[FrontierRow]) -> None:
                done.rows.extend(rows)
                done.names.append(name)
                report(name)
                if json_path is not None:  # an interrupted run keeps what it has
                    write_json(json_path, done.report())

            measure_frontier(meter, profile, policy, renderer, left, tokens, answer_tokens, told, sharing, compared)
        Console().print(_table(summary(done.rows)), _against_table(against_uniform(done.rows)))
        if json_path is not None:
            write_json(json_path, done.report())
    except CrushError as error:
        console.print(Text(f"error: {error}", style="red"))
        raise typer.Exit(2) from None


def _sharing_meter(model: Path, count: int, properties: dict[str, Any], console: Console) -> CacheMeter:
    """The model with up to `count` layers of KVSharer's choice; its calibration texts are the package's."""
    texts = [prompt.text for prompt in calibration_prompts()]
    shared = find_shared_layers(model, texts, count, progress=lambda line: console.print(Text(line)))
    return CacheMeter(model, properties, CacheConfig(shared_layers=shared))


@dataclass(frozen=True, eq=False)
class _Done:
    """What is measured. run: settings that rows of one file share. names: texts, those with too short answers too."""

    run: Mapping[str, Any]
    profile: KVProfile
    rows: list[FrontierRow] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @classmethod
    def resume(cls, path: Path | None, run: Mapping[str, Any], profile: KVProfile) -> _Done:
        """What an interrupted run with the same settings and profile left in its file; else nothing."""
        try:
            found = json.loads(path.read_text("utf-8")) if path is not None else {}
            if found.get("run") == run and found.get("profile") == (profile.made_with or {}):
                return cls(run, profile, [FrontierRow(**row) for row in found["rows"]], list(found["texts"]))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            pass
        return cls(run, profile)

    def report(self) -> dict[str, Any]:
        """What the file holds."""
        return {
            "command": shlex.join(["ov_kvcrush-eval", *sys.argv[1:]]),
            "environment": describe_environment(),
            "run": dict(self.run),
            "profile": dict(self.profile.made_with or {}),
            "texts": self.names,
            "settings": summary(self.rows),
            "against_uniform": against_uniform(self.rows),
            "rows": [row.__dict__ for row in self.rows],
        }


def _table(rows: list[dict[str, float | str]]) -> Table:
    table = Table(title="KL divergence to the full cache, nats, over texts")
    for name in ("setting", "bytes of bf16", "mean (95 %)", "median", "90 %", "same top token", "predicted", "texts"):
        table.add_column(name, justify="left" if name == "setting" else "right")
    for row in rows:
        table.add_row(
            str(row["setting"]), f"1/{1 / float(row['of_bf16']):.2f}",
            f"{row['mean']:.4f} ({row['low']:.4f}-{row['high']:.4f})", f"{row['median']:.4f}", f"{row['q90']:.4f}",
            f"{row['same_top']:.3f}", f"{row['predicted']:.4f}", str(row["texts"]),
        )  # fmt: skip
    off = [float(row["off_plan"]) for row in rows if row["off_plan"] == row["off_plan"]]  # not NaN
    if off:
        table.caption = f"the bytes stored are within {max(off):.1%} of a plan's"
    return table


def _against_table(rows: list[dict[str, float | str]]) -> Table:
    table = Table(title="the same beside the best uniform setting of at least as many bytes")
    for name in ("setting", "bytes of bf16", "mean", "uniform", "its bytes", "its mean", "ratio (95 %)"):
        table.add_column(name, justify="left" if name in ("setting", "uniform") else "right")
    for row in rows:
        table.add_row(
            str(row["setting"]), f"1/{1 / float(row['of_bf16']):.2f}", f"{row['mean']:.4f}",
            str(row["uniform"]), f"1/{1 / float(row['uniform_of_bf16']):.2f}", f"{row['uniform_mean']:.4f}",
            f"{row['ratio']:.2f} ({row['low']:.2f}-{row['high']:.2f})",
        )  # fmt: skip
    return table
