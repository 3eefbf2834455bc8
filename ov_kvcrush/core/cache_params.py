"""What one request wants of the KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ov_kvcrush.core.eviction import NO_REPLAY_PROMPT, Choice, EvictionSpec, ReplayPrompt
from ov_kvcrush.core.snapshot import KVSnapshot
from ov_kvcrush.core.staged_prompt import StagedPrompt
from ov_kvcrush.policies.base import Policy

Span = tuple[int, int]  # [begin, end) of a prompt's tokens


class KVTarget(Protocol):
    """An engine that takes KV of a prompt which it, or one that shares its staging blocks, has prefilled."""

    def commit_snapshot(
        self, blocks: np.ndarray, num_tokens: int, eviction: EvictionSpec | None, choice: Choice | None
    ) -> KVSnapshot: ...


@dataclass(frozen=True, eq=False)
class FanOut:
    """One of several caches that are made from one prefill: what `policy` keeps, in the store of `target`.

    target: an engine; None = the one that prefills. asks: whether the prompt ends with its question, which says by
    which profile plans are made.
    """

    policy: Policy
    target: KVTarget | None = None
    asks: bool = False


@dataclass(frozen=True)
class CacheParams:
    """What one request wants of the KV cache; beside SamplingParams.

    policy: which tokens stay, None = as the engine was told.
    protect: what must stay: passages of the prompt and spans [begin, end) of its tokens.
    system: the span of the system prompt, which stays too; it need not fit the policy's budget.
    keep_kv: leave the KV in the prefix cache for a prompt that continues this one.
    replay_prompt: for policies that read the prompt twice.
    context: KV that the first tokens of the prompt have already; the policy chooses from what follows.
    return_snapshot: hand the KV out at the end, as `Handle.snapshot`.
    prefill_only: end when the prompt has its KV, without a token; implies return_snapshot.
    budget: bytes over those of a bf16 cache, instead of what the engine was told; needs a policy.
    cache_salt: cached prefixes and compiled grammars serve only requests of the same one, as vLLM has it: who may not
        know by its timing what another has asked gets another.
    fan_out: caches that are made from the same prefill, `Handle.fan_out_snapshots`; needs prefill_only, and no
        snapshot of the request itself is left then.
    return_staged: leave the prompt on its staging blocks, `Handle.staged`, and nothing else; needs prefill_only.
    staged: such a prompt, which this one of a fan_out begins with and need not read.
    An engine takes spans only: `prompts.spans.resolve` turns texts into them.
    """

    policy: Policy | None = None
    protect: tuple[str | Span, ...] = ()
    system: Span | None = None
    keep_kv: bool = False
    replay_prompt: ReplayPrompt = NO_REPLAY_PROMPT
    context: KVSnapshot | None = None
    return_snapshot: bool = False
    prefill_only: bool = False
    budget: float | None = None
    cache_salt: str = ""
    fan_out: tuple[FanOut, ...] = ()
    return_staged: bool = False
    staged: StagedPrompt | None = None

    @property
    def spans(self) -> tuple[Span, ...]:
        """Protected spans of a resolved request, the system prompt's among them."""
        spans = tuple(x for x in (*self.protect, self.system) if isinstance(x, tuple))
        assert len(spans) == len(self.protect) + (self.system is not None), "spans of unresolved CacheParams"
        return spans


DEFAULT_CACHE_PARAMS = CacheParams()
