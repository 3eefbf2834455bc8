"""LeanKV: which tokens are in which tier, and what the store makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from eviction_runs import add, make_engine, prompt, read_prompt, run, tokens
from native_stores import require_native

from ov_kvcrush import CacheConfig, CrushError, LLMPipeline, SchedulerConfig
from ov_kvcrush.core.cache_params import CacheParams
from ov_kvcrush.core.eviction import EvictionSpec
from ov_kvcrush.policies.base import CacheState, HeadState, Policy
from ov_kvcrush.policies.registry import build, settings_of

Folder = Callable[[str], Path]


def state(length: int = 400) -> CacheState:
    rng = np.random.default_rng(0)
    positions = np.arange(length, dtype=np.int32)
    layers = tuple(
        tuple(HeadState(positions, rng.exponential(1, (2, length)).astype(np.float32)) for _ in range(2))
        for _ in range(3)
    )
    return CacheState(layers, length, build("leankv").protected(length))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_each_layer_is_in_the_high_tier_the_highest_scores(share: float) -> None:
    policy = build("leankv", kept=0.5, high_share=share, pooling="none")
    here = state()
    found = policy.select(here, 200)
    assert found.tiers is not None
    assert found.precisions == (("u8", "u4"), ("u4", "u2"))
    for layer, kept, tiers in zip(here.layers, found.kept, found.tiers, strict=True):
        high = np.concatenate([tier == 0 for tier in tiers])
        scores = np.concatenate([head.attention.mean(axis=0)[i] for head, i in zip(layer, kept, strict=True)])  # type: ignore[union-attr]
        assert high.sum() == int(share * len(high) + 0.5)
        assert [len(tier) for tier in tiers] == [len(i) for i in kept]
        if 0 < share < 1:
            assert scores[high].min() >= scores[~high].max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"high": "u8"}, "high must be keys/values, each one of bf16, u8, u4, u2, got 'u8'"),
        ({"low": "u3/u2"}, "low must be keys/values"),
        ({"high": "u4/u2", "low": "u8/u2"}, "low must have no more bits than high=u4/u2, got 'u8/u2'"),
        ({"high_share": 2}, "high_share must be a fraction"),
    ],
)
def test_tiers_that_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(CrushError, match=message):
        build("leankv", **settings)  # type: ignore[arg-type]


def test_settings_make_the_same_policy_again() -> None:
    policy = build("leankv", high="u4/u4", low="u2/u2", high_share=0.5)
    assert build(**settings_of(policy)) == policy  # type: ignore[arg-type]


def test_lower_tiers_take_fewer_bytes_and_answers_go_on(tiny_ir: Folder) -> None:
    require_native()
    pipe = LLMPipeline(tiny_ir("llama"), "CPU", cache_config=CacheConfig(), scheduler_config=SchedulerConfig())
    ids = np.random.default_rng(1).integers(3, 100, 1500)

    def size(**settings: object) -> int:
        params = CacheParams(build("leankv", kept=0.5, **settings), prefill_only=True)  # type: ignore[arg-type]
        snapshot = pipe._loop.prefill(ids, params, None).snapshot
        assert snapshot is not None
        size = snapshot.nbytes
        snapshot.release()
        return size

    sizes = [size(high_share=share) for share in (1.0, 0.5, 0.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[2]
    policy = {"name": "leankv", "kept": 0.25, "stride": 32}
    tokens = pipe.generate(ov.Tensor(ids[None, :]), policy=policy, max_new_tokens=100, ignore_eos=True).tokens[0]
    assert len(tokens) == 100
    assert pipe._backend.cache.usage().used_bytes == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("high", ["bf16/bf16", "bf16/u8"])
def test_a_prompt_is_promised_the_bytes_of_its_most_precise_tier(high: str, tiny_ir: Folder) -> None:
    require_native()
    stored = {"key_precision": "u4", "value_precision": "u4"}
    probe = make_engine(tiny_ir("llama"), stored).cache
    policy = build("leankv", kept=0.5, high=high, low="u2/u2", high_share=1.0)

    def needed(policy: Policy) -> int:
        """Bytes of the smallest store that does not refuse a prompt of 900 tokens."""
        return probe._admission._all_bytes_for(901, EvictionSpec(policy), 0)  # type: ignore[attr-defined,no-any-return]

    without = needed(build("adakv", kept=0.5))
    assert needed(policy) > without
    # Tiers below the store's own precisions are no reason to promise less: what is not chosen from yet has those.
    assert needed(build("leankv", kept=0.5, high="u2/u2", low="u2/u2")) == without
    tight = make_engine(tiny_ir("llama"), {**stored, "max_bytes": needed(policy) - 1})
    with pytest.raises(CrushError, match="prompt must fit into the KV store"):
        add(tight, 0, prompt(900), policy)
    engine = make_engine(tiny_ir("llama"), {**stored, "max_bytes": needed(policy)})
    handle = add(engine, 0, prompt(900), policy, new_tokens=4)
    read_prompt(engine, handle)
    assert without < engine.cache.usage().used_bytes <= needed(policy)
    run(engine)
    assert len(tokens(handle)[0]) == 4
