"""What a policy sees of a cache, what it decides, and the components it is made of.

A *scorer* gives every cached token a score, a *budget allocator* says how many tokens each KV head keeps, and a
*policy* turns both into a `Selection`. All three are frozen and hold no state between calls: state that a scorer needs
per token (H2O's running sums) is returned by `update`, stored with the cache, and passed back in `HeadState.state`.
They see numpy arrays only.

Letters: L layers, K KV heads of a layer, H query heads, G = H / K, S cached tokens of one head, D head size, W query
rows of a window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from ov_kvcrush.errors import CrushError
from ov_kvcrush.utils.checks import check_choice, check_fraction, check_integer


@dataclass(frozen=True)
class Replay:
    """A second prefill of the prompt, before anything is evicted: chunk by chunk, after an instruction to repeat it.

    As in KVzip, https://arxiv.org/abs/2505.23416. The tokens that the second reading attends to are those needed to
    reproduce the text, so they serve any later question.

    chunk: prompt tokens read again at a time; rounded up to blocks of 32.
    sees: which prompt tokens the rows of a chunk attend to: the "chunk" itself and the prompt's front (its first
        block, or a system prompt), or "all".
    sample: the fraction of each chunk that is read again, its first tokens, in (0, 1].
    Raises CrushError for a chunk below 32, another word for sees, and a sample outside of (0, 1].
    """

    chunk: int = 2048
    sees: str = "chunk"
    sample: float = 1.0

    def __post_init__(self) -> None:
        check_integer("chunk", self.chunk, 32)
        check_fraction("sample", self.sample)
        check_choice("sees", self.sees, ("chunk", "all"))


@dataclass(frozen=True)
class Inputs:
    """What a policy needs to see of the cache; nothing else is computed.

    window: number of recent query rows whose attention is used, 0 = none; all rows of a shorter text.
    reduce: how their attention is reduced over the rows: "mean", "max" or "sum_squares".
    keys, values: the cached vectors, keys after RoPE.
    queries: the last `window` query rows themselves, after RoPE.
    state: `update` returns a number per token, to be stored with the cache.
    replay: the second prefill whose attention is used, None = none.
    """

    window: int = 0
    reduce: str = "mean"
    keys: bool = False
    values: bool = False
    queries: bool = False
    state: bool = False
    replay: Replay | None = None

    def __or__(self, other: Inputs) -> Inputs:
        """Inputs of two components together. Raises CrushError if both use attention with different reductions."""
        if self.window and other.window and self.reduce != other.reduce:
            raise CrushError(f"reduce must be the same for all parts of a policy, got {self.reduce} and {other.reduce}")
        return Inputs(
            window=max(self.window, other.window),
            reduce=self.reduce if self.window else other.reduce,
            keys=self.keys or other.keys,
            values=self.values or other.values,
            queries=self.queries or other.queries,
            state=self.state or other.state,
            replay=self.replay or other.replay,
        )


@dataclass(frozen=True)
class HeadState:
    """The cached tokens of one KV head. Arrays that the policy's `Inputs` do not name are None.

    positions: int32 (S,), ascending: positions in the text.
    attention: float32 (G, S): softmax over all tokens that a query row sees, reduced over the last W rows.
    keys, values: float32 (S, D).
    queries: float32 (W, G, D), the newest last.
    state: float32 (S,), what `update` returned for these tokens, 0 for new ones.
    replayed: float32 (G, S), the largest attention of any row of the second prefill. NaN for tokens that were not read
        again, 0 for those that stay in any case, such as a system prompt.
    """

    positions: np.ndarray
    attention: np.ndarray | None = None
    keys: np.ndarray | None = None
    values: np.ndarray | None = None
    queries: np.ndarray | None = None
    state: np.ndarray | None = None
    replayed: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.positions)


LayerState = tuple[HeadState, ...]  # its KV heads
Scores = list[list[np.ndarray]]  # [layer][KV head] float32 (S,), higher = keep


@dataclass(frozen=True)
class CacheState:
    """The cache of one sequence when its policy is asked.

    layers: the heads of every layer. length: tokens of the text so far, kept or evicted.
    protected: bool (length,): positions that stay, whatever their scores.
    """

    layers: tuple[LayerState, ...]
    length: int
    protected: np.ndarray

    def is_protected(self, head: HeadState) -> np.ndarray:
        """bool (S,): which of the head's tokens are protected."""
        return self.protected[head.positions]


