"""The settings that a run compares: every policy at every budget and precision, on every engine, and the full cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ov_kvcrush.cli.policy_options import PolicyOptions
from ov_kvcrush.config import ENGINES, PRECISIONS, CacheConfig, budget_text
from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.records import FULL, QUERIES, Setting
from ov_kvcrush.genai.eviction import closest_genai_eviction
from ov_kvcrush.model.plugin import paged_precisions
from ov_kvcrush.policies.base import Policy
from ov_kvcrush.policies.registry import DEFAULT_KEPT, Settings, build, describe, names
from ov_kvcrush.utils.checks import check_choice, check_fraction

# Policies that openvino_genai has a method of the same name for.
GENAI_POLICIES = ("kvcrush", "snapkv", "h2o")
# Policies that every other one has to beat; run beside all others.
BASELINES = ("random", "streaming_llm")
DEFAULT_POLICY = "kvcrush"  # of budgets without a policy
_MANY_TOKENS = 1 << 20

CacheKey = tuple[str, str, float | None, float | None]  # precisions of keys and values, budget, recall


@dataclass(frozen=True)
class Planned:
    """A setting, and its policy."""

    setting: Setting
    policy: Policy


@dataclass(frozen=True)
class PlanOptions:
    """Lists of what is compared; all with all, but for precisions, which are pairs.

    policies: NAME or NAME:KEY=VALUE;KEY=VALUE; with budgets and without policies DEFAULT_POLICY. kept: fractions;
    kept_tokens: numbers of tokens instead or beside; budgets: bytes over those of bf16 instead or beside, on our engine
    alone, whose plans choose the precisions. recalls: tokens that decode steps read, as in CacheConfig: each is one
    more setting of our engine for the full cache and every policy, but for baselines. policy_options: KEY=VALUE for all
    policies. precisions: keys and values.
    baselines: run BASELINES too, unless they are among the policies: on our engine, at the first precisions, if any
    policy evicts. reference: precisions of a full cache that all others are compared with; None = the most precise one.
    """

    policies: tuple[str, ...] = ()
    kept: tuple[float, ...] = ()
    kept_tokens: tuple[int, ...] = ()
    budgets: tuple[float, ...] = ()
    recalls: tuple[float, ...] = ()
    policy_options: tuple[str, ...] = ()
    precisions: tuple[tuple[str, str], ...] = (("u8", "u8"),)
    queries: tuple[str, ...] = ("aware",)
    engines: tuple[str, ...] = field(default=ENGINES[:1])
    baselines: bool = True
    reference: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        for precisions in self.precisions:
            for name, value in zip(("--key-precision", "--value-precision"), precisions, strict=True):
                check_choice(name, value, PRECISIONS)
        for query in self.queries:
            check_choice("--query", query, QUERIES)
        for engine in self.engines:
            check_choice("--engine", engine, ENGINES)
        for kept in self.kept:
            check_fraction("--kept", kept)
        for budget in self.budgets:
            check_fraction("--budget", budget)
        if self.reference is not None and self.engines != ENGINES[:1]:
            raise CrushError(
                f"--engine must be crush to compare caches, got {', '.join(self.engines)}: openvino_genai tells no "
                "probabilities"
            )
        if self.recalls and "crush" not in self.engines:
            raise CrushError(
                "--recall-tokens must be left out with --engine genai, which reads everything, got "
                f"{', '.join(map(str, self.recalls))}"
            )
        if self.budgets and "crush" not in self.engines:
            raise CrushError(
                f"--budget must be left out with --engine genai, whose cache has one type for all heads, got "
                f"{', '.join(map(budget_text, self.budgets))}; compare it by --key-precision and --value-precision"
            )

    @property
    def specs(self) -> tuple[str, ...]:
        """The policies that run."""
        return self.policies or ((DEFAULT_POLICY,) if self.budgets else ())


def make_plan(options: PlanOptions) -> list[Planned]:
    """Every setting once: for each engine, precision and query the full cache, then its policies, then the baselines.

    openvino_genai runs with the question in its prompt ("aware"), with the policies and precisions that it has. Raises
    CrushError for an unknown policy, setting or precision.
    """
    found: dict[str, Planned] = {}
    specs = [_parse(spec, options.policy_options) for spec in options.specs]
    evicting = [policy for name, own in specs for policy in _with_budgets(name, own, options)]
    full = Planned(_setting(FULL, {}), build(FULL))
    baselines = _baselines(specs, evicting, options)
    if options.reference is not None:
        for query in options.queries:
            _add(found, full, "crush", options.reference, query)
    for precisions in options.precisions:
        if "crush" in options.engines:
            for query in options.queries:
                for planned in (full, *evicting, *(baselines if precisions == options.precisions[0] else ())):
                    _add(found, planned, "crush", precisions, query)
                for recall in options.recalls:
                    for planned in (full, *evicting):
                        _add(found, planned, "crush", precisions, query, recall)
    if "genai" in options.engines:
        able = [p for p in options.precisions if paged_precisions(*p, {})]
        if not able:
            raise CrushError(
                "--key-precision and --value-precision must be u8 or u4 for openvino_genai, got "
                f"{', '.join('/'.join(p) for p in options.precisions)}"
            )
        for precisions in able:
            for planned in (full, *_distinct_for_genai(evicting)):
                _add(found, planned, "genai", precisions, "aware")
    return list(found.values())


def left_out(options: PlanOptions, plan: Sequence[Planned]) -> list[str]:
    """A line for the policies, precisions and budgets that openvino_genai does not have; none if it does not run."""
    if "genai" not in options.engines:
        return []
    asked = dict.fromkeys(_parse(spec, options.policy_options)[0] for spec in options.specs)
    policies = [name for name in asked if name not in (FULL, *GENAI_POLICIES)]
    able = {precisions_of(planned.setting) for planned in plan if planned.setting.engine == "genai"}
    precisions = dict.fromkeys("/".join(p) for p in options.precisions if p not in able)
    what = "their rows are of ov_kvcrush only" if "crush" in options.engines else "they are left out"
    budgets = [f"budget {budget_text(budget)}" for budget in options.budgets]
    lists = (policies, precisions, budgets)
    return [f"openvino_genai has no {', '.join(missing)}: {what}" for missing in lists if missing]


def pairs(key: Sequence[str], value: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Pairs of key and value precisions; a single one goes with all of the other. CrushError for other counts."""
    if len(key) != len(value) and 1 not in (len(key), len(value)):
        raise CrushError(
            f"--key-precision and --value-precision must be equally many, or one of either, got {len(key)} and "
            f"{len(value)}"
        )
    count = max(len(key), len(value))
    return tuple(zip(tuple(key) * (count // len(key)), tuple(value) * (count // len(value)), strict=True))


def grouped(plan: Sequence[Planned], key: Callable[[Setting], Any]) -> list[list[Planned]]:
    """The plan grouped by key; groups and members in the order of the plan."""
    found: dict[Any, list[Planned]] = {}
    for planned in plan:
        found.setdefault(key(planned.setting), []).append(planned)
    return list(found.values())


def precisions_of(setting: Setting) -> tuple[str, str]:
    """Of keys and values."""
    return setting.key_precision, setting.value_precision


def cache_of(setting: Setting) -> CacheKey:
    """What tells our engine's caches apart: precisions of keys and values, the budget and the recall."""
    return setting.key_precision, setting.value_precision, setting.budget, setting.recall_tokens


def caches_of(plan: Sequence[Planned]) -> dict[CacheKey, CacheConfig]:
    """Our engine's cache for each `cache_of`, in the order in which they first appear."""
    return {
        (key, value, budget, recall): CacheConfig(
            key_precision=key, value_precision=value, budget=budget, recall_tokens=recall, attention="crush"
        )
        for key, value, budget, recall in dict.fromkeys(cache_of(planned.setting) for planned in plan)
    }


def _baselines(
    specs: Sequence[tuple[str, Settings]], evicting: Sequence[Planned], options: PlanOptions
) -> list[Planned]:
    """BASELINES that the user did not name, at every budget that evicts, with the --policy-option values they know."""
    if not options.baselines or not any(planned.policy.evicts for planned in evicting):
        return []
    shared = PolicyOptions(others=options.policy_options).settings()
    missing = [name for name in BASELINES if name not in dict(specs)]
    own = {name: {key: value for key, value in shared.items() if key in describe(name).settings} for name in missing}
    return [p for name in missing for p in _with_budgets(name, own[name], options) if p.policy.evicts]


def _parse(spec: str, others: tuple[str, ...]) -> tuple[str, Settings]:
    """Name and settings; those of --policy-option where the policy does not say otherwise."""
    name, _, text = spec.strip().partition(":")
    check_choice("--policy", name, names())
    own = PolicyOptions(others=tuple(part for part in text.split(";") if part.strip())).settings()
    shared = {} if name == FULL else PolicyOptions(others=others).settings()
    return name, {**shared, **own}


def _with_budgets(name: str, own: Settings, options: PlanOptions) -> Iterator[Planned]:
    if name == FULL:  # it is there anyway; settings of it are refused here
        build(name, **own)
        return
    budgets: list[Settings] = [{"kept": kept} for kept in options.kept]
    budgets += [{"kept_tokens": tokens, "min_tokens": tokens} for tokens in options.kept_tokens]
    if not budgets and not options.budgets:
        budgets = [{"kept": DEFAULT_KEPT}]
    for amount in budgets:
        asked = {key: value for key, value in amount.items() if key != "min_tokens"}
        yield Planned(_setting(name, {**own, **asked}), build(name, **{**amount, **own}))
    for budget in options.budgets:  # how many tokens is the plan's: the policy says which
        yield Planned(_setting(name, own, budget), build(name, **own))


def _setting(name: str, settings: Settings, budget: float | None = None) -> Setting:
    """A setting of our engine in u8, "aware"; `_add` replaces engine, precisions and query."""
    own = dict(settings)
    kept, kept_tokens = own.pop("kept", None), own.pop("kept_tokens", None)
    assert kept is None or isinstance(kept, (int, float))
    assert kept_tokens is None or isinstance(kept_tokens, int)
    return Setting(
        engine="crush",
        policy=name,
        key_precision="u8",
        value_precision="u8",
        kept=kept,
        kept_tokens=kept_tokens,
        policy_settings=own,
        budget=budget,
    )


def _add(
    found: dict[str, Planned],
    planned: Planned,
    engine: str,
    precisions: tuple[str, str],
    query: str,
    recall: float | None = None,
) -> None:
    key, value = precisions if planned.setting.budget is None else ("u8", "u8")
    setting = replace(
        planned.setting, engine=engine, key_precision=key, value_precision=value, query=query, recall_tokens=recall
    )
    found.setdefault(setting.key, Planned(setting, planned.policy))


def _distinct_for_genai(evicting: Sequence[Planned]) -> list[Planned]:
    """Policies that openvino_genai has; the first one of those that become the same eviction there."""
    found: dict[str, Planned] = {}
    for planned in evicting:
        s = planned.setting
        if s.policy in GENAI_POLICIES and s.budget is None:
            same = f"{closest_genai_eviction(planned.policy, _MANY_TOKENS)} {s.kept} {s.kept_tokens}"
            found.setdefault(same, planned)
    return list(found.values())
