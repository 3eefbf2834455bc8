"""Plans without a profile: one setting for all heads, from a ladder whose rungs were measured on another model."""

from __future__ import annotations

from ov_kvcrush.policies.plans.plan import HeadPlan

# Best first among those of about the same bytes, by the mean KL of 8 texts of 1,536 tokens (Qwen2.5-Coder-0.5B int8,
# SnapKV): everything stays down to 1/4.7, since a text whose summary is asked for loses most by eviction.
LADDER = (
    HeadPlan(1.0, "u8", "u8"),
    HeadPlan(1.0, "u8", "u4"),
    HeadPlan(1.0, "u4", "u4"),
    HeadPlan(1.0, "u4", "u2"),
    HeadPlan(0.7, "u4", "u2"),
    HeadPlan(0.5, "u4", "u2"),
    HeadPlan(0.35, "u4", "u2"),
    HeadPlan(0.25, "u4", "u2"),
    HeadPlan(0.25, "u2", "u2"),
    HeadPlan(0.12, "u2", "u2"),
)
