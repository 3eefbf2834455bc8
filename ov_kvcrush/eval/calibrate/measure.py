"""A profile of a model: every choice measured on calibration prompts, then plans of some sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ov_kvcrush.config import PRECISIONS
from ov_kvcrush.eval.calibrate import baklava
from ov_kvcrush.eval.calibrate.meter import CacheMeter, CacheVariant, ReadPrompt
from ov_kvcrush.eval.calibrate.prompt_reader import Prompt, PromptReader
from ov_kvcrush.kvcache.planning import geometry_of, precisions_of
from ov_kvcrush.model.fingerprints import model_fingerprint
from ov_kvcrush.policies.base import Budget, BudgetAllocator, Policy
from ov_kvcrush.policies.budgets.head_profile import HeadProfile
from ov_kvcrush.policies.budgets.planned import planned
from ov_kvcrush.policies.budgets.uniform import Uniform
from ov_kvcrush.policies.plans.plan import CachePlan
from ov_kvcrush.policies.plans.planner import BytePlanner
from ov_kvcrush.policies.plans.profile import ALL_CHOICES, HEAD_CHOICES, KVProfile, Rung, TextCosts
from ov_kvcrush.policies.registry import settings_of

RUNGS = (1 / 3, 1 / 4, 1 / 5.5, 1 / 8, 1 / 11, 1 / 16, 1 / 22)  # settled sizes
POWERS = (0.5, 1.0, 1.5)
_BASE = "u8"  # of all that is not varied
_COST_ROWS = 16  # of the answer: costs of choices are means over texts, and rows are most of the time

Told = Callable[[str, int], None]  # what is measured, and how many caches were since the last call


def num_caches(num_heads: int, num_prompts: int) -> int:
    """Caches that a profile measures: what progress counts."""
    of_all = 1 + len(ALL_CHOICES) + len(RUNGS) * len(POWERS) + baklava.NUM_CANDIDATES
    return num_prompts * (of_all + len(HEAD_CHOICES) * num_heads)


def measure_text(reader: PromptReader, prompt: Prompt, told: Told) -> TextCosts:
    """What each choice costs on one prompt."""
    meter, policy, read = reader.meter, reader.policy, reader.read(prompt)
    kept = {name: read.select(keeping(policy, _number(name))) for name in ALL_CHOICES if name.startswith("kept.")}
    base = _measure(read, [CacheVariant(meter.uniform(_BASE, _BASE))], prompt.name, told, _COST_ROWS)[0]
    together = _measure(read, [_in_all(meter, name, kept) for name in ALL_CHOICES], prompt.name, told, _COST_ROWS)
    heads = {}
    for name in HEAD_CHOICES:
        variants = [_in_one(meter, read.num_tokens, name, head, kept) for head in range(meter.num_heads)]
        heads[name] = np.maximum(_measure(read, variants, prompt.name, told, _COST_ROWS) - base, 0.0)
    costs = {name: max(float(kl - base), 0.0) for name, kl in zip(ALL_CHOICES, together, strict=True)}
    return TextCosts(prompt.name, read.num_tokens, len(read.answer.rows[:_COST_ROWS]), heads, costs)


def measure_plans(reader: PromptReader, profile: KVProfile, prompts: Sequence[Prompt], told: Told) -> KVProfile:
    """The profile with plans of some sizes, and BaKlaVa's budgets, on the same prompts.

    Of each size it is the plan of that one of several tables of costs that does best; of budgets likewise.
    """
    meter, policy = reader.meter, reader.policy
    assert meter.model.folder is not None, "a meter loads a folder"
    planner = BytePlanner(geometry_of(meter.model, meter.config), profile.num_kv_heads, profile)
    plans = {(size, power): planner.plan_of(size, power) for size in RUNGS for power in POWERS}
    budgets = baklava.candidates(meter.model.folder, [prompt.ids for prompt in prompts])
    found = []
    for prompt in prompts:
        read = reader.read(prompt)
        variants = [variant_of(read, plan, policy) for plan in plans.values()]
        variants += [baklava_variant(meter, read, policy, budget, baklava.KEPT, (_BASE, _BASE)) for budget in budgets]
        found.append(_measure(read, variants, prompt.name, told))
    kl = np.stack(found, axis=1)
    of_plan = dict(zip(plans, kl, strict=False))
    rungs = []
    for size in RUNGS:
        power = min(POWERS, key=lambda p: float(of_plan[size, p].mean()))
        rungs.append(Rung(of_plan[size, power], planner.settled(plans[size, power]), power))
    best = budgets[int(kl[len(plans) :].mean(axis=1).argmin())]
    return replace(profile, rungs=tuple(rungs), baklava=best)


def baklava_variant(
    meter: CacheMeter, read: ReadPrompt, policy: Policy, heads: HeadProfile, kept: float, precisions: tuple[str, str]
) -> CacheVariant:
    """A cache whose heads keep what BaKlaVa's budgets say."""
    return CacheVariant(meter.uniform(*precisions), read.select(keeping(policy, kept, heads)))


def variant_of(read: ReadPrompt, plan: CachePlan, policy: Policy) -> CacheVariant:
    """The cache that a plan makes of a prompt."""
    chosen = planned(policy, plan)
    kept = read.select(chosen) if chosen.evicts else None
    return CacheVariant(precisions_of(plan), kept)


def empty_profile(
    folder: Path, meter: CacheMeter, policy: Policy, made_with: Mapping[str, Any], use: str = "known"
) -> KVProfile:
    """A profile without texts."""
    heads = tuple(layer.num_kv_heads for layer in meter.model.layers)
    return KVProfile(model_fingerprint(folder), heads, settings_of(policy), (), (), made_with, use=use)


def _measure(
    read: ReadPrompt, variants: Sequence[CacheVariant], name: str, told: Told, num_rows: int | None = None
) -> np.ndarray:
    """float64: the KL divergence of each variant."""
    found = []
    for begin in range(0, len(variants), 16):
        part = variants[begin : begin + 16]
        found += [one.kl for one in read.measure(part, num_rows)]
        told(name, len(part))
    return np.array(found)


def keeping(policy: Policy, fraction: float, allocator: BudgetAllocator | None = None) -> Policy:
    """The policy with a fraction of the tokens and another split than its own: by default each head keeps as much.

    A plan says of each head how much it keeps.
    """
    split: dict[str, Any] = {"allocator": allocator or Uniform()} if hasattr(policy, "allocator") else {}
    return replace(policy, budget=Budget(kept=fraction, min_tokens=policy.budget.min_tokens), **split)


def _number(name: str) -> float:
    return float(name.removeprefix("kept."))


def _in_all(meter: CacheMeter, name: str, kept: Mapping[str, list[np.ndarray]]) -> CacheVariant:
    part, _, value = name.partition(".")
    if part == "kept":
        return CacheVariant(meter.uniform(_BASE, _BASE), kept[name])
    return CacheVariant(meter.uniform(value if part == "key" else _BASE, value if part == "value" else _BASE))


def _in_one(meter: CacheMeter, length: int, name: str, head: int, kept: Mapping[str, list[np.ndarray]]) -> CacheVariant:
    part, _, value = name.partition(".")
    precisions = meter.uniform(_BASE, _BASE)
    if part == "kept":
        every = np.arange(length, dtype=np.int32)
        return CacheVariant(precisions, [kept[name][h] if h == head else every for h in range(meter.num_heads)])
    precisions[head, 0 if part == "key" else 1] = PRECISIONS.index(value)
    return CacheVariant(precisions)
