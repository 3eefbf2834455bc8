"""Every policy by its name: built from one flat set of settings, and back to them.

To add one, add its row to `POLICIES` (docs/policies.md, "Add a policy").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from ov_kvcrush.errors import CrushError, did_you_mean
from ov_kvcrush.policies.base import Budget, BudgetAllocator, Component, DefaultBudget, Policy, Scorer
from ov_kvcrush.policies.budgets.ada_kv import AdaKV
from ov_kvcrush.policies.budgets.global_threshold import GlobalThreshold
from ov_kvcrush.policies.budgets.kv_compress import PageAllocator
from ov_kvcrush.policies.budgets.pyramid_kv import PyramidKV
from ov_kvcrush.policies.budgets.uniform import Uniform
from ov_kvcrush.policies.budgets.whole_heads import WholeHeads
from ov_kvcrush.policies.keep_all import KeepAll
from ov_kvcrush.policies.kvcrush.policy import KVCrush
from ov_kvcrush.policies.scorers.expected_attention import ExpectedAttention
from ov_kvcrush.policies.scorers.h2o import H2O
from ov_kvcrush.policies.scorers.keydiff import KeyDiff
from ov_kvcrush.policies.scorers.knorm import Knorm
from ov_kvcrush.policies.scorers.kvzip import KVzip
from ov_kvcrush.policies.scorers.random_scores import Random
from ov_kvcrush.policies.scorers.rkv import RKV
from ov_kvcrush.policies.scorers.snapkv import SnapKV
from ov_kvcrush.policies.scorers.streaming_llm import StreamingLLM
from ov_kvcrush.policies.scorers.tova import TOVA
from ov_kvcrush.policies.tiers import LeanKV
from ov_kvcrush.policies.top_scores import TopScores
from ov_kvcrush.utils.checks import check_choice

SettingValue = int | float | str | None
Settings = dict[str, SettingValue]
PolicyLike = Policy | str | Mapping[str, SettingValue] | None  # itself, its name, its settings with the name among them

DEFAULT_KEPT = 0.25  # where nobody says how much stays, and no plan takes its place
_SAYS_HOW_MANY = {"kept", "kept_tokens", "split"}  # settings that a plan, which nobody asked for, would contradict
_OWN_SHARES = ("pyramidkv", "adakv", "kv_compress", "leankv")  # these names say how a budget is shared and spent
_FIELDS = {"scorer": "scorer", "split": "allocator"}  # setting that chooses a component: field of the policy with it


@dataclass(frozen=True)
class PolicyRecipe:
    """What a name stands for.

    policy: its class. components: class of each component, by the setting that chooses it ("scorer", "split").
    open: those of them that a user may choose; the others are what makes the name. presets: settings with another
    default than the classes have. about: classes whose docstrings say what it does, () = the policy.
    """

    policy: type[Policy]
    components: Mapping[str, type[Component]] = field(default_factory=dict)
    open: tuple[str, ...] = ()
    presets: Mapping[str, SettingValue] = field(default_factory=dict)
    about: tuple[type[Component], ...] = ()

    def choose(self, values: Mapping[str, SettingValue]) -> dict[str, type[Component]]:
        """`components`, with those that `values` choose. Raises CrushError for an unknown choice."""
        chosen = dict(self.components)
        for setting in self.open:
            if setting in values:
                check_choice(setting, values[setting], CHOICES[setting])
                chosen[setting] = CHOICES[setting][str(values[setting])]
        return chosen

    def defaults(self, values: Mapping[str, SettingValue]) -> Settings:
        """Every setting there is with the components that `values` choose, and its default."""
        found = {**_scalars(Budget), **_scalars(self.policy)}
        for setting, cls in self.choose(values).items():
            if setting in self.open:
                found[setting] = cls.name
            found.update(_scalars(cls))
        return {key: self.presets.get(key, default) for key, default in found.items()}

    def can_make(self, policy: Policy) -> bool:
        """Whether some settings make this policy."""
        return type(policy) is self.policy and all(
            type(getattr(policy, _FIELDS[setting])) in (CHOICES[setting].values() if setting in self.open else (cls,))
            for setting, cls in self.components.items()
        )


def _top_scores(
    scorer: type[Scorer], allocator: type[BudgetAllocator] = Uniform, **presets: SettingValue
) -> PolicyRecipe:
    about = (scorer,) if allocator is Uniform else (scorer, allocator)
    return PolicyRecipe(
        TopScores, {"scorer": scorer, "split": allocator}, ("split",), {"kept": DEFAULT_KEPT, **presets}, about
    )


POLICIES: Mapping[str, PolicyRecipe] = {
    "none": PolicyRecipe(KeepAll),
    "kvcrush": PolicyRecipe(
        KVCrush, {"scorer": SnapKV, "split": Uniform}, open=("scorer", "split"), presets={"kept": DEFAULT_KEPT}
    ),
    "snapkv": _top_scores(SnapKV),
    "pyramidkv": _top_scores(SnapKV, PyramidKV),
    "adakv": _top_scores(SnapKV, AdaKV),
    "kv_compress": _top_scores(SnapKV, PageAllocator, reduce="sum_squares", pooling="max", aggregate="sum"),
    "leankv": PolicyRecipe(
        LeanKV, {"scorer": SnapKV, "split": AdaKV}, open=("scorer", "split"), presets={"kept": DEFAULT_KEPT}
    ),
    "h2o": _top_scores(H2O),
    "tova": _top_scores(TOVA),
    "streaming_llm": _top_scores(StreamingLLM),
    "knorm": _top_scores(Knorm),
    "keydiff": _top_scores(KeyDiff),
    "expected_attention": _top_scores(ExpectedAttention),
    "random": _top_scores(Random),
    "rkv": _top_scores(RKV),
    # Without a floor, heads that a repetition hardly uses starve: needles keep their numbers and lose their names.
    "kvzip": _top_scores(KVzip, GlobalThreshold, floor=0.06),
}
SCORERS: Mapping[str, type[Component]] = {
    recipe.components["scorer"].name: recipe.components["scorer"]
    for recipe in POLICIES.values()
    if "scorer" in recipe.components
}
ALLOCATORS: Mapping[str, type[Component]] = {
    cls.name: cls for cls in (Uniform, PyramidKV, AdaKV, GlobalThreshold, PageAllocator, WholeHeads)
}
CHOICES = {"scorer": SCORERS, "split": ALLOCATORS}  # what each setting that chooses a component chooses from


@dataclass(frozen=True)
class Description:
    """What `--help` needs.

    settings: name and default of each, with the default components. choices: for each setting that chooses a
    component, what there is to choose from, and the settings that come with each, with their defaults.
    """

    name: str
    about: str
    settings: Settings
    choices: dict[str, dict[str, Settings]]


def names() -> list[str]:
    """Every policy that `build` knows."""
    return list(POLICIES)


def build(name: str, **settings: SettingValue) -> Policy:
    """Make a policy; `describe(name)` lists its settings. None for kept and kept_tokens means not given.

    Without either, kept is 0.25 ("none": everything). Raises CrushError for an unknown name or setting, and for a value
    that a component refuses.
    """
    recipe = _recipe(name)
    given = {key: value for key, value in settings.items() if value is not None or key not in ("kept", "kept_tokens")}
    known = recipe.defaults(given)
    for key in given:
        if key not in known:
            raise CrushError(
                f"setting of policy {name!r} must be one of {', '.join(known)}, got {key!r}{_hint(recipe, key, known)}"
            )
    values = {**known, **given}
    if "kept_tokens" in given and "kept" not in given:
        values["kept"] = None
    made = {_FIELDS[setting]: _make(cls, values) for setting, cls in recipe.choose(values).items()}
    policy: Policy = _make(recipe.policy, values, budget=_make(Budget, values), built_as=name, **made)
    return policy


def as_policy(value: PolicyLike) -> Policy | None:
    """A policy, one by its name, one by its settings with the name among them, or None. Raises CrushError otherwise.

    One by name or settings that do not say how much stays has a DefaultBudget.
    """
    if value is None or isinstance(value, Policy):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        name, settings = str(value["name"]), {key: setting for key, setting in value.items() if key != "name"}
        policy = build(name, **settings)
        given = {key for key, setting in settings.items() if setting is not None}
        if not policy.evicts or name in _OWN_SHARES or given & _SAYS_HOW_MANY:
            return policy
        return replace(policy, budget=DefaultBudget(policy.budget.kept, None, policy.budget.min_tokens))
    raise CrushError(f"policy must be a Policy, a name, or settings with a 'name', got {value!r}")


def describe(name: str) -> Description:
    """What a policy is, its settings and their defaults. Raises CrushError for an unknown name."""
    recipe = _recipe(name)
    choices = {
        setting: {
            key: {own: recipe.presets.get(own, default) for own, default in _scalars(cls).items()}
            for key, cls in CHOICES[setting].items()
        }
        for setting in recipe.open
    }
    about = " ".join((cls.__doc__ or "").strip().splitlines()[0] for cls in recipe.about or (recipe.policy,))
    return Description(name, about, recipe.defaults({}), choices)


def settings_of(policy: Policy) -> Settings:
    """Its name and all its settings, as JSON has them: `build(**settings_of(policy))` equals the policy.

    A policy that was put together without a budget is said to keep all, kept=1.0. One with a DefaultBudget says
    nothing of how much stays, so `as_policy` makes it again. Raises CrushError for one that no name makes.
    """
    name = next(_names_of(policy), None)
    if name is None:
        raise CrushError(f"policy must be made of the registry's parts, got {policy!r}")
    recipe = POLICIES[name]
    components = {setting: getattr(policy, _FIELDS[setting]) for setting in recipe.components}
    values = _values(policy.budget, policy, *components.values())
    values.update({setting: components[setting].name for setting in recipe.open})
    if values["kept"] is None and values["kept_tokens"] is None and "kept" in recipe.presets:
        values["kept"] = 1.0
    unsaid = _SAYS_HOW_MANY if isinstance(policy.budget, DefaultBudget) else ()
    return {"name": name, **{key: values[key] for key in recipe.defaults(values) if key not in unsaid}}


def name_of(policy: Policy) -> str:
    """The name that `settings_of` gives, or the class's own for a policy that no name makes."""
    return next(_names_of(policy), policy.name)


