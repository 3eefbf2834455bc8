"""What models make of attention scores beside softmax, where the graph does not say it.

OpenVINO's ScaledDotProductAttention has no soft cap, so an exported graph is without; and its rewrite to PagedAttention
finds slopes of ALiBi and sliding windows in the masks of most families and silently drops those of others (openvino
2026.4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ov_kvcrush.errors import ModelError
from ov_kvcrush.model.hf_config import head_sizes, pick, sliding_windows_of


@dataclass(frozen=True)
class ScoreTerms:
    """soft_cap: score = soft_cap * tanh(score / soft_cap), 0 = none. alibi_slopes: one per query head, or none: score
    += slope * (position of the token - position of the row). windows: tokens that a row of each layer sees, 0 = all; or
    none, where the graph says it."""

    soft_cap: float = 0.0
    alibi_slopes: tuple[float, ...] = ()
    windows: tuple[int, ...] = ()


def score_terms(config: Mapping[str, Any]) -> ScoreTerms:
    """Read a parsed `config.json`. Raises ModelError for a soft cap that is no positive number."""
    cap = config.get("attn_logit_softcapping") or 0.0
    if not isinstance(cap, (int, float)) or isinstance(cap, bool) or not 0 <= cap < math.inf:
        raise ModelError(f"attn_logit_softcapping must be a positive number, got {cap!r}")
    family = config.get("model_type")
    slopes: tuple[float, ...] = ()
    if family == "falcon" and config.get("alibi"):
        # Falcon scales the scores with their slopes.
        scale = head_sizes(config)[0] ** -0.5
        slopes = tuple(slope * scale for slope in bloom_slopes(pick(config, "num_heads")))
    elif family == "mpt":
        attention = config.get("attn_config")
        attention = attention if isinstance(attention, Mapping) else {}
        if attention.get("alibi", True):
            slopes = mpt_slopes(pick(config, "num_heads"), attention.get("alibi_bias_max", 8))
    windows: tuple[int, ...] = ()
    if family == "gpt_neo":
        windows = tuple(window or 0 for window in sliding_windows_of(config, pick(config, "num_layers")))
    return ScoreTerms(float(cap), slopes, windows)


def bloom_slopes(num_heads: int) -> tuple[float, ...]:
    """Press et al., "Train Short, Test Long", arXiv 2108.12409: 2^(-8 i / n) for a power of two of heads.

    Of other numbers: those of the power of two below, then every other one of twice that.
    """
    power = 1 << num_heads.bit_length() - 1
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(num_heads - power)]
    return tuple(slopes)


def mpt_slopes(num_heads: int, bias_max: float) -> tuple[float, ...]:
    """MPT takes other numbers of heads from the power of two above: every second slope, then those between."""
    power = 1 << (num_heads - 1).bit_length()
    slopes = [2.0 ** (-bias_max * (i + 1) / power) for i in range(power)]
    if power != num_heads:
        slopes = (slopes[1::2] + slopes[::2])[:num_heads]
    return tuple(slopes)
