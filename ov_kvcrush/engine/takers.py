"""One reading of a prompt for many: each taker has a policy that chooses from it, and a memory for what was chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ov_kvcrush.errors import RequestError
from ov_kvcrush.pipelines.backend import CacheParams, FanOut

if TYPE_CHECKING:
    from ov_kvcrush.core.request import Sequence
    from ov_kvcrush.kvcache.eviction import Choice, EvictionSpec
    from ov_kvcrush.kvcache.manager import KVCacheManager


@dataclass(frozen=True, eq=False)
class FanOutTarget:
    """Who takes KV of a prompt that somebody else's request reads.

    eviction: None = all tokens. memory: with the staging blocks that the prompt is read on.
    """

    eviction: EvictionSpec | None
    memory: KVCacheManager


def takers_of(
    cache: CacheParams, num_tokens: int, memory: KVCacheManager, make: Callable[[FanOut], FanOutTarget]
) -> tuple[FanOutTarget, ...]:
    """Those of a prompt of `num_tokens` that is read into `memory`. Raises RequestError where one reading cannot do."""
    if not cache.others:
        return ()
    if not cache.prefill_only or cache.context is not None:
        raise RequestError("others must choose from a prompt that is only read, got a request for an answer")
    if num_tokens > memory.staged_tokens:
        raise RequestError(
            f"prompt must fit into the staging blocks of {memory.staged_tokens} tokens to be read once for several "
            f"policies, got {num_tokens} tokens; raise staging_bytes"
        )
    found = tuple(make(other) for other in cache.others)
    replays = {x.eviction.policy.inputs.replay for x in found if x.eviction and x.eviction.policy.inputs.replay}
    if len(replays) > 1:
        raise RequestError(f"policies must agree on how a text is read again, got {', '.join(map(str, replays))}")
    return found


def commit_for_each(staged: Sequence, choose: Callable[[EvictionSpec | None], Choice | None]) -> None:
    """Give each taker of a staged prompt what it wants, in their order: `Request.held_others`.

    Staged keys and values are as they were computed, so takers of the same policy get the same choice, whatever the
    precisions of their stores. Raises StoreFull where one has no room; those before it have taken theirs.
    """
    request = staged.request
    choices: dict[EvictionSpec | None, Choice | None] = {}
    for taker in request.takers:
        eviction = taker.eviction
        if eviction not in choices:
            choices[eviction] = choose(eviction)
        policy = eviction.policy if eviction else None
        request.held_others.append(taker.memory.take(staged, policy, choices[eviction]))
