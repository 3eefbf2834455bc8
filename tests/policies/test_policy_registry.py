"""Policies by name: what is refused and how it is said; settings that come back as they were given."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from policy_states import POLICIES

from ov_kvcrush.errors import CrushError
from ov_kvcrush.policies import registry
from ov_kvcrush.policies.base import Budget, BudgetAllocator, DefaultBudget, Inputs, Policy
from ov_kvcrush.policies.budgets.global_threshold import GlobalThreshold
from ov_kvcrush.policies.budgets.kv_compress import PageAllocator
from ov_kvcrush.policies.budgets.pyramid_kv import PyramidKV
from ov_kvcrush.policies.keep_all import KeepAll
from ov_kvcrush.policies.kvcrush.policy import KVCrush
from ov_kvcrush.policies.registry import ALLOCATORS, SCORERS, as_policy, build, describe, name_of, names, settings_of
from ov_kvcrush.policies.scorers.h2o import H2O
from ov_kvcrush.policies.scorers.knorm import Knorm
from ov_kvcrush.policies.scorers.random_scores import Random
from ov_kvcrush.policies.scorers.snapkv import SnapKV
from ov_kvcrush.policies.top_scores import TopScores

DOCS = Path(__file__).parents[2] / "docs" / "policies.md"
EVERY_NAME = pytest.mark.parametrize("name", names())
ASKED: list[dict[str, Any]] = [
    {"name": "none", "stride": 5},
    {"name": "none", "kept": 1.0},
    {"name": "snapkv", "kept": 0.5, "window": 8, "pooling": "max", "kernel": 7},
    {"name": "snapkv", "kept_tokens": 512, "split": "global", "floor": 0.5},
    {"name": "snapkv", "kept_tokens": 36},
    {"name": "pyramidkv", "beta": 3, "sink_tokens": 0, "recent_tokens": 64},
    {"name": "pyramidkv", "split": "uniform"},
    {"name": "adakv", "floor": 0, "min_tokens": 1000},
    {"name": "kv_compress", "reduce": "mean", "page_tokens": 32},
    {"name": "kvcrush", "scorer": "random", "seed": 3, "split": "ada"},
    {"name": "kvcrush", "scorer": "rkv", "lam": 0.5, "share": 0.5, "page": 16, "stride": 64},
    {"name": "rkv", "split": "pyramid", "stride": 1},
]


def test_every_policy_has_a_row_in_the_table() -> None:
    assert names() == [row.name for row in POLICIES]


def test_a_policy_sees_what_its_row_says_and_no_more() -> None:
    assert {row.name: build(row.name).inputs for row in POLICIES} == {row.name: row.inputs for row in POLICIES}


@EVERY_NAME
def test_a_policy_without_settings_keeps_a_quarter(name: str) -> None:
    budget = build(name).budget
    assert budget == (Budget() if name == "none" else Budget(kept=0.25))
    assert build(name, kept=None, kept_tokens=None) == build(name)


@EVERY_NAME
def test_what_is_described_is_what_is_built(name: str) -> None:
    description = describe(name)
    assert settings_of(build(name)) == {"name": name, **description.settings}
    assert build(name, **description.settings) == build(name)
    assert description.about.endswith(".")
    for setting, components in description.choices.items():
        assert description.settings[setting] in components
        for component, own in components.items():
            built = settings_of(build(name, **{setting: component}))
            assert {key: built[key] for key in own} == own


@pytest.mark.parametrize("asked", ASKED, ids=json.dumps)
def test_settings_round_trip(asked: dict[str, Any]) -> None:
    policy = build(**asked)
    settings = settings_of(policy)
    assert {key: settings.get(key) for key in asked if key not in ("name", "split")} == {
        key: value for key, value in asked.items() if key not in ("name", "split")
    }
    assert build(**json.loads(json.dumps(settings))) == policy
    assert settings_of(build(**settings)) == settings


@EVERY_NAME
def test_every_setting_reaches_the_policy(name: str) -> None:
    """Another value of any number makes another policy, and comes back."""
    defaults = describe(name).settings
    for key, default in defaults.items():
        if isinstance(default, str) or (name == "none" and key in ("kept", "kept_tokens")):
            continue
        value = {"kept_tokens": 200, "kernel": 9, "floor": 0.5}.get(
            key, default / 2 if isinstance(default, float) else (default or 0) + 1
        )
        changed = build(name, **{key: value})
        assert changed != build(name)
        assert settings_of(changed)[key] == value


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", "adakv"])
def test_a_policy_says_the_name_it_was_built_by(name: str) -> None:
    """Also where another name makes the same policy: they are equal, and each keeps its name."""
    policy = build(name, split="pyramid", kept_tokens=99)
    assert name_of(policy) == settings_of(policy)["name"] == name
    assert name_of(replace(policy, stride=7)) == name
    by_hand = TopScores(Budget(kept_tokens=99), scorer=SnapKV(), allocator=PyramidKV())
    assert policy == by_hand == build("pyramidkv", kept_tokens=99)
    assert hash(policy) == hash(by_hand) == hash(build("pyramidkv", kept_tokens=99))
    assert repr(policy) == repr(by_hand)


def test_a_policy_put_together_by_hand_has_its_class_s_name_or_its_scorer_s() -> None:
    by_hand = TopScores(Budget(kept_tokens=99), scorer=H2O(window=4), allocator=PyramidKV(beta=2))
    assert name_of(by_hand) == "h2o"
    assert build(**settings_of(by_hand)) == by_hand
    assert name_of(KVCrush(scorer=Knorm())) == "kvcrush"
    assert name_of(KeepAll()) == "none"
    replaced = replace(build("snapkv"), scorer=Knorm())
    assert name_of(replaced) == "knorm"
    assert build(**settings_of(replaced)) == replaced


def test_methods_that_are_combinations() -> None:
    assert build("kv_compress") == TopScores(
        Budget(kept=0.25),
        scorer=SnapKV(reduce="sum_squares", pooling="max", aggregate="sum"),
        allocator=PageAllocator(),
    )
    assert build("pyramidkv") == TopScores(Budget(kept=0.25), scorer=SnapKV(), allocator=PyramidKV())
    assert build("snapkv", split="global", floor=0.1).inputs == build("snapkv").inputs
    assert build("kvcrush") == KVCrush(Budget(kept=0.25))
    assert build("none") == KeepAll()


def test_components_share_no_setting_that_means_two_things() -> None:
    """The settings are one flat list: what two components of a policy both have goes to both."""
    own = {name: set(inspect.signature(cls).parameters) for name, cls in SCORERS.items()}
    for name, cls in ALLOCATORS.items():
        fields_of_allocator = set(inspect.signature(cls).parameters)
        for policy in (Policy, KVCrush):
            assert not fields_of_allocator & (set(inspect.signature(policy).parameters) - {"scorer", "allocator"}), name
        assert not any(fields_of_allocator & fields_of_scorer for fields_of_scorer in own.values()), name
    for name, fields_of_scorer in own.items():
        assert fields_of_scorer & set(inspect.signature(KVCrush).parameters) <= {"seed"}, name


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"name": "snapvk"}, "policy must be one of none, kvcrush, .*, got 'snapvk' .did you mean 'snapkv'"),
        ({"name": ""}, "policy must be one of"),
        (
            {"name": "snapkv", "windw": 8},
            "must be one of kept, .*window.*, got 'windw' .did you mean 'window'",
        ),
        ({"name": "none", "window": 8}, "setting of policy 'none' must be one of kept, .*, got 'window'"),
        ({"name": "snapkv", "scorer": "h2o"}, "setting of policy 'snapkv' must be one of .*, got 'scorer'"),
        ({"name": "snapkv", "beta": 8}, r"got 'beta' \(split='pyramid' has it\)"),
        ({"name": "snapkv", "floor": 0}, r"got 'floor' \(split='ada' or 'global' has it\)"),
        ({"name": "kvcrush", "lam": 0.5}, r"got 'lam' \(scorer='rkv' has it\)"),
        ({"name": "snapkv", "budget": 3}, "got 'budget'"),
        (
            {"name": "snapkv", "split": "pyramids"},
            "split must be one of .*, got 'pyramids' .did you mean 'pyramid'",
        ),
        ({"name": "kvcrush", "scorer": "snap"}, "scorer must be one of snapkv, .*, got 'snap' .did you mean 'snapkv'"),
        ({"name": "snapkv", "split": None}, "split must be one of uniform, .*, got None"),
        ({"name": "snapkv", "window": None}, "window must be an integer of at least 1, got None"),
        ({"name": "snapkv", "kept": 0.5, "kept_tokens": 99}, "only one of kept and kept_tokens .*, got 0.5 and 99"),
        ({"name": "snapkv", "kept": 0}, r"kept must be a fraction in \(0, 1\], got 0"),
        ({"name": "snapkv", "kept": 1.01}, r"kept must be a fraction in \(0, 1\], got 1.01"),
        ({"name": "snapkv", "kept": "half"}, r"kept must be a fraction in \(0, 1\], got 'half'"),
        ({"name": "snapkv", "kept_tokens": 0}, "kept_tokens must be an integer of at least 1, got 0"),
        (
            {"name": "snapkv", "kept_tokens": 35},
            r"kept_tokens must be .* sink_tokens \+ recent_tokens = 36, got 35",
        ),
        (
            {"name": "h2o", "min_tokens": 20},
            r"min_tokens must be .* sink_tokens \+ recent_tokens = 36, got 20",
        ),
        ({"name": "tova", "sink_tokens": 500}, r"min_tokens must be at least .* = 532, got 128"),
        ({"name": "rkv", "stride": 0}, "stride must be an integer of at least 1, got 0"),
        ({"name": "none", "kept": 0.5}, "kept must be left out with policy 'none', which keeps everything, got 0.5"),
        ({"name": "none", "kept_tokens": 500}, "kept_tokens must be left out with policy 'none'.*, got 500"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_bad_settings_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(CrushError, match=text):
        build(**settings)


def test_settings_of_what_the_registry_does_not_know_are_refused() -> None:
    class Mine(BudgetAllocator):
        name = "uniform"

        def allocate(self, *_: Any) -> list[list[int]]:
            return []

    mine = TopScores(scorer=SnapKV(), allocator=Mine())
    assert name_of(mine) == "top_scores"
    with pytest.raises(CrushError, match="policy must be made of the registry's parts"):
        settings_of(mine)
    with pytest.raises(CrushError, match="seed must be the same in all parts of a policy, got 1 and 2"):
        settings_of(KVCrush(scorer=Random(seed=2), seed=1))


def test_a_policy_put_together_without_a_budget_is_said_to_keep_all() -> None:
    settings = settings_of(TopScores(scorer=SnapKV(), allocator=GlobalThreshold()))
    assert settings["kept"] == 1.0
    assert build(**settings).budget.tokens(5000) == 5000


def test_the_example_of_the_docs_is_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, section = DOCS.read_text().split("## Add a policy")
    _, code, _, rows, _ = re.split(r"```(?:python)?\n", section)
    (tmp_path / "value_norm.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    scorer = importlib.import_module("value_norm").ValueNorm
    assert rows.splitlines()[0].strip() == '"value_norm": _top_scores(ValueNorm),'
    monkeypatch.setitem(registry.POLICIES, "value_norm", registry._top_scores(scorer))
    policy = build("value_norm", kept=0.5, factor=2)
    assert build(**settings_of(policy)) == policy
    assert name_of(policy) == "value_norm"
    assert policy.inputs == Inputs(values=True)
    with pytest.raises(CrushError, match="factor must be an integer of at least 1, got 0"):
        build("value_norm", factor=0)


def test_nothing_is_shared_between_two_policies() -> None:
    one, two = build("kvcrush"), build("kvcrush")
    assert one == two
    assert one.scorer is not two.scorer  # type: ignore[attr-defined]
    assert replace(one, stride=1) != two


def test_a_policy_is_given_as_itself_by_name_or_by_settings() -> None:
    policy = build("h2o", window=9)
    assert as_policy(None) is None
    assert as_policy(policy) is policy
    assert as_policy({"name": "h2o", "kept": 0.25}) == build("h2o")
    assert as_policy(settings_of(policy)) == policy
    for wrong in (3, {"window": 9}, ["h2o"]):
        with pytest.raises(CrushError, match="policy must be a Policy, a name, or settings with a 'name', got"):
            as_policy(wrong)  # type: ignore[arg-type]


SILENT = [
    "kvcrush",
    "kvzip",
    {"name": "snapkv", "window": 8},
    {"name": "h2o", "kept": None, "kept_tokens": None},
    {"name": "kvcrush", "min_tokens": 1024},
]
SAID: list[Any] = [
    {"name": "kvcrush", "kept": 0.25},
    {"name": "kvzip", "kept_tokens": 64},
    {"name": "kvcrush", "split": "ada"},
    build("kvcrush"),
    "pyramidkv",
    "adakv",
    "kv_compress",
    "leankv",
    "none",
]


@pytest.mark.parametrize("value", SILENT, ids=str)
def test_a_name_or_settings_that_do_not_say_how_much_stays_have_the_default_budget(value: Any) -> None:
    policy = as_policy(value)
    assert policy is not None
    name, settings = (value, {}) if isinstance(value, str) else (value["name"], {**value})
    settings.pop("name", None)
    named = build(name, **settings)
    # The numbers are those of the same policy built, for who cannot plan; it is another one all the same.
    assert policy.budget == DefaultBudget(0.25, None, named.budget.min_tokens)
    assert policy.budget != named.budget
    assert replace(policy, budget=named.budget) == named
    told = json.loads(json.dumps(settings_of(policy)))
    assert not {"kept", "kept_tokens"} & set(told)
    assert as_policy(told) == policy
    assert name_of(policy) == name


@pytest.mark.parametrize("value", SAID, ids=str)
def test_who_says_how_much_stays_or_how_it_is_shared_has_that(value: Any) -> None:
    policy = as_policy(value)
    assert policy is not None
    assert type(policy.budget) is Budget
    assert as_policy(settings_of(policy)) == policy
