"""engine="genai": what of a policy openvino_genai is told, what is refused, and that it evicts what it is told to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as ov_genai
import pytest
from covering import covering

from ov_kvcrush import CacheConfig, ContinuousBatchingPipeline, CrushError, LLMPipeline, RequestError
from ov_kvcrush.genai.eviction import GenaiEviction, closest_genai_eviction, scheduler_fields, translate
from ov_kvcrush.policies.registry import build, names

Mode, Anchor = ov_genai.AggregationMode, ov_genai.KVCrushAnchorPointMode
SIZES: dict[str, Any] = {"kept_tokens": 512, "sink_tokens": 32, "recent_tokens": 64, "stride": 32}
PAGES: dict[str, Any] = {"page": 32, "page_rule": "genai", "pooling": "none"}

# Policy -> sizes, aggregation, window, KVCrush's blocks, anchor and seed of openvino_genai.
TRANSLATED: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "snapkv": (
        {"name": "snapkv", **SIZES, "window": 8},
        (32, 64, 512, Mode.NORM_SUM, 8, 0, None, 0),
    ),
    "h2o": (
        {"name": "h2o", **SIZES, "window": 100, "sink_tokens": 96},
        (96, 64, 512, Mode.SUM, 100, 0, None, 0),
    ),
    "kvcrush": (
        {"name": "kvcrush", **SIZES, **PAGES, "share": 0.25, "anchor": "alternating", "seed": 7, "window": 16},
        (32, 64, 384, Mode.NORM_SUM, 16, 4, Anchor.ALTERNATING, 7),
    ),
    "kvcrush over h2o": (
        {"name": "kvcrush", **SIZES, "page": 32, "page_rule": "genai", "scorer": "h2o", "share": 0.1, "anchor": "mean"},
        (32, 64, 480, Mode.SUM, 128, 1, Anchor.MEAN, 0),
    ),
    "kvcrush without representatives": (
        {"name": "kvcrush", **SIZES, **PAGES, "share": 0, "anchor": "random"},
        (32, 64, 512, Mode.NORM_SUM, build("kvcrush").inputs.window, 0, Anchor.RANDOM, 0),
    ),
}


def as_told(policy: dict[str, Any], device: str = "CPU") -> GenaiEviction:
    eviction = translate(build(**policy), device)
    assert eviction is not None
    return eviction


@pytest.mark.parametrize("case", TRANSLATED.values(), ids=TRANSLATED)
def test_every_field_arrives(case: tuple[dict[str, Any], tuple[Any, ...]]) -> None:
    policy, expected = case
    eviction = as_told(policy)
    config = eviction.config()
    crush = config.kvcrush_config
    anchor = crush.anchor_point_mode if policy["name"] == "kvcrush" else None
    sizes = (config.get_start_size(), config.get_recent_size(), config.get_max_cache_size())
    rest = (config.aggregation_mode, config.snapkv_window_size, crush.budget, anchor, crush.rng_seed)
    assert (*sizes, *rest) == expected
    assert not config.apply_rotation
    assert eviction.kept_tokens == policy["kept_tokens"]
    assert eviction.name == (policy["name"] if crush.budget else "h2o" if policy["name"] == "h2o" else "snapkv")


@pytest.mark.parametrize("policy", [None, build("none"), build("snapkv", kept=1.0)])
def test_keeping_everything_needs_no_eviction(policy: Any) -> None:
    assert translate(policy) is None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sinks": ({"name": "snapkv", "sink_tokens": 4}, "sink_tokens must be a multiple of 32 and at least 32, got 4"),
    "no sinks": ({"name": "snapkv", "sink_tokens": 0}, "sink_tokens must be a multiple of 32 and at least 32, got 0"),
    "recent": ({"name": "h2o", "recent_tokens": 40}, "recent_tokens must be a multiple of 32 and at least 32, got 40"),
    "stride": ({"name": "snapkv", "stride": 128}, "stride must be 32, as it evicts whenever a block is full, got 128"),
    "fraction": (
        {"name": "snapkv", "kept_tokens": None, "kept": 0.5},
        "kept_tokens must be given, as its sizes are tokens, got kept=0.5",
    ),
    "odd budget": ({"name": "snapkv", "kept_tokens": 500}, "kept_tokens must be a multiple of 32, got 500"),
    "small budget": (
        {"name": "snapkv", "kept_tokens": 96, "min_tokens": 96},
        "kept_tokens must be at least 128: sink_tokens, recent",
    ),
    "budget of representatives": (
        {"name": "kvcrush", **PAGES, "kept_tokens": 128, "share": 0.5},
        "kept_tokens must be at least 192: sink_tokens, recent_tokens, one block and 2 of representatives; got 128",
    ),
    "floor": ({"name": "snapkv", "min_tokens": 600}, "min_tokens must be at most kept_tokens=512, as it has no floor"),
    "split": ({"name": "snapkv", "split": "ada"}, "split must be 'uniform', got 'ada'"),
    "scorer": ({"name": "kvcrush", "scorer": "knorm"}, "scorer must be one of snapkv, h2o, got 'knorm'"),
    "tokens": (
        {"name": "kvcrush", "pooling": "none"},
        "page must be 32, got 0; page_rule must be 'genai', got 'crush'",
    ),
    "page": ({"name": "kvcrush", **PAGES, "page": 16}, "page must be 32, got 16"),
    "share": ({"name": "kvcrush", **PAGES, "share_mode": "adaptive"}, "share_mode must be 'static', got 'adaptive'"),
    "anchor": ({"name": "kvcrush", **PAGES, "anchor": "inverse_mean"}, "anchor must be one of random, zeros, ones"),
    "pooling": ({"name": "snapkv", "pooling": "max"}, "pooling must be 'avg', as it pools its own way, got 'max'"),
    "pooling of kvcrush": ({"name": "kvcrush", **PAGES, "pooling": "avg"}, "pooling must be 'none', as it pools its"),
    "aggregate": (
        {"name": "snapkv", "aggregate": "max"},
        "aggregate must be 'mean', as it pools its own way, got 'max'",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_express_is_named(case: tuple[dict[str, Any], str]) -> None:
    policy, message = case
    with pytest.raises(CrushError) as error:
        translate(build(**{**SIZES, **policy}))
    assert message in str(error.value)
    assert str(error.value).count(" must be ") == message.count(" must be ")  # nothing else is at fault


@pytest.mark.parametrize("name", sorted(set(names()) - {"none", "snapkv", "h2o", "kvcrush"}))
def test_other_policies_are_refused_by_name(name: str) -> None:
    with pytest.raises(CrushError, match=r"(policy must be one of snapkv, h2o, kvcrush|split must be 'uniform'), got"):
        translate(build(name, **SIZES))


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(CrushError, match=r"sink_tokens must .*; stride must .*; kept_tokens must .*engine='genai'"):
        translate(build("snapkv"))


def test_blocks_of_a_gpu_are_smaller() -> None:
    sizes = {"kept_tokens": 112, "sink_tokens": 16, "recent_tokens": 48, "stride": 16, "min_tokens": 112}
    policy = {"name": "kvcrush", **PAGES, "page": 16, "share": 0.15, **sizes}
    eviction = as_told(policy, "GPU.0")
    assert (eviction.crush_blocks, eviction.max_cache_size, eviction.kept_tokens) == (1, 96, 112)
    with pytest.raises(CrushError, match="page must be 32, got 16"):
        translate(build(**policy))


@pytest.mark.parametrize(("name", "tokens"), covering(sorted(set(names()) - {"none"}), [128, 500, 4096]))
def test_nearest_keeps_as_many_tokens_in_whole_blocks(name: str, tokens: int) -> None:
    eviction = closest_genai_eviction(build(name), tokens)
    assert eviction.kept_tokens == tokens // 32 * 32
    assert (eviction.crush_blocks > 0) == (name == "kvcrush")
    eviction.config()


@pytest.mark.parametrize("name", ["snapkv", "kvcrush"])
def test_nearest_refuses_what_is_too_little(name: str) -> None:
    with pytest.raises(CrushError, match="kept tokens must be at least 96 for openvino_genai's eviction, got 95"):
        closest_genai_eviction(build(name), 95)


def test_scheduler_is_the_same_but_for_the_eviction() -> None:
    eviction = as_told({"name": "snapkv", **SIZES})
    given = ov_genai.SchedulerConfig()
    given.max_num_batched_tokens, given.num_kv_blocks, given.enable_prefix_caching = 77, 9, True
    changed = eviction.added_to(given, is_default=True)
    assert not given.use_cache_eviction
    for name in scheduler_fields(given):
        if name not in (
            "use_cache_eviction",
            "cache_eviction_config",
            "enable_prefix_caching",
            "sparse_attention_config",
        ):
            assert getattr(changed, name) == getattr(given, name)
    assert (changed.use_cache_eviction, changed.enable_prefix_caching) == (True, False)
    assert changed.cache_eviction_config.get_max_cache_size() == 512
    with pytest.raises(CrushError, match="enable_prefix_caching must be False with a policy and engine='genai'"):
        eviction.added_to(given, is_default=False)
    with pytest.raises(CrushError, match="policy must be left out where scheduler_config has use_cache_eviction"):
        eviction.added_to(changed, is_default=False)


# -- running -----------------------------------------------------------------------------------------------------------

CRUSHED = {"name": "kvcrush", **PAGES, "kept_tokens": 192, "sink_tokens": 32, "recent_tokens": 32, "stride": 32}
CRUSHED |= {"share": 0.34, "anchor": "mean", "window": 8}


@pytest.fixture(scope="module")
def pipe(shallow: Path) -> ContinuousBatchingPipeline:
    scheduler = {"num_kv_blocks": 40, "max_num_batched_tokens": 512}
    cache = CacheConfig(policy=CRUSHED)
    return ContinuousBatchingPipeline(shallow, scheduler, engine="genai", cache_config=cache)


def ids(length: int) -> ov.Tensor:
    return ov.Tensor(np.random.default_rng(0).integers(0, 1000, (1, length)))


def test_long_prompt_is_crushed_to_what_was_asked(pipe: ContinuousBatchingPipeline) -> None:
    """The blocks that openvino_genai says are in use: those of the kept tokens, and the one that is being filled."""
    handle = pipe.add_request(0, ids(600), max_new_tokens=20, ignore_eos=True)
    used = []
    while pipe.has_non_finished_requests():
        pipe.step()
        used.append(round(pipe.get_metrics().cache_usage * 40 / 100))
    assert max(used) == 600 // 32 + 1
    assert used[-2] == 192 // 32 + 1
    assert len(handle.outputs()[0].generated_ids) == 20
    assert (handle.get_stats().kept_tokens, handle.kept_positions, handle.representative_positions) == (None,) * 3


# Prompts that openvino_genai breaks on; its window of 8 rows would not fit behind the first 32 tokens.
@pytest.mark.parametrize("length", [33, 39])
def test_prompts_that_would_break_it_are_refused(length: int, pipe: ContinuousBatchingPipeline) -> None:
    with pytest.raises(RequestError, match=f"at most sink_tokens = 32 tokens, or at least .* = 40, .* got {length}"):
        pipe.add_request(1, ids(length), max_new_tokens=2)
    assert not pipe.has_non_finished_requests()


@pytest.mark.parametrize("length", [32, 40])
def test_prompts_beside_them_run(length: int, pipe: ContinuousBatchingPipeline) -> None:
    result = pipe.generate(ids(length), max_new_tokens=3, ignore_eos=True)[0]
    assert len(result.m_generation_ids[0]) == 3


def test_several_sequences_are_refused(pipe: ContinuousBatchingPipeline) -> None:
    with pytest.raises(RequestError, match="num_return_sequences must be 1 with a policy and engine='genai'"):
        pipe.add_request(2, ids(50), do_sample=True, num_return_sequences=2)


def test_request_cannot_have_a_policy_of_its_own(pipe: ContinuousBatchingPipeline) -> None:
    with pytest.raises(RequestError, match="policy must be left out of a request with engine='genai'"):
        pipe.add_request(3, ids(50), policy="snapkv")


def test_the_same_prompt_twice_has_the_same_answer(shallow: Path) -> None:
    """Its prefix cache, on by default, would break this together with eviction: so there is none."""
    text = " ".join(f"Day {day}: {day * 13 % 40} fish." for day in range(60))
    pipe = LLMPipeline(shallow, engine="genai", cache_config={"policy": CRUSHED})
    results = [pipe.generate([text], max_new_tokens=24) for _ in range(2)]
    assert results[0].texts == results[1].texts
    assert results[0].kept == [None]
    assert results[0].perf_metrics.kept_tokens is None


def test_pipelines_refuse_what_it_cannot_express(shallow: Path) -> None:
    with pytest.raises(CrushError, match="policy must be one of snapkv, h2o, kvcrush, got 'tova'"):
        LLMPipeline(shallow, engine="genai", cache_config={"policy": "tova"})
    scheduler = {"enable_prefix_caching": True}
    with pytest.raises(CrushError, match="enable_prefix_caching must be False"):
        LLMPipeline(shallow, engine="genai", cache_config={"policy": CRUSHED}, scheduler_config=scheduler)
