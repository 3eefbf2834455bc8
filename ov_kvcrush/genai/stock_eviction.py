"""Eviction settings of openvino_genai as policies of this package."""

from __future__ import annotations

from typing import Any

import openvino_genai as ov_genai

from ov_kvcrush.errors import CrushError
from ov_kvcrush.policies.base import Policy
from ov_kvcrush.policies.registry import build

_BLOCK = 32  # tokens of a page that KVCrush's budget counts
_SCORERS = {"SUM": "h2o", "NORM_SUM": "snapkv"}


def policy_of(config: ov_genai.CacheEvictionConfig) -> Policy:
    """The policy of the same method, sizes and number of kept tokens.

    Each head keeps its own tokens, where openvino_genai keeps the same pages in all heads of a layer; KVCrush compares
    tokens by a bit of each head. Raises CrushError naming a field that has no counterpart here.
    """
    if config.apply_rotation:
        raise CrushError("apply_rotation must be False with engine='crush', where kept tokens stay at their positions")
    mode = config.aggregation_mode.name
    if mode not in _SCORERS:
        raise CrushError(f"aggregation_mode must be SUM or NORM_SUM with engine='crush', got {mode}; policy='rkv' is")
    crush = config.kvcrush_config
    tokens = config.get_max_cache_size() + crush.budget * _BLOCK
    settings: dict[str, Any] = {
        "kept_tokens": tokens,
        "min_tokens": tokens,
        "sink_tokens": config.get_start_size(),
        "recent_tokens": config.get_recent_size(),
    }
    scorer = _SCORERS[mode]
    if scorer == "snapkv":
        settings["window"] = config.snapkv_window_size
    if not crush.budget:
        return build(scorer, **settings)
    anchor = crush.anchor_point_mode.name.lower()
    share = crush.budget * _BLOCK / tokens
    return build("kvcrush", scorer=scorer, share=share, anchor=anchor, seed=crush.rng_seed, **settings)
