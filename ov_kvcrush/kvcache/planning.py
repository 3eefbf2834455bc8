"""The planner of a cache: its geometry, its profile, and plans in the terms of the store."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np

from ov_kvcrush import native
from ov_kvcrush.config import DEFAULT_BUDGET, PRECISIONS, CacheConfig, parse_budget
from ov_kvcrush.core.eviction import Choice
from ov_kvcrush.errors import CrushError, RequestError
from ov_kvcrush.model.fingerprints import model_fingerprint
from ov_kvcrush.model.load import LoadedModel
from ov_kvcrush.policies.base import DefaultBudget, Policy
from ov_kvcrush.policies.keep_all import KeepAll
from ov_kvcrush.policies.plans.geometry import CacheGeometry
from ov_kvcrush.policies.plans.plan import CachePlan
from ov_kvcrush.policies.plans.planner import BytePlanner
from ov_kvcrush.policies.plans.prediction import FEWEST_TEXTS
from ov_kvcrush.policies.plans.profile import PROFILE_NAME, UNKNOWN_PROFILE_NAME, KVProfile, read_profile
from ov_kvcrush.policies.registry import as_policy

_log = logging.getLogger(__name__)
_NO_PROFILE = (
    "the budget is met by one setting for all KV heads: no %s beside the model; ov_kvcrush-profile makes one, which "
    "loses less in as many bytes",
    PROFILE_NAME,
)
_FEW_TEXTS = (
    "quality is kept by about %d of %d texts, not by nine of ten: the profile has %d calibration prompts; "
    "ov_kvcrush-profile --texts %d makes a better one"
)

_MOST_PLANNERS = 32  # budgets that requests name
LEAST_TOKENS = 36  # sinks and recent tokens, which always stay


def precisions_of(plan: CachePlan) -> np.ndarray:
    """uint8 (heads, 2): the codecs of keys and values of each head: the store numbers them as PRECISIONS does."""
    return np.array([(PRECISIONS.index(head.key), PRECISIONS.index(head.value)) for head in plan.flat], np.uint8)


def same_precisions(pair: tuple[str, str], num_heads: int) -> np.ndarray:
    """uint8 (heads, 2): the codecs of one pair of keys and values for all heads."""
    return np.tile(np.array([[PRECISIONS.index(part) for part in pair]], np.uint8), (num_heads, 1))


def tiers_of(choice: Choice | None) -> dict[str, np.ndarray]:
    """The store's arguments for a choice with tiers; none for one without. precisions: uint8 (heads, tiers, 2)."""
    if choice is None or choice.tiers is None:
        return {}
    pairs = np.array([[PRECISIONS.index(part) for part in pair] for pair in choice.precisions], np.uint8)
    return {"precisions": np.tile(pairs, (len(choice.offsets) - 1, 1, 1)), "tiers": choice.tiers}


def recent_precision(model: LoadedModel, config: CacheConfig) -> str:
    """Of the newest tokens in the store: what the model computes in, but f32 only beside keys or values in f32.

    Where a CPU computes in f32 a recent window of 48 tokens would take a fifth of all bytes at 1/8 of 4,000 tokens,
    to spare 2 % of the tokens a rounding that is finer than that of u8.
    """
    exact = "f32" in (config.key_precision, config.value_precision)
    return "bf16" if model.recent_precision == "f32" and not exact else model.recent_precision


def geometry_of(model: LoadedModel, config: CacheConfig) -> CacheGeometry:
    """What options take in the store of this model."""

    def tile_bytes(key: str, value: str, head_size: int) -> int:
        return native.tile_bytes(key, value, head_size, math.gcd(config.group_size, head_size))

    def more_bytes(head_size: int) -> int:  # a mean, and a list of positions
        plain = native.tile_bytes("u8", "u8", head_size, 16)
        return native.tile_bytes("u8", "u8", head_size, 16, listed=True, with_mean=True) - plain

    more = {} if config.recall_tokens is None else {"more_bytes": more_bytes}
    sizes = tuple(layer.head_size for layer in model.layers for _ in range(layer.num_kv_heads))
    return CacheGeometry(sizes, recent_precision(model, config), config.recent_tokens, LEAST_TOKENS, tile_bytes, **more)


