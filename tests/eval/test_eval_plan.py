"""Baselines run beside every policy that evicts, and what openvino_genai is not asked is said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ov_kvcrush.eval.runs.plan import BASELINES, Planned, PlanOptions, left_out, make_plan

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
