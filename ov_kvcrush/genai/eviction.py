"""Cache eviction of openvino_genai: what of our policies it can be told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openvino_genai as ov_genai

from ov_kvcrush.errors import CrushError, RequestError
from ov_kvcrush.policies.base import Policy
from ov_kvcrush.policies.budgets.uniform import Uniform
from ov_kvcrush.policies.kvcrush.policy import KVCrush
from ov_kvcrush.policies.scorers.h2o import H2O
from ov_kvcrush.policies.scorers.snapkv import SnapKV
from ov_kvcrush.policies.top_scores import TopScores

Mode = ov_genai.AggregationMode

_CPU_BLOCK, _GPU_BLOCK = 32, 16  # tokens
_ANCHORS = {
    "random": ov_genai.KVCrushAnchorPointMode.RANDOM,
    "zeros": ov_genai.KVCrushAnchorPointMode.ZEROS,
    "ones": ov_genai.KVCrushAnchorPointMode.ONES,
    "mean": ov_genai.KVCrushAnchorPointMode.MEAN,
    "alternating": ov_genai.KVCrushAnchorPointMode.ALTERNATING,
}


@dataclass(frozen=True)
class GenaiEviction:
    """Settings of openvino_genai's eviction; sizes in tokens, multiples of `block`.

    max_cache_size: first and recent tokens and those between them that scored best. window: query rows of the prompt
    that give the first scores. crush_blocks: blocks that KVCrush keeps beside these, 0 = none.
    """

    block: int
    start_size: int
    recent_size: int
    max_cache_size: int
    window: int
    aggregation: ov_genai.AggregationMode
    crush_blocks: int = 0
    anchor: str = "random"
    seed: int = 0

    @property
    def name(self) -> str:
        """Of our policy of the same method."""
        if self.crush_blocks:
            return KVCrush.name
        return H2O.name if self.aggregation == Mode.SUM else SnapKV.name

    @property
    def kept_tokens(self) -> int:
        """Tokens that stay, but those of the last block that is not full."""
        return self.max_cache_size + self.crush_blocks * self.block

    def config(self) -> ov_genai.CacheEvictionConfig:
        """The same for openvino_genai."""
        crush = ov_genai.KVCrushConfig(self.crush_blocks, _ANCHORS[self.anchor], self.seed)
        sizes = (self.start_size, self.recent_size, self.max_cache_size)
        return ov_genai.CacheEvictionConfig(*sizes, self.aggregation, False, self.window, crush)

    def added_to(self, scheduler: ov_genai.SchedulerConfig, *, is_default: bool) -> ov_genai.SchedulerConfig:
        """The same scheduler with this eviction. is_default: nobody asked for its prefix cache, so it may go.

        Raises CrushError if the prefix cache was asked for, or if there is eviction already.
        """
        if scheduler.use_cache_eviction:
            raise CrushError("policy must be left out where scheduler_config has use_cache_eviction, got both")
        if scheduler.enable_prefix_caching and not is_default:
            raise CrushError(
                "enable_prefix_caching must be False with a policy and engine='genai', which would answer differently "
                "when it sees a prompt again, got True"
            )
        changed = ov_genai.SchedulerConfig()
        for name in scheduler_fields(scheduler):
            setattr(changed, name, getattr(scheduler, name))
        changed.enable_prefix_caching = False
        changed.use_cache_eviction = True
        changed.cache_eviction_config = self.config()
        return changed

    def check_request(self, num_tokens: int, config: ov_genai.GenerationConfig) -> None:
        """Raise RequestError for a request that openvino_genai breaks on, and all others with it."""
        for name in ("num_return_sequences", "num_beams"):
            if getattr(config, name) > 1:
                raise RequestError(
                    f"{name} must be 1 with a policy and engine='genai', which loses track of blocks that sequences "
                    f"share, got {getattr(config, name)}"
                )
        end = self.start_size + self.window
        if self.aggregation == Mode.NORM_SUM and self.start_size < num_tokens < end:
            raise RequestError(
                f"prompt must have at most sink_tokens = {self.start_size} tokens, or at least sink_tokens + window = "
                f"{end}, with this policy and engine='genai', got {num_tokens}"
            )


def scheduler_fields(scheduler: ov_genai.SchedulerConfig) -> list[str]:
    """Names of the settings of openvino_genai's scheduler."""
    return [n for n in dir(scheduler) if not n.startswith("_") and not callable(getattr(scheduler, n))]


def block_size(device: str) -> int:
    """Tokens of a block of openvino_genai's cache."""
    return _GPU_BLOCK if device.upper().startswith("GPU") else _CPU_BLOCK


def translate(policy: Policy | None, device: str = "CPU") -> GenaiEviction | None:
    """What openvino_genai has for a policy, or None if all tokens stay.

    These are its own SnapKV, H2O and KVCrush: they drop whole blocks, the same for all heads of a layer, by scores that
    are pooled its own way. KVCrush with pages of a block and page_rule="genai" is the same method here and there.
    Raises CrushError naming each field that it cannot express.
    """
    if policy is None or not policy.evicts:
        return None
    block = block_size(device)
    problems = list(_problems(policy, block))
    if problems:
        raise CrushError(f"{'; '.join(problems)} (what openvino_genai can express, with engine='genai')")
    assert policy.budget.kept_tokens is not None
    return _of(policy, policy.budget.kept_tokens, (policy.sink_tokens, policy.recent_tokens), block)


