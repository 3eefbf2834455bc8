"""Eviction as data: what a request asks for, what is left of its cache, and one choice of a policy."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np

from ov_kvcrush.errors import RequestError
from ov_kvcrush.policies.base import Policy
from ov_kvcrush.policies.plans.plan import CachePlan

_TILE = 32  # tokens: what a head's last, partly filled tile can hold beyond its tokens
PerHead = list[list[np.ndarray]]  # [layer][KV head]


def _no_tokens() -> np.ndarray:
    return np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class ReplayPrompt:
    """Token ids int64 (n,) between a text and its repetition, for policies that read a prompt twice. All may be empty.

    first: "repeat this". again: "repeat this from the place where it says", which the last tokens before the chunk
    follow. answer: what begins the model's turn.
    """

    first: np.ndarray = field(default_factory=_no_tokens)
    again: np.ndarray = field(default_factory=_no_tokens)
    answer: np.ndarray = field(default_factory=_no_tokens)


NO_REPLAY_PROMPT = ReplayPrompt()


@dataclass(frozen=True)
class EvictionSpec:
    """How one request has its cache evicted from. spans: [begin, end) of the prompt that stay.

    replay_prompt, num_prompt_tokens: for a policy that reads the prompt twice.
    base: tokens of a context that the prompt begins with and that the policy does not choose from; the budget is for
    what follows. base_kept: what a head holds of these, on average. begun: what a head holds of the context behind
    the base when the request starts, on average. plan: shares the policy's budget, and says in which precisions.
    """

    policy: Policy
    spans: tuple[tuple[int, int], ...] = ()
    replay_prompt: ReplayPrompt = NO_REPLAY_PROMPT
    num_prompt_tokens: int = 0
    base: int = 0
    base_kept: int = 0
    begun: int = 0
    plan: CachePlan | None = None

    @property
    def window(self) -> int:
        """Query rows to be captured: none where a plan keeps all tokens."""
        return self.policy.inputs.window if self.policy.evicts else 0

    @property
    def head(self) -> int:
        """Tokens at the front that always stay, such as a system prompt."""
        return max((end for begin, end in self.spans if begin == 0), default=0)

    def peak_of_heads(self, length: int, chunk: int, num_evicted: int = 0) -> np.ndarray | None:
        """int64 (heads,): as `peak_tokens` for each head of a plan; None without a plan."""
        if self.plan is None:
            return None
        mean = self.policy.budget.tokens(length - self.base)
        more = max(self.peak_tokens(length, chunk, num_evicted) - self.base_kept - mean, 0)
        kept = self.plan.tokens(length - self.base, 0) * mean // max(int(self.plan.mean_kept * (length - self.base)), 1)
        return np.minimum(length, self.base_kept + np.minimum(kept, length - self.base) + more + 1)

    def check(self, num_tokens: int) -> None:
        """Raise RequestError for a budget below what must stay of a prompt."""
        budget = self.policy.budget.tokens(num_tokens - self.base)
        always = self._always(num_tokens)
        if self.spans and budget < always:
            raise RequestError(
                f"kept tokens must be at least the protected ones, {always} with sinks, recent tokens and spans, "
                f"got a budget of {budget}"
            )

    def _always(self, length: int) -> int:
        """Protected tokens of what a policy is asked about."""
        return int(self.policy.protected(length, self.spans)[self.base :].sum())

    def num_read_again(self, num_tokens: int) -> int:
        """Tokens of a fresh prompt that are read a second time."""
        wants_replay = self.policy.inputs.replay is not None and not self.base
        return num_tokens - self.head if wants_replay and self.wants(num_tokens, num_tokens, is_read=True) else 0

    def peak_tokens(self, length: int, chunk: int, num_evicted: int = 0) -> int:
        """The most tokens a head holds, on average, while a text of `length` is prefilled in chunks.

        num_evicted: tokens that the context it starts from has lost.
        """
        if self.policy.inputs.replay and (self.base or num_evicted):  # nothing is read twice: all that is new stays
            return length - num_evicted
        policy, length = self.policy, length - self.base
        always = policy.sink_tokens + policy.recent_tokens + sum(end - begin for begin, end in self.spans)
        if policy.inputs.replay:  # what comes after the prompt all stays
            read = min(length, self.num_prompt_tokens)
            kept = max(policy.budget.tokens(read), policy.budget.min_tokens, always)
            return self.base_kept + min(length, kept + length - read + _TILE)
        least = max(policy.budget.tokens(length), policy.budget.min_tokens, always, self.begun)
        return self.base_kept + min(length, least + chunk + policy.stride + _TILE)

    def wants(self, length: int, cached: int, *, is_read: bool) -> bool:
        """Whether to choose now. cached: tokens a head holds on average. is_read: the prompt has just been read."""
        budget, spare = self.policy.budget, 0 if is_read else self.policy.stride
        num_tokens, cached = length - self.base, cached - self.base_kept
        if not is_read and self.policy.inputs.replay:  # what came since was not read twice
            return False
        if num_tokens <= budget.min_tokens or cached - budget.tokens(num_tokens) <= spare:
            return False
        # More may be protected than the budget has: what cannot go is no reason to choose again.
        return cached - max(budget.tokens(num_tokens), self._always(length)) > spare


def check_spans(spans: Items[tuple[int, int]], num_tokens: int) -> None:
    """Raise RequestError for spans [begin, end) outside of a prompt."""
    for begin, end in spans:
        if not 0 <= begin < end <= num_tokens:
            raise RequestError(
                f"protect must be spans (begin, end) with 0 <= begin < end <= {num_tokens}, the prompt's tokens, "
                f"got ({begin}, {end})"
            )


@dataclass(frozen=True, eq=False)
class EvictionState:
    """What policies left of a sequence's cache; forks share it.

    num_evicted: tokens that a head lost, on average. num_choices: how often a policy chose. positions: int32, kept at
    the last choice, ascending. policy_state: float32, what the policy stored for these positions. representatives:
    positions that the last choice kept to stand for others.
    """

    num_evicted: int = 0
    num_choices: int = 0
    positions: PerHead = field(default_factory=list)
    policy_state: PerHead | None = None
    representatives: PerHead | None = None

    @property
    def length(self) -> int:
        """Tokens of the text at the last choice."""
        sizes = [len(x) for layer in self.positions for x in layer]
        return self.num_evicted + sum(sizes) // max(len(sizes), 1)

    def positions_of(self, length: int) -> PerHead | None:
        """What is there of a text of `length` tokens, with all since the last choice; None if there was no choice."""
        if not self.positions:
            return None
        newer = np.arange(self.length, length, dtype=np.int32)
        return [[np.concatenate([x, newer]) for x in layer] for layer in self.positions]

    def holds(self, spans: Items[tuple[int, int]], length: int) -> bool:
        """Whether every head still has all of these spans of a text of `length` tokens."""
        positions = self.positions_of(length) if spans else None
        if positions is None:
            return True
        wanted = np.zeros(length, bool)
        for begin, end in spans:
            wanted[begin:end] = True
        count = int(wanted.sum())
        return all(int(wanted[head].sum()) == count for layer in positions for head in layer)


@dataclass(frozen=True)
class Choice:
    """A selection in the store's terms: indices (n,) int32 of head h are those from offsets[h] to offsets[h + 1].

    tiers: uint8 (n,), None = all alike. precisions: keys and values of each tier.
    """

    offsets: np.ndarray
    indices: np.ndarray
    state: EvictionState
    tiers: np.ndarray | None = None
    precisions: tuple[tuple[str, str], ...] = ()
