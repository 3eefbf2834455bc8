"""Policies by name, from one flat set of settings, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from ov_kvcrush.errors import CrushError, did_you_mean
from ov_kvcrush.policies.base import Budget, BudgetAllocator, Policy, Scorer
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
from ov_kvcrush.policies.top_scores import Scored
from ov_kvcrush.utils.checks import check_choice

Setting = int | float | str | None
Settings = dict[str, Setting]
PolicyLike = Policy | str | Mapping[str, Setting] | None  # itself, its name, its settings with the name among them

SCORERS: Mapping[str, type[Scorer]] = {
    cls.name: cls for cls in (SnapKV, H2O, TOVA, StreamingLLM, Knorm, KeyDiff, ExpectedAttention, Random, RKV, KVzip)
}
ALLOCATORS: Mapping[str, type[BudgetAllocator]] = {
    cls.name: cls for cls in (Uniform, PyramidKV, AdaKV, GlobalThreshold, PageAllocator, WholeHeads)
}
# Field of a policy that holds a part: the setting that chooses the part, and what there is to choose from.
CHOICES: Mapping[str, tuple[str, Mapping[str, type[Any]]]] = {
    "scorer": ("scorer", SCORERS),
    "allocator": ("split", ALLOCATORS),
}
DEFAULT_KEPT = 0.25


@dataclass(frozen=True)
class PolicyRecipe:
    """What a name stands for.

    policy: its class. about: classes whose docstrings say what it does. presets: settings other than the classes' own.
    open: the choices of parts that are settings; the others are what makes the name.
    """

    policy: type[Policy]
    about: tuple[type, ...]
    presets: Mapping[str, Setting]
    open: tuple[str, ...] = ()

    def parts(self, values: Mapping[str, Setting]) -> dict[str, type[Any]]:
        """Classes of the parts by the fields of the policy that hold them. Raises CrushError for an unknown choice."""
        parts: dict[str, type[Any]] = {"budget": Budget}
        for field, (setting, classes) in CHOICES.items():
            if setting in self.presets:
                chosen = values.get(setting, self.presets[setting])
                check_choice(setting, chosen, classes)
                parts[field] = classes[str(chosen)]
        return parts

    def defaults(self, values: Mapping[str, Setting]) -> Settings:
        """Every setting there is with the parts that `values` choose, and what it is if not given."""
        parts = self.parts(values)
        found = {**_scalars(Budget), **_scalars(self.policy)}
        for field, (setting, _) in CHOICES.items():
            if setting in self.open:
                found[setting] = None
            if field in parts:
                found.update(_scalars(parts[field]))
        return {name: self.presets.get(name, default) for name, default in found.items()}


@dataclass(frozen=True)
class Description:
    """What `--help` needs.

    settings: name and default of each, with the default parts. choices: for each setting that chooses a part, what
    there is to choose from, and the settings that come with each, with their defaults.
    """

    name: str
    about: str
    settings: Settings
    choices: dict[str, dict[str, Settings]]


def names() -> list[str]:
    """Every policy that `build` knows."""
    return list(_recipes())


def build(name: str, **settings: Setting) -> Policy:
    """Make a policy; `describe(name)` lists its settings. None for kept and kept_tokens means not given.

    Without either, kept is 0.25 ("none": everything). Raises CrushError for an unknown name or setting, and for a value
    that a part refuses.
    """
    recipe = _recipe(name)
    given = {key: value for key, value in settings.items() if value is not None or key not in ("kept", "kept_tokens")}
    known = recipe.defaults({key: value for key, value in given.items() if key in recipe.open})
    for key in given:
        if key not in known:
            raise CrushError(
                f"setting of policy {name!r} must be one of {', '.join(known)}, got {key!r}{_hint(recipe, key, known)}"
            )
    values = {**known, **given}
    if "kept_tokens" in given and "kept" not in given:
        values["kept"] = None
    made = {field: _make(cls, values) for field, cls in recipe.parts(values).items()}
    return _make(recipe.policy, values, **made)


def as_policy(value: PolicyLike) -> Policy | None:
    """A policy, one by its name, one by its settings with the name among them, or None. Raises CrushError otherwise."""
    if value is None or isinstance(value, Policy):
        return value
    if isinstance(value, str):
        return build(value)
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return build(str(value["name"]), **{key: setting for key, setting in value.items() if key != "name"})
    raise CrushError(f"policy must be a Policy, a name, or settings with a 'name', got {value!r}")


def describe(name: str) -> Description:
    """What a policy is, its settings and their defaults. Raises CrushError for an unknown name."""
    recipe = _recipe(name)
    choices = {
        setting: {
            key: {own: recipe.presets.get(own, default) for own, default in _scalars(cls).items()}
            for key, cls in classes.items()
        }
        for setting, classes in CHOICES.values()
        if setting in recipe.open
    }
    about = " ".join((cls.__doc__ or "").strip().splitlines()[0] for cls in recipe.about)
    return Description(name, about, recipe.defaults({}), choices)


def settings_of(policy: Policy) -> Settings:
    """Its name and all its settings, as JSON has them: `build(**settings_of(policy))` equals the policy.

    Of several names for the same thing, it is the one with the fewest settings that are not the default. A policy that
    was put together without a budget is said to keep all, kept=1.0. Raises CrushError for one of unknown parts.
    """
    parts = {CHOICES[f.name][0]: getattr(policy, f.name) for f in fields(policy) if f.name in CHOICES}
    values = _values(policy.budget, policy, *parts.values())
    best: tuple[int, Settings] | None = None
    for name, recipe in _recipes().items():
        if recipe.policy is not type(policy) or not _can_have(recipe, parts):
            continue
        mine: Settings = {**values, **{key: parts[key].name for key in recipe.open}}
        if mine["kept"] is None and mine["kept_tokens"] is None and recipe.presets.get("kept") is not None:
            mine["kept"] = 1.0
        defaults = recipe.defaults(mine)
        other = sum(mine[key] != default for key, default in defaults.items())
        if best is None or other < best[0]:
            best = other, {"name": name, **{key: mine[key] for key in defaults}}
    if best is None:
        raise CrushError(f"policy must be made of the registry's parts, got {policy!r}")
    return best[1]


def name_of(policy: Policy) -> str:
    """What a user calls it: the registry's name, or for one that was put together by hand the class's own."""
    try:
        return str(settings_of(policy)["name"])
    except CrushError:
        return policy.name


def _parts(scorer: type[Scorer], allocator: type[BudgetAllocator]) -> Settings:
    return {"kept": DEFAULT_KEPT, "scorer": scorer.name, "split": allocator.name}


def _scored(scorer: type[Scorer], allocator: type[BudgetAllocator] = Uniform, **presets: Setting) -> PolicyRecipe:
    about = (scorer,) if allocator is Uniform else (scorer, allocator)
    return PolicyRecipe(Scored, about, {**_parts(scorer, allocator), **presets}, open=("split",))


def _recipes() -> dict[str, PolicyRecipe]:
    return {
        "none": PolicyRecipe(KeepAll, (KeepAll,), {}),
        "kvcrush": PolicyRecipe(KVCrush, (KVCrush,), _parts(SnapKV, Uniform), open=("scorer", "split")),
        "snapkv": _scored(SnapKV),
        "pyramidkv": _scored(SnapKV, PyramidKV),
        "adakv": _scored(SnapKV, AdaKV),
        "kv_compress": _scored(SnapKV, PageAllocator, reduce="sum_squares", pooling="max", aggregate="sum"),
        "h2o": _scored(H2O),
        "tova": _scored(TOVA),
        "streaming_llm": _scored(StreamingLLM),
        "knorm": _scored(Knorm),
        "keydiff": _scored(KeyDiff),
        "expected_attention": _scored(ExpectedAttention),
        "random": _scored(Random),
        "rkv": _scored(RKV),
        # Without a floor, heads that a repetition hardly uses starve: needles keep their numbers and lose their names.
        "kvzip": _scored(KVzip, GlobalThreshold, floor=0.06),
    }


def _recipe(name: str) -> PolicyRecipe:
    recipes = _recipes()
    check_choice("policy", name, recipes)
    return recipes[name]


def _scalars(cls: type[Any]) -> Settings:
    """The settings of a part or policy with their defaults; parts of a policy are none."""
    return {f.name: f.default for f in fields(cls) if f.name not in ("budget", *CHOICES) and f.default is not MISSING}


def _make(cls: type[Any], values: Mapping[str, Setting], **parts: Any) -> Any:
    return cls(**{key: values[key] for key in _scalars(cls)}, **parts)


def _values(*parts: Any) -> Settings:
    """The settings of all parts. One that several parts have goes to all of them, so it must be the same in all."""
    values: Settings = {}
    for part in parts:
        for key in _scalars(type(part)):
            value = getattr(part, key)
            if values.setdefault(key, value) != value:
                raise CrushError(f"{key} must be the same in all parts of a policy, got {values[key]!r} and {value!r}")
    return values


def _can_have(recipe: PolicyRecipe, parts: Mapping[str, Any]) -> bool:
    """Whether the recipe can make a policy of these parts, given by the settings that choose them."""
    registered = all(dict(CHOICES.values())[setting].get(part.name) is type(part) for setting, part in parts.items())
    bound = [setting for setting in parts if setting not in recipe.open]
    return registered and all(recipe.presets[setting] == parts[setting].name for setting in bound)


def _hint(recipe: PolicyRecipe, key: str, known: Mapping[str, Setting]) -> str:
    """What the caller may have meant: another choice that has the setting, or the nearest known one."""
    return "".join(_owners(recipe, key)) or did_you_mean(key, known)


def _owners(recipe: PolicyRecipe, key: str) -> Iterator[str]:
    for setting, classes in CHOICES.values():
        owners = [name for name, cls in classes.items() if key in _scalars(cls)]
        if setting in recipe.open and owners:
            yield f" ({setting}={' or '.join(map(repr, owners))} has it)"
