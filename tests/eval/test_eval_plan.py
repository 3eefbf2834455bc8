"""Baselines run beside every policy that evicts, and what openvino_genai is not asked is said."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.cli.options import SuiteArguments, shared_options
from ov_kvcrush.eval.runs.plan import BASELINES, DEFAULT_POLICY, Planned, PlanOptions, caches_of, left_out, make_plan
from ov_kvcrush.eval.statistics import full_cache_of

MIXED = PlanOptions(
    policies=("snapkv", "kvzip"),
    kept=(0.5, 0.25),
    kept_tokens=(512,),
    precisions=(("u8", "u8"), ("u4", "u2")),
    queries=("aware", "agnostic"),
)
BUDGETS = {(0.5, None), (0.25, None), (None, 512)}


def of(plan: list[Planned], *policies: str) -> list[Planned]:
    return [planned for planned in plan if planned.setting.policy in policies]


def places(plan: list[Planned]) -> set[tuple[object, ...]]:
    settings = [planned.setting for planned in plan]
    return {(s.policy, s.query, s.kept, s.kept_tokens) for s in settings}


def test_baselines_have_every_budget_and_query_of_the_first_precision() -> None:
    plan = make_plan(MIXED)
    baselines = of(plan, *BASELINES)
    assert places(baselines) == {
        (name, query, *budget) for name in BASELINES for query in MIXED.queries for budget in BUDGETS
    }
    assert {(p.setting.engine, p.setting.precisions) for p in baselines} == {("crush", "u8/u8")}
    assert len(baselines) == len(BASELINES) * 2 * len(BUDGETS)
    # They change nothing of the others.
    assert [p for p in plan if p not in baselines] == make_plan(replace(MIXED, baselines=False))


def test_baselines_keep_as_many_tokens_as_the_policies_beside_them() -> None:
    plan = make_plan(MIXED)
    (asked, *others) = (of(plan, name) for name in ("snapkv", *BASELINES))
    budgets = {(p.setting.query, p.setting.kept, p.setting.kept_tokens): p.policy.budget for p in asked}
    for floor in (p for plan in others for p in plan):
        s = floor.setting
        assert floor.policy.budget == budgets[s.query, s.kept, s.kept_tokens]


@pytest.mark.parametrize("name", BASELINES)
def test_a_floor_that_the_user_asked_for_is_there_as_asked(name: str) -> None:
    plan = make_plan(replace(MIXED, policies=("snapkv", f"{name}:stride=7")))
    asked = of(plan, name)
    assert {p.policy.stride for p in asked} == {7}
    assert {p.setting.precisions for p in asked} == {"u8/u8", "u4/u2"}
    assert places(of(plan, *BASELINES)) == places(of(make_plan(MIXED), *BASELINES))


def test_baselines_take_the_options_of_all_policies_that_they_have() -> None:
    plan = make_plan(PlanOptions(policies=("snapkv",), policy_options=("stride=64", "sink_tokens=8", "window=16")))
    assert [(p.setting.policy, p.policy.stride, p.policy.sink_tokens) for p in of(plan, *BASELINES)] == [
        (name, 64, 8) for name in BASELINES
    ]


@pytest.mark.parametrize(
    "options",
    [
        PlanOptions(),
        PlanOptions(policies=("none",)),
        PlanOptions(policies=("snapkv",), kept=(1.0,)),
        PlanOptions(policies=("snapkv",), baselines=False),
        PlanOptions(policies=("snapkv",), engines=("genai",)),
    ],
    ids=["no policy", "full cache", "keeps all", "not wanted", "genai alone"],
)
def test_no_baselines_where_there_is_nothing_above_them(options: PlanOptions) -> None:
    assert not of(make_plan(options), *BASELINES)


def test_what_openvino_genai_has_not_is_said_in_a_line() -> None:
    options = replace(MIXED, policies=("kvzip", "snapkv", "keydiff:stride=5", "none"), engines=("crush", "genai"))
    plan = make_plan(options)
    lines = left_out(options, plan)
    assert lines == [
        "openvino_genai has no kvzip, keydiff: their rows are of ov_kvcrush only",
        "openvino_genai has no u4/u2: their rows are of ov_kvcrush only",
    ]
    named = {name for name in ("kvzip", "keydiff", "u4/u2") if name in " ".join(lines)}
    theirs = [p.setting for p in plan if p.setting.engine == "genai"]
    assert not named & ({s.policy for s in theirs} | {s.precisions for s in theirs})


def test_nothing_is_said_where_nothing_is_left_out() -> None:
    asked = PlanOptions(policies=("kvcrush", "snapkv", "h2o"), engines=("crush", "genai"))
    ours, theirs = replace(MIXED, engines=("crush",)), PlanOptions(policies=("kvzip",), engines=("genai",))
    assert left_out(asked, make_plan(asked)) == []
    assert left_out(ours, make_plan(ours)) == []
    assert left_out(theirs, make_plan(theirs)) == ["openvino_genai has no kvzip: they are left out"]


def test_each_budget_is_a_setting_of_each_policy_whatever_the_precisions() -> None:
    asked = replace(MIXED, budgets=(1 / 6, 1 / 9))
    plan = make_plan(asked)
    budgeted = [p for p in plan if p.setting.budget is not None]
    assert {(p.setting.policy, p.setting.query, p.setting.budget) for p in budgeted} == {
        (name, query, budget)
        for name in ("snapkv", "kvzip", *BASELINES)
        for query in MIXED.queries
        for budget in asked.budgets
    }
    assert len({p.setting.key for p in plan}) == len(plan)
    assert all(p.policy.evicts for p in budgeted)
    # They change nothing of the others.
    assert [p for p in plan if p not in budgeted] == make_plan(MIXED)
    caches = caches_of(plan)
    assert [caches[key].budget for key in caches] == [key[2] for key in caches]
    assert set(caches) == {
        ("u8", "u8", None, None),
        ("u4", "u2", None, None),
        ("u8", "u8", 1 / 6, None),
        ("u8", "u8", 1 / 9, None),
    }


def test_recall_is_one_more_setting_of_the_full_cache_and_each_policy() -> None:
    asked = replace(MIXED, recalls=(2048, 0.1))
    plan = make_plan(asked)
    recalled = [p for p in plan if p.setting.recall_tokens is not None]
    assert [p for p in plan if p not in recalled] == make_plan(MIXED)
    plain = {replace(p.setting, recall_tokens=None).key for p in recalled}
    assert plain == {p.setting.key for p in make_plan(MIXED) if p.setting.policy not in BASELINES}
    assert len(recalled) == 2 * len(plain)
    assert len({p.setting.key for p in plan}) == len(plan)
    for key, cache in caches_of(plan).items():
        assert cache.recall_tokens == key[3]
    full = [p.setting for p in plan if p.setting.policy == "none"]
    assert all(full_cache_of(setting, full).recall_tokens is None for setting in full)


def test_openvino_genai_reads_everything() -> None:
    with pytest.raises(CrushError, match="--recall-tokens must be left out with --engine genai"):
        PlanOptions(recalls=(64,), engines=("genai",))


def test_budgets_alone_are_those_of_the_default_policy() -> None:
    plan = make_plan(PlanOptions(budgets=(1 / 6,), precisions=(("u4", "u4"),), baselines=False))
    assert [(p.setting.policy, p.setting.precisions, p.setting.budget) for p in plan] == [
        ("none", "u4/u4", None),
        (DEFAULT_POLICY, "plan", 1 / 6),
    ]


def test_openvino_genai_has_no_budgets_and_is_not_asked() -> None:
    asked = PlanOptions(policies=("snapkv",), kept=(0.25,), budgets=(1 / 6, 0.15), engines=("crush", "genai"))
    plan = make_plan(asked)
    assert not [p for p in plan if p.setting.engine == "genai" and p.setting.budget is not None]
    assert left_out(asked, plan) == ["openvino_genai has no budget 1/6, budget 0.15: their rows are of ov_kvcrush only"]
    with pytest.raises(CrushError, match=r"--budget must be left out with --engine genai, .* got 1/6, 0.15"):
        replace(asked, engines=("genai",))


@pytest.mark.parametrize("given", [["1/6,1/9"], ["1/6", "1/9"], ["1/6", "1/9,0.25,1/6"]])
def test_budgets_come_in_lists_or_one_by_one(given: list[str]) -> None:
    defaults = {name: one.default for name, one in inspect.signature(shared_options).parameters.items()}
    found = SuiteArguments.of({**defaults, "budget": given}).plan.budgets
    assert found[:2] == (1 / 6, 1 / 9)
    assert len(found) == len(set(found))
    with pytest.raises(CrushError, match=r"budget must be a fraction such as 1/8 or 0\.125, got 'x'"):
        SuiteArguments.of({**defaults, "budget": ["1/6,x"]})