def _names_of(policy: Policy) -> Iterator[str]:
    """The names that can make it: the one it was built by first, then, as if by hand, its class's and its scorer's."""
    for name in (policy.built_as or "", policy.name, getattr(policy, "scorer", policy).name):
        if name in POLICIES and POLICIES[name].can_make(policy):
            yield name


def _recipe(name: str) -> PolicyRecipe:
    check_choice("policy", name, POLICIES)
    return POLICIES[name]


def _scalars(cls: type[Any]) -> Settings:
    """The settings of a component or policy with their defaults; components of a policy are none."""
    return {f.name: f.default for f in fields(cls) if f.compare and f.default is not MISSING}


def _make(cls: type[Any], values: Mapping[str, SettingValue], **others: Any) -> Any:
    return cls(**{key: values[key] for key in _scalars(cls)}, **others)


def _values(*components: Any) -> Settings:
    """The settings of all components. One that several have goes to all of them, so it must be the same in all."""
    values: Settings = {}
    for component in components:
        for key in _scalars(type(component)):
            value = getattr(component, key)
            if values.setdefault(key, value) != value:
                raise CrushError(f"{key} must be the same in all parts of a policy, got {values[key]!r} and {value!r}")
    return values


def _hint(recipe: PolicyRecipe, key: str, known: Mapping[str, SettingValue]) -> str:
    """What the caller may have meant: another choice that has the setting, or the nearest known one."""
    owners = {
        setting: [name for name, cls in CHOICES[setting].items() if key in _scalars(cls)] for setting in recipe.open
    }
    texts = [f" ({setting}={' or '.join(map(repr, names))} has it)" for setting, names in owners.items() if names]
    return "".join(texts) or did_you_mean(key, known)
