"""What models make of attention scores beside softmax, where the exported graph does not say it.

OpenVINO's ScaledDotProductAttention has no soft cap, so an exported graph is without; and its rewrite to PagedAttention
finds the slopes of ALiBi in the masks of some families and silently drops those of others (openvino 2026.4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ov_kvcrush.errors import ModelError
from ov_kvcrush.model.hf_config import head_sizes, pick


@dataclass(frozen=True)
class ScoreTerms:
    """soft_cap: score = soft_cap * tanh(score / soft_cap), 0 = none. alibi_slopes: one per query head, or none: score
    += slope * (position of the token - position of the row), as the graph does not say it."""

    soft_cap: float = 0.0
    alibi_slopes: tuple[float, ...] = ()


def score_terms(config: Mapping[str, Any]) -> ScoreTerms:
    """Read a parsed `config.json`. Raises ModelError for a soft cap that is no positive number."""
    cap = config.get("attn_logit_softcapping") or 0.0
    if not isinstance(cap, (int, float)) or isinstance(cap, bool) or not 0 <= cap < math.inf:
        raise ModelError(f"attn_logit_softcapping must be a positive number, got {cap!r}")
    family, slopes = config.get("model_type"), ()
    if family == "falcon" and config.get("alibi"):
        # Falcon scales the scores with their slopes.
        scale = head_sizes(config)[0] ** -0.5
        slopes = tuple(slope * scale for slope in bloom_slopes(pick(config, "num_heads")))
    elif family == "mpt":
        attention = config.get("attn_config")
        attention = attention if isinstance(attention, Mapping) else {}
        if attention.get("alibi", True):
            slopes = mpt_slopes(pick(config, "num_heads"), attention.get("alibi_bias_max", 8))
    return ScoreTerms(float(cap), slopes)


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