def closest_genai_eviction(policy: Policy, tokens: int) -> GenaiEviction:
    """What comes closest to `policy` with a budget of `tokens` on a CPU: as many, rounded down to whole blocks.

    KVCrush stays KVCrush, whatever its settings; any other policy is openvino_genai's plain eviction.
    Raises CrushError for fewer tokens than that takes.
    """
    block = block_size("CPU")
    start, recent = (max(1, -(-size // block)) * block for size in (policy.sink_tokens, policy.recent_tokens))
    found = _of(policy, tokens // block * block, (start, recent), block)
    if found.max_cache_size < start + recent + block:
        least = start + recent + (1 + found.crush_blocks) * block
        raise CrushError(f"kept tokens must be at least {least} for openvino_genai's eviction, got {tokens}")
    return found


def _of(policy: Policy, tokens: int, sizes: tuple[int, int], block: int) -> GenaiEviction:
    """sizes: first and recent tokens."""
    scorer: Any = getattr(policy, "scorer", None)
    crush = policy if isinstance(policy, KVCrush) else None
    crush_blocks = int(crush.share * tokens + 0.5) // block if crush else 0
    return GenaiEviction(
        block=block,
        start_size=sizes[0],
        recent_size=sizes[1],
        max_cache_size=tokens - crush_blocks * block,
        window=getattr(scorer, "window", SnapKV.window),
        # SnapKV: the sum, divided by the rows that saw a token.
        aggregation=Mode.SUM if isinstance(scorer, H2O) else Mode.NORM_SUM,
        crush_blocks=crush_blocks,
        anchor=crush.anchor if crush and crush.anchor in _ANCHORS else "mean",
        seed=crush.seed if crush else 0,
    )


def _problems(policy: Policy, block: int) -> Iterator[str]:
    """What openvino_genai cannot express of a policy that evicts, as rules that are broken."""
    if not isinstance(policy, (TopScores, KVCrush)) or type(policy.scorer) not in (SnapKV, H2O):
        name = policy.scorer.name if isinstance(policy, (TopScores, KVCrush)) else policy.name
        field = "scorer" if isinstance(policy, KVCrush) else "policy"
        yield f"{field} must be one of snapkv, h2o{', kvcrush' if field == 'policy' else ''}, got {name!r}"
        return
    if not isinstance(policy.allocator, Uniform):
        yield f"split must be 'uniform', got {policy.allocator.name!r}"
    yield from _size_problems(policy, block)
    if isinstance(policy, KVCrush):
        yield from _crush_problems(policy, block)
    yield from _scorer_problems(policy.scorer, exact=isinstance(policy, KVCrush))


def _size_problems(policy: Policy, block: int) -> Iterator[str]:
    for name in ("sink_tokens", "recent_tokens"):
        size = getattr(policy, name)
        if size < block or size % block:
            yield f"{name} must be a multiple of {block} and at least {block}, got {size}"
    if policy.stride != block:
        yield f"stride must be {block}, as it evicts whenever a block is full, got {policy.stride}"
    kept, least = policy.budget.kept_tokens, policy.budget.min_tokens
    if kept is None:
        yield f"kept_tokens must be given, as its sizes are tokens, got kept={policy.budget.kept}"
        return
    if kept % block:
        yield f"kept_tokens must be a multiple of {block}, got {kept}"
    if least > kept:
        yield f"min_tokens must be at most kept_tokens={kept}, as it has no floor, got {least}"
    found = _of(policy, kept, (policy.sink_tokens, policy.recent_tokens), block)
    needed = policy.sink_tokens + policy.recent_tokens + (1 + found.crush_blocks) * block
    if kept < needed:
        more = f" and {found.crush_blocks} of representatives" if found.crush_blocks else ""
        yield f"kept_tokens must be at least {needed}: sink_tokens, recent_tokens, one block{more}; got {kept}"


def _crush_problems(policy: KVCrush, block: int) -> Iterator[str]:
    for name, only in (("page", block), ("page_rule", "genai"), ("share_mode", "static")):
        if getattr(policy, name) != only:
            yield f"{name} must be {only!r}, got {getattr(policy, name)!r}"
    if policy.anchor not in _ANCHORS:
        yield f"anchor must be one of {', '.join(_ANCHORS)}, got {policy.anchor!r}"
    if policy.seed >= 1 << 32:
        yield f"seed must be below 2^32, got {policy.seed}"


def _scorer_problems(scorer: Any, *, exact: bool) -> Iterator[str]:
    """exact: our policy pools as openvino_genai does, beside what its scorer pools."""
    if not isinstance(scorer, SnapKV):
        return
    default = SnapKV(pooling="none") if exact else SnapKV()
    for name in ("pooling", "kernel", "aggregate", "reduce"):
        value, only = getattr(scorer, name), getattr(default, name)
        if value != only:
            yield f"{name} must be {only!r}, as it pools its own way, got {value!r}"
