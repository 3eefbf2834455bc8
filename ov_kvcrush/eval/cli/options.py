"""The options of `ov_kvcrush-eval SUITE`: those of every suite and its own, as what suites and plan take."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ov_kvcrush.cli.parse import parse_fractions, parse_numbers, parse_properties, parse_words
from ov_kvcrush.config import PRECISIONS, parse_budget, parse_recall
from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.benchmarks import fidelity, longqa
from ov_kvcrush.eval.benchmarks.sizing import DEFAULT_SEED
from ov_kvcrush.eval.benchmarks.suites import SuiteOptions
from ov_kvcrush.eval.runs.plan import PlanOptions, pairs


def shared_options(
    model: Annotated[
        Path | None, typer.Argument(help="Folder of an exported model; left out: SmolLM2-135M-Instruct.")
    ] = None,
    length: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Most tokens of prompt and answer; 4096, longgen: 2048, longbench, longqa: the model's context.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Items: of each task, or of each grid point.")] = None,
    policy: Annotated[
        str, typer.Option(metavar="P[,P...]", help="NAME or NAME:KEY=VALUE;KEY=VALUE; the full cache is always there.")
    ] = "",
    kept: Annotated[str, typer.Option(metavar="F[,F...]", help="Kept fractions. Default: 0.25, or --budget.")] = "",
    kept_tokens: Annotated[str, typer.Option(metavar="N[,N...]", help="Kept tokens, instead or beside.")] = "",
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="F[,F...]",
            help="Bytes of the cache over those of bf16, as 1/6, instead or beside: a plan for each policy, kvcrush if "
            "none is named; see ov_kvcrush-profile. Repeatable.",
        ),
    ] = None,
    recall_tokens: Annotated[
        str,
        typer.Option(
            metavar="N[,N...]",
            help="Tokens that each step of an answer reads of a head, at least 64, or a fraction as 1/8: one more row "
            "each for the full cache and every policy.",
        ),
    ] = "",
    policy_options: Annotated[
        list[str] | None,
        typer.Option("--policy-option", metavar="KEY=VALUE", help="A setting of all policies; repeatable."),
    ] = None,
    query: Annotated[
        str, typer.Option(metavar="aware|agnostic", help="What policies see; both with a comma.")
    ] = "aware",
    key_precision: Annotated[
        str, typer.Option(metavar="T[,T...]", help=f"Cached keys: {', '.join(PRECISIONS)}.")
    ] = "u8",
    value_precision: Annotated[
        str, typer.Option(metavar="T[,T...]", help="Cached values; as many as there are for keys, or one.")
    ] = "u8",
    engine: Annotated[str, typer.Option(metavar="crush|genai", help="Engines; both with a comma.")] = "crush",
    compares: Annotated[
        bool,
        typer.Option(
            "--kl/--no-kl",
            help="Measure beside each score how far a cache is from the full one (KL); longgen has none.",
        ),
    ] = True,
    floors: Annotated[
        bool,
        typer.Option("--floors/--no-floors", help="Run random and streaming_llm at every budget beside the others."),
    ] = True,
    seed: Annotated[int, typer.Option(metavar="N", help="Of generated items, and of the intervals.")] = DEFAULT_SEED,
    properties: Annotated[
        list[str] | None, typer.Option("--property", metavar="KEY=VALUE", help="Any OpenVINO property; repeatable.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the run; left out: runs/SUITE-MODEL-DATE-TIME.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write rows, settings and the machine.")
    ] = None,
) -> None:
    """Options of every suite."""


def _task(
    task: Annotated[str, typer.Option(metavar="NAME[,NAME...]", help="Only these tasks; all if left out.")] = "",
) -> None: ...


def _tasks(
    task: Annotated[
        str, typer.Option("--tasks", "--task", metavar="NAME[,NAME...]", help="Only these tasks; all if left out.")
    ] = "",
) -> None: ...


def _contexts(
    limit: Annotated[
        int | None, typer.Option("--contexts", "--limit", metavar="N", help="Contexts of each task, its first ones.")
    ] = None,
) -> None: ...


def _questions(
    questions: Annotated[
        int | None, typer.Option(metavar="N", help="Questions of each context, spread over all of its.")
    ] = None,
) -> None: ...


def _haystack(
    haystack: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text, or folder of .txt files, to hide needles in.")
    ] = None,
) -> None: ...


def _text(
    haystack: Annotated[
        Path | None,
        typer.Option("--text", "--haystack", metavar="FILE", help="Text, or folder of .txt files, to go on with."),
    ] = None,
) -> None: ...


def _data(
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the jsonl files, or fidelity's.")] = None,
) -> None: ...


def _multi_turn(
    multi_turn: Annotated[
        bool, typer.Option("--multi-turn", help="One conversation instead of single questions.")
    ] = False,
) -> None: ...


def _depth(
    depth: Annotated[str, typer.Option(metavar="P[,P...]", help="Percent of the text before the needle.")] = "",
) -> None: ...


_OWN: dict[str, tuple[Callable[..., None], ...]] = {
    "needles": (_haystack,),
    "ruler": (_task, _haystack),
    "longbench": (_task, _data),
    "scbench": (_task, _multi_turn),
    "needle": (_haystack, _depth),
    "longgen": (_task, _text),
    longqa.SUITE: (_data, _tasks, _contexts, _questions),
    fidelity.SUITE: (_data, _tasks, _questions),
}


@dataclass(frozen=True)
class SuiteArguments:
    """The parsed command line of a suite."""

    model: Path | None
    suite: SuiteOptions
    plan: PlanOptions
    properties: dict[str, Any]
    out: Path | None
    json_path: Path | None
    compares: bool = True

    @classmethod
    def of(cls, given: dict[str, Any], reference: tuple[str, str] | None = None) -> SuiteArguments:
        """From the values of the options. reference: as PlanOptions has it.

        Raises CrushError naming an option that cannot be read.
        """
        suite = SuiteOptions(
            lengths=parse_numbers("length", given["length"]) if given["length"] else (),
            limit=given["limit"],
            seed=given["seed"],
            tasks=parse_words(given.get("task", "")),
            data=given.get("data"),
            haystack=given.get("haystack"),
            depths=parse_fractions("depth", given.get("depth", "")),
            multi_turn=given.get("multi_turn", False),
            questions=given.get("questions"),
        )
        plan = PlanOptions(
            policies=parse_words(given["policy"]),
            kept=parse_fractions("kept", given["kept"]),
            kept_tokens=parse_numbers("kept-tokens", given["kept_tokens"]) if given["kept_tokens"] else (),
            budgets=tuple(
                dict.fromkeys(parse_budget(part) for text in given["budget"] or () for part in parse_words(text))
            ),
            recalls=tuple(dict.fromkeys(parse_recall(part) for part in parse_words(given["recall_tokens"]))),
            policy_options=tuple(given["policy_options"] or ()),
            precisions=pairs(_listed("key-precision", given), _listed("value-precision", given)),
            queries=_listed("query", given),
            engines=_listed("engine", given),
            baselines=given["floors"],
            reference=reference,
        )
        properties = parse_properties(given["properties"] or ())
        return cls(given["model"], suite, plan, dict(properties), given["out"], given["json_path"], given["compares"])


def command_of(suite: str, run: Callable[[str, dict[str, Any]], None]) -> Callable[..., None]:
    """A typer command that calls `run`; the options of the suite itself come after MODEL and --length."""

    def command(**given: Any) -> None:
        run(suite, given)

    shared = _parameters(shared_options)
    own = [parameter for options in _OWN[suite] for parameter in _parameters(options)]
    names = {parameter.name for parameter in own}  # which come in the place of the shared ones
    first, others = ([p for p in part if p.name not in names] for part in (shared[:3], shared[3:]))
    command.__signature__ = inspect.Signature([*first, *own, *others])  # type: ignore[attr-defined]
    command.__annotations__ = {}
    return command


def _parameters(options: Callable[..., None]) -> list[inspect.Parameter]:
    found = inspect.signature(options, eval_str=True).parameters.values()
    return [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in found]


def _listed(option: str, given: dict[str, Any]) -> tuple[str, ...]:
    """Words of a list; repeats stay."""
    words = tuple(part.strip() for part in given[option.replace("-", "_")].split(",") if part.strip())
    if not words:
        raise CrushError(f"--{option} must be at least one, got none")
    return words
