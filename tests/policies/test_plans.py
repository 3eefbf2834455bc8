"""Plans of bytes: the solver against all choices, profiles as files, costs, geometry against the store."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_stores import require_native

from ov_kvcrush import native
from ov_kvcrush.errors import CrushError, RequestError
from ov_kvcrush.policies.base import CacheState, HeadState
from ov_kvcrush.policies.budgets.planned import Planned, chooses_alike, planned
from ov_kvcrush.policies.plans.costs import cost_table
from ov_kvcrush.policies.plans.geometry import CacheGeometry
from ov_kvcrush.policies.plans.plan import PLAN_PRECISIONS, CachePlan, HeadPlan
from ov_kvcrush.policies.plans.planner import BytePlanner
from ov_kvcrush.policies.plans.prediction import settled_for
from ov_kvcrush.policies.plans.profile import ALL_CHOICES, HEAD_CHOICES, KVProfile, Rung, TextCosts, read_profile
from ov_kvcrush.policies.plans.solver import cheapest_bytes, solve
from ov_kvcrush.policies.registry import as_policy, build

HEADS = (2, 2, 1)


def tile_bytes(key: str, value: str, head_size: int) -> int:
    """The formula of docs/kv_store.md, group_size 32."""
    bits = {"bf16": 16, "u8": 8, "u4": 4, "u2": 2}

    def up(size: int) -> int:
        return -(-size // 64) * 64

    size = 64 + up(32 * head_size * bits[key] // 8) + up(32 * head_size * bits[value] // 8)
    size += 0 if key == "bf16" else 2 * up(2 * head_size)
    return size + (0 if value == "bf16" else 2 * up(64 * head_size // 32))


GEOMETRY = CacheGeometry((32,) * sum(HEADS), "bf16", 32, 36, tile_bytes)


def profile(seed: int = 0, texts: int = 3, heads: tuple[int, ...] = HEADS) -> KVProfile:
    rng = np.random.default_rng(seed)
    made = []
    for index in range(texts):
        singles = {name: rng.exponential(0.01, sum(heads)) for name in HEAD_CHOICES}
        together = {name: float(rng.exponential(0.05)) for name in ALL_CHOICES}
        made.append(TextCosts(f"text {index}", 1000, 32, singles, together))
    rungs = tuple(Rung(np.array([0.001, 0.002, 0.01]) * size, 1 / size, 0.5) for size in (3.0, 5.5, 8.0, 16.0))
    return KVProfile("abc", heads, {"name": "snapkv"}, tuple(made), rungs, {"command": "test"})


matrices = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@given(matrices, st.integers(1, 4), st.integers(1, 5), st.floats(0, 1.2))
def test_the_solver_fits_and_comes_close_to_the_best(
    rng: np.random.Generator, heads: int, options: int, share: float
) -> None:
    costs = rng.random((heads, options))
    sizes = rng.integers(1, 50, (heads, options)).astype(float)
    least, most = cheapest_bytes(sizes), sizes.max(axis=1).sum()
    limit = least + share * (most - least)
    chosen = solve(costs, sizes, limit)
    rows = np.arange(heads)
    assert sizes[rows, chosen].sum() <= limit
    best = min(
        sum(costs[h, o] for h, o in enumerate(each))
        for each in itertools.product(range(options), repeat=heads)
        if sum(sizes[h, o] for h, o in enumerate(each)) <= limit
    )
    # The Lagrangian's gap is at most what one head can save.
    assert costs[rows, chosen].sum() <= best + (costs.max(axis=1) - costs.min(axis=1)).max() + 1e-9


def test_where_nothing_fits_the_smallest_is_taken() -> None:
    sizes = np.array([[5.0, 3.0], [4.0, 9.0]])
    assert solve(np.zeros((2, 2)), sizes, 1.0).tolist() == [1, 0]


def test_more_bytes_never_cost_more() -> None:
    table = cost_table(profile())
    sizes = GEOMETRY.sizes(table.options, 4096)
    rows = np.arange(len(sizes))
    costs = [
        table.costs[rows, solve(table.costs, sizes, GEOMETRY.full_bytes(4096) / part)].sum() for part in (16, 8, 4, 2)
    ]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
def test_fewer_bits_and_fewer_tokens_never_cost_less(power: float) -> None:
    table = cost_table(profile(), power)
    cost = dict(zip(table.options, table.costs.T, strict=True))
    for option in table.options:
        for part in ("key", "value"):
            at = PLAN_PRECISIONS.index(getattr(option, part))
            if at:
                finer = replace(option, **{part: PLAN_PRECISIONS[at - 1]})
                assert (cost[finer] <= cost[option]).all()
        assert (cost[replace(option, kept=1.0)] <= cost[option]).all()


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    made = profile()
    path = tmp_path / "p.json"
    path.write_text(json.dumps(made.to_json()))
    found = read_profile(path, "abc", HEADS)
    assert np.allclose(cost_table(found).costs, cost_table(made).costs, atol=1e-5)
    assert [rung.of_bf16 for rung in found.rungs] == [rung.of_bf16 for rung in made.rungs]
    assert found.policy == made.policy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 7}, "profile must have format 1, got 7"),
        ({"num_kv_heads": [2, 2]}, r"num_kv_heads must be \[2, 2, 1\], got \[2, 2\]"),
        ({"model": "other"}, "its fingerprint must be abc..., got other"),
        ({"texts": []}, "texts must hold at least one text"),
        ({"texts": [{"name": "x"}]}, "profile must be as ov_kvcrush-profile writes it"),
        ({"rungs": [{"of_bf16": 0.1, "excess_power": 1, "kl": [1]}]}, "costs must be 3 finite numbers"),
        ({"rungs": [{"of_bf16": -1, "excess_power": 1, "kl": [1] * 3}]}, "rungs must have finite sizes and powers"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({**profile().to_json(), **change}))
    with pytest.raises(CrushError, match=message):
        read_profile(path, "abc", HEADS)


def test_a_profile_whose_plans_name_a_cost_is_read_as_one_without(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    written = profile().to_json()
    path.write_text(json.dumps({**written, "rungs": [{"cost": 0.5, **rung} for rung in written["rungs"]]}))
    assert read_profile(path, "abc", HEADS).to_json() == written


def test_no_file_is_no_profile(tmp_path: Path) -> None:
    with pytest.raises(CrushError, match="profile must be a readable JSON file"):
        read_profile(tmp_path / "none.json", "abc", HEADS)


@pytest.mark.parametrize("head_size", [32, 64, 128])
@pytest.mark.parametrize("length", [40, 1024, 1500])
def test_the_geometry_counts_as_the_store_does(head_size: int, length: int) -> None:
    require_native()

    def native_tile_bytes(key: str, value: str, size: int) -> int:
        return native.tile_bytes(key, value, size, 32)

    geometry = CacheGeometry((head_size,) * 2, "bf16", 32, 36, native_tile_bytes)
    options = [HeadPlan(kept, key, value) for kept in (1.0, 0.35) for key in ("u8", "u2") for value in ("u4", "bf16")]
    store = native.Store(
        layers=[(4, 2, head_size, 0, 1.0)], key="u8", value="u8", recent="bf16", recent_tokens=32, group_size=32
    )
    names = ("f32", "bf16", "f16", "u8", "u4", "u2")
    for index, option in enumerate(options):
        wanted = max(36, int(np.ceil(round(option.kept * length, 6))))
        kept = min(length, -(-wanted // 32) * 32)  # whole tiles, or all
        codes = np.array([[names.index(option.key), names.index(option.value)]] * 2, np.uint8)
        counted = store.bytes_for(np.array([kept, kept], np.int64), codes)
        assert geometry.sizes(options, length)[:, index].sum() == counted
    store.close()


@pytest.mark.parametrize("budget", [1 / 3, 1 / 5.5, 1 / 8, 1 / 11, 1 / 16])
def test_a_plan_meets_its_budget(budget: float) -> None:
    heads = (2,) * 12
    geometry = replace(GEOMETRY, head_sizes=(32,) * 24)
    plan = BytePlanner(geometry, heads, profile(heads=heads), budget).plan(8192)
    options = tuple(dict.fromkeys(plan.flat))
    sizes = geometry.sizes(options, 8192)
    taken = sum(sizes[head, options.index(one)] for head, one in enumerate(plan.flat))
    assert 0.97 <= taken / (budget * geometry.full_bytes(8192)) <= 1
    assert plan.predicted_kl is not None
    assert plan.source == "profile"


def test_without_a_profile_one_setting_holds_for_all_heads() -> None:
    plan = BytePlanner(GEOMETRY, HEADS, None, 1 / 6).plan(8192)
    assert len(set(plan.flat)) == 1
    assert plan.source == "ladder"
    assert plan.predicted_kl is None


@pytest.mark.parametrize("found", [None, profile()], ids=["ladder", "profile"])
def test_a_floor_is_within_every_budget_and_fades_with_the_length(found: KVProfile | None) -> None:
    planner = BytePlanner(GEOMETRY, HEADS, found, 1 / 6)
    floor = 1024
    whole = GEOMETRY.sizes([HeadPlan(1.0, "u8", "u8")], floor).sum()

    def taken(length: int, *floors: int) -> float:
        plan = planner.plan(length, *floors)
        options = tuple(dict.fromkeys(plan.flat))
        sizes = GEOMETRY.sizes(options, length)
        return float(sum(sizes[head, options.index(one)] for head, one in enumerate(plan.flat)))

    for length in (1024, 1100, 1500, 2500, 4000, 8000):
        limit = max(whole, GEOMETRY.full_bytes(length) / 6)
        assert taken(length) <= taken(length, floor) <= limit
    if found is None:
        assert set(planner.plan(1024, floor).flat) == {HeadPlan(1.0, "u8", "u8")}
    assert taken(1500, floor) > 1.2 * taken(1500)
    assert planner.plan(8000, floor) == planner.plan(8000)


@pytest.mark.parametrize("found", [None, profile()], ids=["ladder", "profile"])
def test_short_texts_take_their_window_and_as_much_of_each_token(found: KVProfile | None) -> None:
    planner = BytePlanner(GEOMETRY, HEADS, found, 1 / 6)
    whole = GEOMETRY.full_bytes(1024) / 6
    window = GEOMETRY.window_bytes()
    for length in (100, 400, 700, 1000, 1023):
        limit = window + (whole - window) * length / 1024
        assert 0.6 * min(limit, GEOMETRY.full_bytes(length)) <= planner.nbytes(planner.plan(length), length) <= limit
    assert planner.plan(1023) == planner.plan(1024)


def test_what_no_choice_meets_is_refused_with_the_smallest() -> None:
    with pytest.raises(CrushError, match=r"budget must be at least 1/\d+ of the bf16 cache, got 1/1000"):
        BytePlanner(GEOMETRY, HEADS, profile(), 1 / 1000)
    with pytest.raises(RequestError, match=r"budget_bytes must be at least \d+ for a text of 4096 tokens, got 100"):
        BytePlanner(GEOMETRY, HEADS, profile(), budget_bytes=100).plan(4096)
    with pytest.raises(RequestError, match=r"budget_bytes must be at least \d+ for a text of 300 tokens, got 100"):
        BytePlanner(GEOMETRY, HEADS, profile(), budget_bytes=100).plan(300)
    with pytest.raises(CrushError, match="quality must be asked of a model with a profile"):
        BytePlanner(GEOMETRY, HEADS, None, quality=0.1)


def test_a_higher_quality_takes_more_bytes() -> None:
    sizes = [settled_for(profile(), quality) for quality in (1e-6, 0.01, 0.05, 0.1, 10)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


@settings(max_examples=20)
@given(matrices, st.integers(9, 60))
def test_nine_of_ten_new_texts_keep_a_quality(rng: np.random.Generator, count: int) -> None:
    kept = []
    for _ in range(200):
        factors = np.exp(rng.normal(size=count + 20))  # how much plans cost each text, old ones and new ones
        rungs = tuple(Rung(factors[:count] * 1e-4 / size, size) for size in 2.0 ** -np.arange(16))
        size = settled_for(replace(profile(), rungs=rungs), 0.01)
        kept.append(np.mean(factors[count:] * 1e-4 / size <= 0.01))
    assert np.mean(kept) >= 0.9 - 4 * np.std(kept) / np.sqrt(len(kept))


def test_planned_heads_keep_their_fractions() -> None:
    plan = CachePlan.of([HeadPlan(1.0), HeadPlan(0.1), HeadPlan(0.5), HeadPlan(0.5), HeadPlan(0.15)], HEADS, None, "x")
    positions = np.arange(1000, dtype=np.int32)
    attention = np.random.default_rng(0).random((2, 1000)).astype(np.float32)
    layers = tuple(tuple(HeadState(positions, attention) for _ in range(count)) for count in HEADS)
    policy = planned(build("snapkv", kept=0.25), plan)
    state = CacheState(layers, 1000, policy.protected(1000))
    tokens = policy.budget.tokens(1000)
    counts = [len(x) for layer in policy.select(state, tokens).kept for x in layer]
    assert counts == [1000, 128, 512, 512, 160]  # whole tiles
    assert counts == plan.tokens(1000, 36).tolist()
    assert isinstance(policy.allocator, Planned)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["kvcrush", "kvzip", "snapkv"])
def test_policies_choose_alike_whatever_their_plans_but_not_beside_named_numbers(name: str) -> None:
    plans = [CachePlan.of([HeadPlan(kept)] * 5, HEADS, None, "x") for kept in (0.5, 0.25)]
    open_one, named = as_policy(name), build(name, kept=0.25)
    assert open_one is not None
    one, other = (planned(open_one, plan) for plan in plans)
    assert chooses_alike(one, other)
    assert chooses_alike(one, open_one)
    assert chooses_alike(open_one, one)
    assert not chooses_alike(one, named)
    assert not chooses_alike(open_one, named)
    assert not chooses_alike(one, planned(replace(open_one, sink_tokens=5), plans[1]))
    assert not chooses_alike(one, None)


def test_equal_plans_make_equal_policies() -> None:
    plans = [CachePlan.of([HeadPlan(0.5)] * 5, HEADS, None, "x") for _ in range(2)]
    assert planned(build("kvcrush"), plans[0]) == planned(build("kvcrush"), plans[1])
