"""Policies as the options of a command: what they mean, and what there is to choose from."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Annotated

import typer

from ov_kvcrush.config import WEIGHTS
from ov_kvcrush.errors import CrushError
from ov_kvcrush.policies.base import Budget, Policy
from ov_kvcrush.policies.registry import Settings, SettingValue, as_policy, build, describe, names
from ov_kvcrush.utils.checks import key_values

LIST = "help"  # in place of a policy's name: say which there are
NAME_OR_LIST = f"NAME|{LIST}"

BUDGET_HELP = (
    "Bytes of the cache over those of bf16, as 1/8: a plan says how many tokens each head keeps, and at which "
    "precision (see ov_kvcrush-profile)."
)
RECALL_HELP = (
    "Tokens that each step of an answer reads of each KV head, at least 64, or a fraction of what it holds, as 1/8: "
    "those that its query needs most; all stay stored."
)
WEIGHTS_HELP = (
    f"{', '.join(WEIGHTS)}: packed = steps of few rows read a second copy of the weights, which our products need; "
    "plugin = no copy; auto, the default, = packed where it takes at most a quarter of the free memory."
)
WeightsOption = Annotated[str | None, typer.Option("--weights", metavar="HOW", help=WEIGHTS_HELP)]
RecallOption = Annotated[str | None, typer.Option(metavar="N", help=RECALL_HELP)]
LookupOption = Annotated[
    bool,
    typer.Option(
        "--prompt-lookup", help="Guess tokens by what followed the last ones before: several a step, the same answer."
    ),
]
BudgetOption = Annotated[str | None, typer.Option(metavar="F", help=BUDGET_HELP)]
KeptOption = Annotated[
    float | None,
    typer.Option(metavar="F", help="Keep this fraction of the text, in (0, 1]."),
]
KeptTokensOption = Annotated[
    int | None, typer.Option(metavar="N", help="Instead: keep N tokens, however long the text.")
]
OtherOptions = Annotated[
    list[str] | None,
    typer.Option("--policy-option", metavar="KEY=VALUE", help="Another setting of the policy; repeatable."),
]


@dataclass(frozen=True)
class PolicyOptions:
    """What a command was told of a policy; None = nothing.

    kept, kept_tokens, min_tokens: its budget, see Budget. others: its other settings as KEY=VALUE; values that look
    like numbers become int or float.
    """

    name: str | None = None
    kept: float | None = None
    kept_tokens: int | None = None
    min_tokens: int | None = None
    others: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was said."""
        return self == PolicyOptions()

    def settings(self) -> Settings:
        """All that were given. Raises CrushError for a text without key or value, and for a key that is given twice."""
        own: Settings = {"kept": self.kept, "kept_tokens": self.kept_tokens, "min_tokens": self.min_tokens}
        settings: Settings = {name: value for name, value in own.items() if value is not None}
        for key, value in key_values("--policy-option", self.others):
            if key in own:
                raise CrushError(f"--policy-option {key} must be given as --{key.replace('_', '-')}, got {value!r}")
            if key in settings:
                raise CrushError(f"--policy-option {key} must be given once, got {settings[key]!r} and {value!r}")
            settings[key] = _value(value)
        return settings

    def build(self, name: str, min_tokens: int | None = None) -> Policy:
        """The policy; one that is not told how much stays keeps a quarter.

        min_tokens: of a fraction, where nothing else was given; of a number of tokens it is the number.
        Raises CrushError for a setting that there is not, and for settings that contradict each other.
        """
        return build(name, **self._completed(name, min_tokens))

    def build_open(self, name: str, min_tokens: int | None = None) -> Policy:
        """As `build`, but one that is not told how much stays has the default budget of bytes, as in CacheConfig."""
        policy = as_policy({"name": name, **self._completed(name, min_tokens)})
        assert policy is not None
        return policy

    def _completed(self, name: str, min_tokens: int | None) -> Settings:
        settings = self.settings()
        if name == "none" and self.min_tokens is not None:
            raise CrushError(
                f"min_tokens must be left out with policy 'none', which keeps everything, got {self.min_tokens}"
            )
        floor = self.kept_tokens or min_tokens
        if name != "none" and floor is not None:
            settings.setdefault("min_tokens", floor)
        return settings


def _value(text: str) -> SettingValue:
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def explain_if_asked(name: str | None) -> str | None:
    """Callback of --policy: return a name, print all policies instead of going on for "help"."""
    if name == LIST:
        print(explain_policies())
        raise typer.Exit
    return name


def list_policies() -> list[str]:
    """A line for each policy: its name and what it does."""
    return [f"{name}: {describe(name).about}" for name in names()]


def explain_policies() -> str:
    """Every policy with its settings and their defaults; what several have is said once, below them.

    Without those of the budget, which have options of their own.
    """
    found = [describe(name) for name in names()]
    common = {key for key in found[0].settings if all(key in other.settings for other in found)}
    lines = []
    for line, policy in zip(list_policies(), found, strict=True):
        lines += [line, *_indented({key: value for key, value in policy.settings.items() if key not in common})]
    budget = {f.name for f in fields(Budget)}
    lines += ["", "All of them:"]
    lines += _indented({key: value for key, value in found[0].settings.items() if key in common - budget})
    choices = {setting: parts for policy in found for setting, parts in policy.choices.items()}
    for setting, parts in choices.items():
        lines += ["", f"Where there is a {setting}, one of these, with its own settings:"]
        lines += [" ".join([f"    {setting}={part}", *_shown(settings)]) for part, settings in parts.items()]
    return "\n".join(lines)


def _indented(settings: Settings) -> list[str]:
    return [f"    {' '.join(_shown(settings))}"] if settings else []


def _shown(settings: Settings) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]
