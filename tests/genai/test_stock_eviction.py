"""Eviction settings of openvino_genai's scheduler config, run by this package's engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as stock
import pytest
from native_stores import require_native

from ov_kvcrush import CrushError, LLMPipeline, SchedulerConfig
from ov_kvcrush.genai.eviction import translate
from ov_kvcrush.genai.stock_eviction import policy_of
from ov_kvcrush.policies.registry import build

Anchor, Mode = stock.KVCrushAnchorPointMode, stock.AggregationMode


def scheduler(mode: Any = Mode.SUM, crush_blocks: int = 0, rotation: bool = False) -> stock.SchedulerConfig:
    found = stock.SchedulerConfig()
    found.use_cache_eviction = True
    crush = stock.KVCrushConfig(crush_blocks, Anchor.MEAN, 3)
    found.cache_eviction_config = stock.CacheEvictionConfig(32, 64, 256, mode, rotation, 16, crush)
    return found


@pytest.mark.parametrize(
    ("mode", "crush_blocks", "name", "own"),
    [
        (Mode.SUM, 0, "h2o", {}),
        (Mode.NORM_SUM, 0, "snapkv", {"window": 16}),
        (Mode.NORM_SUM, 4, "kvcrush", {"window": 16, "share": 1 / 3, "anchor": "mean", "seed": 3}),
        (Mode.SUM, 4, "kvcrush", {"scorer": "h2o", "share": 1 / 3, "anchor": "mean", "seed": 3}),
    ],
)
def test_settings_are_a_policy(mode: Any, crush_blocks: int, name: str, own: dict[str, Any]) -> None:
    tokens = 256 + 32 * crush_blocks
    sizes = {"kept_tokens": tokens, "min_tokens": tokens, "sink_tokens": 32, "recent_tokens": 64}
    assert policy_of(scheduler(mode, crush_blocks).cache_eviction_config) == build(name, **sizes, **own)


@pytest.mark.parametrize("mode", [Mode.SUM, Mode.NORM_SUM])
def test_sizes_survive_the_way_there_and_back(mode: Any) -> None:
    given = scheduler(mode).cache_eviction_config
    sizes = {"kept_tokens": 256, "min_tokens": 256, "sink_tokens": 32, "recent_tokens": 64, "stride": 32}
    there = translate(build("h2o" if mode == Mode.SUM else "snapkv", **sizes))
    assert there is not None
    back = there.config()
    for get in ("get_start_size", "get_recent_size", "get_max_cache_size"):
        assert getattr(back, get)() == getattr(given, get)()


def test_a_pipeline_keeps_as_many_tokens_as_it_is_told(tiny_ir: Callable[[str], Path]) -> None:
    require_native()
    prompt = ov.Tensor(np.random.default_rng(0).integers(3, 100, (1, 700)))
    ask = {"max_new_tokens": 4, "ignore_eos": True}
    folder = tiny_ir("llama")
    told = LLMPipeline(folder, "CPU", scheduler_config=scheduler())
    policy = policy_of(scheduler().cache_eviction_config)
    named = LLMPipeline(folder, "CPU", cache_config={"policy": policy})
    whole = LLMPipeline(folder, "CPU")
    assert told.generate(prompt, **ask).tokens == named.generate(prompt, **ask).tokens
    assert told.generate(prompt, **ask).tokens != whole.generate(prompt, **ask).tokens
    among_properties = LLMPipeline(folder, "CPU", {"scheduler_config": scheduler()})
    assert among_properties.generate(prompt, **ask).tokens == named.generate(prompt, **ask).tokens


def test_what_has_no_counterpart_is_refused(tiny_ir: Callable[[str], Path]) -> None:
    folder = tiny_ir("llama")
    for config, message in (
        (scheduler(rotation=True), "apply_rotation must be False"),
        (scheduler(Mode.ADAPTIVE_RKV), "aggregation_mode must be SUM or NORM_SUM"),
    ):
        with pytest.raises(CrushError, match=message):
            LLMPipeline(folder, "CPU", scheduler_config=config)
    for cache in ({"policy": "snapkv"}, {"budget": "1/4"}):
        with pytest.raises(CrushError, match="use_cache_eviction must be False where cache_config says"):
            LLMPipeline(folder, "CPU", scheduler_config=scheduler(), cache_config=cache)
    sparse = stock.SchedulerConfig()
    sparse.use_sparse_attention = True
    with pytest.raises(CrushError, match="use_sparse_attention must be False"):
        SchedulerConfig.from_options(sparse)
