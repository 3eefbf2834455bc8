"""From a profile to a table of costs: what every option costs every head."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ov_kvcrush.policies.plans.plan import PLAN_PRECISIONS, HeadPlan
from ov_kvcrush.policies.plans.profile import FRACTIONS, KVProfile, TextCosts

_TIE = 2e-6  # nats: of options that cost nothing measurable, the one that changes less is preferred


@dataclass(frozen=True, eq=False)
class CostTable:
    """options: O choices for a head. costs: float64 (N, O), nats."""

    options: tuple[HeadPlan, ...]
    costs: np.ndarray


def cost_table(profile: KVProfile, excess_power: float = 0.5) -> CostTable:
    """Costs of all combinations of fraction, key and value precision, which add up, averaged over the texts.

    Precisions add up over heads as they are measured one by one. Evictions of single heads add up to less than that of
    all at once, by a factor of two to five: they are multiplied by this factor to the power of `excess_power`. A plan
    that evicts in few heads is described best by a small power, one that evicts in all by a large one.
    """
    texts = profile.texts
    key = _precision_costs(texts, "key")
    value = _precision_costs(texts, "value")
    kept = _eviction_costs(texts, excess_power)
    options, columns = [], []
    for fraction in FRACTIONS:
        for k in PLAN_PRECISIONS:
            for v in PLAN_PRECISIONS:
                options.append(HeadPlan(fraction, k, v))
                columns.append(kept[fraction] + key[k] + value[v])
    return CostTable(tuple(options), np.stack(columns, axis=1))


def _mean(texts: Sequence[TextCosts], name: str) -> np.ndarray:
    return np.mean([text.heads[name] for text in texts], axis=0)


def _together(texts: Sequence[TextCosts], name: str) -> float:
    return float(np.mean([text.together[name] for text in texts]))


def _shares(values: np.ndarray) -> np.ndarray:
    total = values.sum()
    return values / total if total > 0 else np.full(len(values), 1 / len(values))


def _precision_costs(texts: Sequence[TextCosts], part: str) -> dict[str, np.ndarray]:
    coarse = _mean(texts, f"{part}.u2")
    costs = {"bf16": np.zeros(len(coarse))}
    for before, name in itertools.pairwise(PLAN_PRECISIONS):
        found = coarse if name == "u2" else _shares(coarse) * _together(texts, f"{part}.{name}")
        costs[name] = np.maximum(found, costs[before] + _TIE)
    return costs


def _eviction_costs(texts: Sequence[TextCosts], excess_power: float) -> dict[float, np.ndarray]:
    measured = {}
    for fraction in (0.5, 0.25, 0.12):
        single = _mean(texts, f"kept.{fraction:g}")
        excess = _together(texts, f"kept.{fraction:g}") / max(single.sum(), 1e-9)
        measured[fraction] = single * max(excess, 1.0) ** excess_power
    shares = _shares(measured[0.5])
    costs = {
        **measured,
        1.0: np.zeros(len(shares)),
        0.7: shares * min(_together(texts, "kept.0.7"), measured[0.5].sum()),
        0.35: np.sqrt(measured[0.5] * measured[0.25]),
    }
    for before, fraction in itertools.pairwise(FRACTIONS):
        costs[fraction] = np.maximum(costs[fraction], costs[before] + _TIE)
    return costs