@dataclass(frozen=True)
class Selection:
    """Which cached tokens stay.

    kept: [layer][KV head] int32, ascending indices into the head's cached tokens (not positions).
    representatives: those of them that stand for evicted tokens like them, in the same form; None: no such notion.
    tiers: [layer][KV head] uint8, the tier of each kept token; precisions: keys and values of each tier, bits never
    rising from one to the next. None: as the cache stores them.
    """

    kept: list[list[np.ndarray]]
    representatives: list[list[np.ndarray]] | None = None
    tiers: list[list[np.ndarray]] | None = None
    precisions: tuple[tuple[str, str], ...] | None = None


@dataclass(frozen=True)
class Budget:
    """Tokens that a head keeps on average, including sinks, recent tokens and representatives.

    kept: fraction of the text so far, in (0, 1]; or kept_tokens: a number of tokens. One of the two; None, None = all.
    min_tokens: nothing is evicted from a text of as many tokens or fewer, and a fraction keeps at least these.
    Raises CrushError for anything else.
    """

    kept: float | None = None
    kept_tokens: int | None = None
    min_tokens: int = 128

    def __post_init__(self) -> None:
        if self.kept is not None and self.kept_tokens is not None:
            raise CrushError(f"only one of kept and kept_tokens can be given, got {self.kept} and {self.kept_tokens}")
        if self.kept is not None:
            check_fraction("kept", self.kept)
        if self.kept_tokens is not None:
            check_integer("kept_tokens", self.kept_tokens, 1)
        check_integer("min_tokens", self.min_tokens, 1)

    def tokens(self, length: int) -> int:
        """Tokens that a head keeps on average of a text of `length`."""
        if self.kept_tokens is not None:
            return min(length, self.kept_tokens)
        if self.kept is None:
            return length
        # Rounded first: floating-point error above an exact product must not add a token.
        return min(length, max(self.min_tokens, int(np.ceil(round(self.kept * length, 6)))))

    @property
    def floor(self) -> int:
        """The smallest budget that a text long enough to be evicted from can have."""
        return self.kept_tokens if self.kept_tokens is not None else self.min_tokens


@dataclass(frozen=True)
class DefaultBudget(Budget):
    """The budget of a policy whose caller named none: how it is met is the engine's choice.

    A plan of `config.DEFAULT_BUDGET` takes its place where the cache can be planned; else it is what it says.
    """


@dataclass(frozen=True)
class Component(ABC):
    """A scorer, a budget allocator or a policy: frozen, its fields are its settings."""

    name: ClassVar[str]

    @property
    def inputs(self) -> Inputs:
        """What it needs to see."""
        return Inputs()


@dataclass(frozen=True)
class Scorer(Component):
    """Gives every cached token a score."""

    @abstractmethod
    def score(self, layer: LayerState, index: int, length: int) -> list[np.ndarray]:
        """[K] float32 (S,), higher = keep, finite. index: which layer; length: tokens of the text so far."""

    def update(self, layer: LayerState, index: int, length: int) -> list[np.ndarray] | None:
        """[K] float32 (S,), the new state of each token, stored for those that stay; None unless `inputs.state`."""
        return None

    def update_all(self, state: CacheState) -> list[list[np.ndarray]]:
        """[layer][KV head] The new state of all layers, of a scorer whose `inputs.state` is set."""
        states = [self.update(layer, index, state.length) for index, layer in enumerate(state.layers)]
        return [layer for layer in states if layer is not None]


