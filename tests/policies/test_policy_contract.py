"""What every policy of the registry promises, at the end of a prompt and in the middle of an answer."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

import numpy as np
import pytest
from covering import covering, examples, rarely
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_states import KINDS, POLICIES, cache_state

from ov_kvcrush.policies.base import CacheState, HeadState, Policy, Selection
from ov_kvcrush.policies.registry import ALLOCATORS, SCORERS, build, names

SMALL = {"sink_tokens": 2, "recent_tokens": 5, "min_tokens": 8}
EVICTING: list[dict[str, Any]] = [{"name": row.name} for row in POLICIES if row.name != "none"]
CRUSHING: list[dict[str, Any]] = [
    *({"name": "kvcrush", "scorer": scorer} for scorer in SCORERS),
    {"name": "kvcrush", "page": 8},
    {"name": "kvcrush", "page": 8, "split": "ada"},
]
SPLIT: list[dict[str, Any]] = [{"name": name, "split": split} for split in ALLOCATORS for name in ("snapkv", "kvcrush")]
VARIANTS = [*EVICTING, *CRUSHING, *SPLIT]
EVERY_POLICY = pytest.mark.parametrize("variant", VARIANTS, ids=json.dumps)
# How the budget is divided changes nothing here, so that combinations are left to --exhaustive.
MOST_POLICIES = pytest.mark.parametrize("variant", [*EVICTING, *CRUSHING, *rarely(*SPLIT)], ids=json.dumps)


def label(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


@dataclass(frozen=True)
class Moment:
    """When a policy is asked, and about what."""

    seed: int
    kind: str
    length: int
    heads: tuple[int, ...]
    tokens: int
    answering: bool
    span: tuple[int, int]

    def state(self, policy: Policy) -> CacheState:
        protected = policy.protected(self.length, [self.span])
        return cache_state(self.seed, policy.inputs, self.kind, protected, self.heads, answering=self.answering)


@st.composite
def moments(draw: st.DrawFn) -> Moment:
    length = draw(st.integers(1, 150))
    begin = draw(st.integers(0, length))
    return Moment(
        seed=draw(st.integers(0, 2**20)),
        kind=draw(st.sampled_from(KINDS)),
        length=length,
        heads=tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))),
        tokens=draw(st.integers(1, length)),
        answering=draw(st.booleans()),
        span=(begin, draw(st.integers(begin, length))),
    )


MANY = settings(max_examples=examples(48), deadline=None, derandomize=True)


def policy_of(variant: dict[str, Any]) -> Policy:
    return build(**variant, **SMALL)


def pairs(state: CacheState, selection: Selection) -> list[tuple[HeadState, np.ndarray]]:
    """Every head with what it keeps."""
    assert [len(layer) for layer in selection.kept] == [len(layer) for layer in state.layers]
    return [pair for layer in zip(state.layers, selection.kept, strict=True) for pair in zip(*layer, strict=True)]


def assert_equal(one: Selection, two: Selection) -> None:
    for mine, other in ((one.kept, two.kept), (one.representatives or [], two.representatives or [])):
        assert [[kept.tolist() for kept in layer] for layer in mine] == [[k.tolist() for k in layer] for layer in other]


@EVERY_POLICY
@MANY
@given(moment=moments())
def test_keeps_what_it_must_and_exactly_as_much(variant: dict[str, Any], moment: Moment) -> None:
    policy = policy_of(variant)
    state = moment.state(policy)
    selection = policy.select(state, moment.tokens)
    chosen = pairs(state, selection)
    for head, kept in chosen:
        assert kept.dtype == np.int32
        assert np.all(np.diff(kept) > 0)
        assert np.all((kept >= 0) & (kept < len(head)))
        assert np.isin(np.flatnonzero(state.is_protected(head)), kept).all()
    cached = sum(len(head) for head, _ in chosen)
    protected = sum(int(state.is_protected(head).sum()) for head, _ in chosen)
    assert sum(len(kept) for _, kept in chosen) == max(protected, min(cached, moment.tokens * len(chosen)))


@MOST_POLICIES
@MANY
@given(moment=moments())
def test_the_same_input_gives_the_same_output(variant: dict[str, Any], moment: Moment) -> None:
    """Inputs are read-only here, so writing to one fails, too."""
    policy = policy_of(variant)
    state = moment.state(policy)
    first = policy.select(state, moment.tokens)
    assert_equal(first, policy.select(copy.deepcopy(state), moment.tokens))
    assert_equal(first, policy_of(variant).select(state, moment.tokens))
    for head in (head for layer in state.layers for head in layer):
        assert not any(array.flags.writeable for array in vars(head).values() if array is not None)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v["name"] == "kvcrush"], ids=json.dumps)
@MANY
@given(moment=moments())
def test_representatives_are_among_what_stays(variant: dict[str, Any], moment: Moment) -> None:
    policy = policy_of(variant)
    state = moment.state(policy)
    selection = policy.select(state, moment.tokens)
    assert selection.representatives is not None
    stand_ins = pairs(state, Selection(selection.representatives))
    for (head, kept), (_, stands) in zip(pairs(state, selection), stand_ins, strict=True):
        assert np.all(np.diff(stands) > 0)
        assert np.isin(stands, kept).all()
        assert not state.is_protected(head)[stands].any()


@pytest.mark.parametrize(("variant", "kind", "answering"), covering(VARIANTS, KINDS, [False, True]), ids=label)
def test_a_budget_of_all_keeps_all(variant: dict[str, Any], kind: str, answering: bool) -> None:
    policy = policy_of(variant)
    state = Moment(1, kind, 60, (2, 2, 1), 60, answering, (0, 0)).state(policy)
    for head, kept in pairs(state, policy.select(state, 60)):
        assert kept.tolist() == list(range(len(head)))


@pytest.mark.parametrize(
    ("variant", "tokens", "answering"),
    [
        *covering([*EVICTING, *CRUSHING], [1, 6, 7], [False, True]),
        *rarely(*product(SPLIT, [1, 6, 7], [False, True])),
    ],
    ids=label,
)
def test_a_budget_below_what_is_protected_keeps_just_that(
    variant: dict[str, Any], tokens: int, answering: bool
) -> None:
    policy = policy_of(variant)
    state = Moment(2, "random", 60, (2, 2), tokens, answering, (0, 0)).state(policy)
    for head, kept in pairs(state, policy.select(state, tokens)):
        assert head.positions[kept].tolist() == [0, 1, 55, 56, 57, 58, 59]


@MOST_POLICIES
@MANY
@given(moment=moments())
def test_state_is_a_number_a_token(variant: dict[str, Any], moment: Moment) -> None:
    policy = policy_of(variant)
    state = moment.state(policy)
    seen = policy.update(state)
    assert (seen is not None) == policy.inputs.state
    for layer, layer_seen in zip(state.layers, seen or [], strict=policy.inputs.state):
        for head, values in zip(layer, layer_seen, strict=True):
            assert values.dtype == np.float32
            assert values.shape == (len(head),)
            assert np.isfinite(values).all()


@given(moment=moments())
@MANY
def test_none_keeps_all_whatever_the_budget(moment: Moment) -> None:
    policy = build("none")
    state = moment.state(policy)
    for head, kept in pairs(state, policy.select(state, moment.tokens)):
        assert kept.dtype == np.int32
        assert kept.tolist() == list(range(len(head)))


def test_equal_scores_leave_the_lower_positions() -> None:
    """Where nothing tells tokens apart: H2O, TOVA and Knorm pool nothing."""
    for name in ("h2o", "tova", "knorm"):
        policy = policy_of({"name": name})
        state = Moment(3, "constant", 40, (2, 2), 17, False, (0, 0)).state(policy)
        if state.layers[0][0].state is not None:
            heads = [HeadState(**{**vars(h), "state": None}) for h in state.layers[0]]
            state = CacheState((tuple(heads),), state.length, state.protected)
        for _, kept in pairs(state, policy.select(state, 17)):
            assert kept.tolist() == [*range(12), *range(35, 40)]


def test_a_policy_is_frozen_and_hashable() -> None:
    for name in names():
        policy = build(name)
        assert hash(policy) == hash(build(name))
        for f in fields(policy):
            with pytest.raises(AttributeError):
                setattr(policy, f.name, None)