def find_profile(model: LoadedModel, config: CacheConfig, use: str = "known") -> KVProfile | None:
    """The profile that the config names, or that of a use beside the model: for "unknown" else that for "known".

    Raises CrushError for one that does not fit.
    """
    names = (PROFILE_NAME,) if use == "known" else (UNKNOWN_PROFILE_NAME, PROFILE_NAME)
    found = (path for name in names if (path := _beside(model, name)))
    path = next(found, None) if config.profile is None else Path(config.profile)
    if path is None:
        return None
    if model.folder is None:
        raise CrushError("profile must be of a model in a folder, got a model without one")
    heads = tuple(layer.num_kv_heads for layer in model.layers)
    return read_profile(path, model_fingerprint(model.folder), heads)


def _beside(model: LoadedModel, name: str) -> Path | None:
    path = model.folder / name if model.folder is not None else None
    return path if path is not None and path.is_file() else None


def default_policy(profile: KVProfile | None) -> Policy:
    """Which tokens stay where nobody says: as for the profile, else KVCrush."""
    policy = as_policy(dict(profile.policy) if profile else "kvcrush")
    assert policy is not None
    return policy


def make_planner(model: LoadedModel, config: CacheConfig, profile: KVProfile | None) -> BytePlanner | None:
    """None where the config asks for no plan. Says once if it goes by the ladder. Raises CrushError."""
    if not config.is_planned:
        return None
    if model.attention != "crush":
        raise CrushError("budget must be left out where the native library is missing: nothing is compressed then")
    assert config.budget is None or isinstance(config.budget, float)
    planner = BytePlanner(
        geometry_of(model, config), _heads(model), profile, config.budget, config.budget_bytes, config.quality
    )
    if profile is None:
        _log.warning(*_NO_PROFILE)
    elif config.quality is not None and (texts := len(profile.rungs[0].kl)) < FEWEST_TEXTS:
        _log.warning(_FEW_TEXTS, texts, texts + 1, texts, FEWEST_TEXTS)
    return planner


def make_context_planner(model: LoadedModel, config: CacheConfig, planner: BytePlanner | None) -> BytePlanner | None:
    """For texts that are compressed before their question: by a profile of this use beside the model, else `planner`.

    Raises CrushError.
    """
    if planner is None or config.profile is not None or _beside(model, UNKNOWN_PROFILE_NAME) is None:
        return planner
    return make_planner(model, config, find_profile(model, config, "unknown"))


class DefaultPlans:
    """Plans of requests whose policy names no budget, at DEFAULT_BUDGET. The profile is read when the first one comes.

    Raises CrushError then for a profile beside the model that is not the model's.
    """

    def __init__(self, model: LoadedModel, config: CacheConfig) -> None:
        self._model = model
        self._config = config
        self._is_off = model.attention != "crush" or not config.has_default_budget
        self._planners: dict[tuple[str, float], BytePlanner] = {}  # by use and budget

    def plan(self, policy: Policy, num_tokens: int, use: str) -> CachePlan | None:
        """By the profile of a use; None where the policy's own budget holds, or the prompt is short."""
        least = policy.budget.min_tokens
        if self._is_off or not isinstance(policy.budget, DefaultBudget) or num_tokens <= least:
            return None
        return self._planner(use, parse_budget(DEFAULT_BUDGET)).plan(num_tokens, least)

    def plan_within(self, budget: float, policy: Policy | None, num_tokens: int, use: str) -> CachePlan:
        """The plan of a request that names its own budget. Raises RequestError where none can be met."""
        if policy is None or isinstance(policy, KeepAll):
            raise RequestError(f"budget must come with a policy that evicts, got {budget:g} with none")
        if not isinstance(policy.budget, DefaultBudget):
            raise RequestError("budget must be left out where policy says how much stays, got both")
        if self._model.attention != "crush" or (self._config.key_precision, self._config.value_precision) != (
            "u8",
            "u8",
        ):
            raise RequestError(
                f"budget must be left out where precisions are given or there is no store, got {budget:g}"
            )
        return self._planner(use, budget).plan(num_tokens)

    def _planner(self, use: str, budget: float) -> BytePlanner:
        key = use, budget
        if key not in self._planners:
            profile = find_profile(self._model, self._config, use)
            geometry = geometry_of(self._model, self._config)
            made = BytePlanner(geometry, _heads(self._model), profile, budget)
            if len(self._planners) >= _MOST_PLANNERS:
                self._planners.clear()
            self._planners[key] = made
            if profile is None:  # nobody asked for a budget: no warning
                _log.info(*_NO_PROFILE)
        return self._planners[key]


def _heads(model: LoadedModel) -> list[int]:
    return [layer.num_kv_heads for layer in model.layers]