@dataclass(frozen=True)
class BudgetAllocator(Component):
    """Divides the budget: says how many tokens each KV head keeps."""

    @abstractmethod
    def allocate(self, state: CacheState, scores: Scores, tokens: int) -> list[list[int]]:
        """[layer][KV head] tokens to keep: at least the head's protected ones, at most all.

        tokens: the mean over all heads. The numbers sum to exactly `tokens` times the number of heads, but at least to
        all protected and at most to all cached tokens.
        """


@dataclass(frozen=True)
class Policy(Component):
    """Selects which tokens of a sequence stay in its cache.

    budget: how many. sink_tokens, recent_tokens: number of first and last tokens of the text, which always stay.
    stride: tokens above the budget at which tokens are evicted during the answer; a larger one evicts less often and
        takes more memory. An eviction takes as long as one to three decode steps, and tokens that move between
        quantised tiles are rounded again.
    built_as: the registry's name that it was built by. Not a setting: policies with equal settings are equal.
    Raises CrushError if the smallest budget is below what always stays.
    """

    budget: Budget = field(default_factory=Budget)
    sink_tokens: int = 4
    recent_tokens: int = 32
    stride: int = 128
    built_as: str | None = field(default=None, kw_only=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_integer("stride", self.stride, 1)
        for name in ("sink_tokens", "recent_tokens"):
            check_integer(name, getattr(self, name), 0)
        always = self.sink_tokens + self.recent_tokens
        if self.budget.floor < always:
            field_name = "kept_tokens" if self.budget.kept_tokens is not None else "min_tokens"
            raise CrushError(
                f"{field_name} must be at least the protected tokens, "
                f"sink_tokens + recent_tokens = {always}, got {self.budget.floor}"
            )

    @property
    def evicts(self) -> bool:
        """Whether it ever evicts anything."""
        return self.budget.kept_tokens is not None or self.budget.kept not in (None, 1)

    @property
    def tiers(self) -> tuple[tuple[str, str], ...]:
        """Precisions of keys and values that its tokens are stored in, most bits first; () = as the cache stores."""
        return ()

    def protected(self, length: int, spans: Iterable[tuple[int, int]] = ()) -> np.ndarray:
        """bool (length,): sinks, recent tokens, and the caller's spans [begin, end)."""
        mask = np.zeros(length, bool)
        mask[: self.sink_tokens] = True
        mask[max(0, length - self.recent_tokens) :] = True
        for begin, end in spans:
            mask[begin:end] = True
        return mask

    @abstractmethod
    def select(self, state: CacheState, tokens: int) -> Selection:
        """Select what stays. tokens: what a head keeps on average; heads with fewer cached tokens keep all of them.

        The average is met exactly, but protected tokens stay even if they alone exceed it. Of equal scores, the lower
        position stays.
        """

    def update(self, state: CacheState) -> list[list[np.ndarray]] | None:
        """[layer][KV head] float32 (S,), the new state of each token; None unless `inputs.state`."""
        return None


def top(scores: np.ndarray, n: int) -> np.ndarray:
    """Indices of the n highest of scores (S,), ascending; among equals the lower index. O(S)."""
    if n >= len(scores):
        return np.arange(len(scores), dtype=np.int32)
    if n <= 0:
        return np.zeros(0, np.int32)
    threshold = np.partition(scores, len(scores) - n)[len(scores) - n]
    chosen = scores > threshold
    missing = n - int(chosen.sum())
    if missing:
        chosen[np.flatnonzero(scores == threshold)[:missing]] = True
    return np.flatnonzero(chosen).astype(np.int32)


def top_with_protected(scores: np.ndarray, protected: np.ndarray, n: int) -> np.ndarray:
    """Indices (ascending) of all protected tokens, and of the highest others up to n together."""
    free = np.flatnonzero(~protected)
    best = free[top(scores[free], n - (len(scores) - len(free)))]
    chosen = protected.copy()
    chosen[best] = True
    return np.flatnonzero(chosen).astype(np.int32)
