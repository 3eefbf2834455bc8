"""From a number of bytes, or a quality, to the plan of one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ov_kvcrush.errors import CrushError, RequestError
from ov_kvcrush.policies.plans.costs import CostTable, cost_table
from ov_kvcrush.policies.plans.geometry import CacheGeometry
from ov_kvcrush.policies.plans.ladder import LADDER
from ov_kvcrush.policies.plans.plan import CachePlan, HeadPlan
from ov_kvcrush.policies.plans.prediction import nearest_rung, predicted_kl, settled_for
from ov_kvcrush.policies.plans.profile import KVProfile
from ov_kvcrush.policies.plans.solver import cheapest_bytes, solve

_SHORT = 1024  # tokens: the recent window of a shorter text takes more than most budgets leave
_DEFAULT_POWER = 0.5  # of a profile without measured plans


class BytePlanner:
    """Plans for the texts of one model.

    profile: None = the ladder. budget: bytes over those of the bf16 cache; or budget_bytes: of a text's whole cache; or
    quality: KL divergence that nine of ten texts are to keep.
    Raises CrushError for a budget that no choice meets, naming the smallest, and for a quality without a profile.
    """

    def __init__(
        self,
        geometry: CacheGeometry,
        num_kv_heads: Sequence[int],
        profile: KVProfile | None = None,
        budget: float | None = None,
        budget_bytes: int = 0,
        quality: float | None = None,
    ) -> None:
        self._geometry = geometry
        self._num_kv_heads = tuple(num_kv_heads)
        self._profile = profile
        self._budget = budget
        self._budget_bytes = budget_bytes
        self._quality = quality
        self._tables: dict[float, CostTable] = {}
        self._plans: dict[tuple[int, int], CachePlan] = {}
        if quality is not None and (profile is None or not profile.rungs):
            raise CrushError(
                f"quality must be asked of a model with a profile, got {quality:g} without one; ov_kvcrush-profile "
                "makes it"
            )
        if budget is not None:
            options = self._table(_DEFAULT_POWER).options if profile else LADDER
            least = cheapest_bytes(geometry.settled_sizes(options)) / geometry.full_settled()
            if budget < least:
                raise CrushError(
                    f"budget must be at least 1/{int(1 / least)} of the bf16 cache, got 1/{1 / budget:.4g}"
                )

    def plan(self, length: int, floor: int = 0) -> CachePlan:
        """For a text of `length` tokens. floor: so many tokens in u8 are within every budget.

        Raises RequestError where budget_bytes are too few, naming the fewest.
        """
        floor = min(floor, length)
        key = length, floor
        if key not in self._plans:
            if len(self._plans) >= 256:  # lengths
                self._plans.clear()
            self._plans[key] = self._solve(length, floor)
        return self._plans[key]

    def plan_of(self, settled: float, excess_power: float) -> CachePlan:
        """The plan of a settled size. Needs a profile."""
        table = self._table(excess_power)
        sizes = self._geometry.settled_sizes(table.options)
        chosen = solve(table.costs, sizes, settled * self._geometry.full_settled())
        return self._made(table.options, chosen)

    def nbytes(self, plan: CachePlan, length: int) -> float:
        """Bytes of a text of `length` tokens under a plan, as the store counts them."""
        return float(np.trace(self._geometry.sizes(plan.flat, length)))  # each head with its own choice

    def settled(self, plan: CachePlan) -> float:
        """Bytes of a token that left the recent window over those of bf16."""
        used = np.trace(self._geometry.settled_sizes(plan.flat))  # each head with its own choice
        return float(used) / self._geometry.full_settled()

    def _table(self, excess_power: float) -> CostTable:
        assert self._profile is not None
        if excess_power not in self._tables:
            self._tables[excess_power] = cost_table(self._profile, excess_power)
        return self._tables[excess_power]

    def _solve(self, length: int, floor: int) -> CachePlan:
        limit = self._budget_bytes or self._limit(length)
        limit = max(limit, self._geometry.sizes([HeadPlan(1.0, "u8", "u8")], floor).sum() if floor else 0.0)
        if self._profile is None:
            return self._from_ladder(length, limit)
        if self._quality is not None:
            settled = settled_for(self._profile, self._quality)
            return self.plan_of(settled, self._power(settled))
        table = self._table(self._power(limit / self._geometry.full_bytes(max(length, _SHORT))))
        sizes = self._geometry.sizes(table.options, length)
        self._check_bytes(sizes, limit, length)
        return self._made(table.options, solve(table.costs, sizes, limit))

    def _limit(self, length: int) -> float:
        """Bytes within the budget. Below `_SHORT` tokens the recent window and as much of the rest for each token."""
        budget = (self._budget or 1.0) * self._geometry.full_bytes(max(length, _SHORT))
        window = min(budget, self._geometry.window_bytes())
        return window + (budget - window) * min(1.0, length / _SHORT)

    def _power(self, settled: float) -> float:
        assert self._profile is not None
        rung = nearest_rung(self._profile, settled)
        return rung.excess_power if rung else _DEFAULT_POWER

    def _made(self, options: Sequence[HeadPlan], chosen: np.ndarray) -> CachePlan:
        plan = CachePlan.of([options[i] for i in chosen], self._num_kv_heads, None, "profile")
        assert self._profile is not None
        return replace(plan, predicted_kl=predicted_kl(self._profile, self.settled(plan)))

    def _from_ladder(self, length: int, limit: float) -> CachePlan:
        """The first rung that fits; where none does, the last."""
        sizes = self._geometry.sizes(LADDER, length).sum(axis=0)
        self._check_bytes(sizes[None, :], limit, length)
        chosen = LADDER[int(np.argmax(sizes <= limit)) if (sizes <= limit).any() else -1]
        return CachePlan.of([chosen] * sum(self._num_kv_heads), self._num_kv_heads, None, "ladder")

    def _check_bytes(self, sizes: np.ndarray, limit: float, length: int) -> None:
        least = cheapest_bytes(sizes)
        if self._budget_bytes and least > limit:
            raise RequestError(
                f"budget_bytes must be at least {int(least)} for a text of {length} tokens, got {self._budget_bytes}"
            )
