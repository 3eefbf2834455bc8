"""What every policy is made of: what it may look at, what it decides, and how the parts fit together.

A *scorer* says how much each cached token matters; a *splitter* says how many tokens each KV head may keep; a
*policy* turns both into a `Selection`. All of them are frozen, keep nothing between two calls, and see numpy arrays
only: one that must remember (H2O's running sums) returns that from `observe`, and finds it again in
`HeadState.carried`.

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
    """A second reading of a prompt while all of it is there: chunk by chunk, behind an instruction to repeat it.

    As in KVzip, https://arxiv.org/abs/2505.23416. What the rows of the second reading look at is what the text cannot
    be told without, whatever will be asked.

    chunk: tokens of the prompt that are read again at a time; rounded up to blocks of 32.
    sees: what of the prompt the rows of a chunk see: the "chunk" itself and the prompt's front (its first block, or a
        system prompt), or "all".
    sample: the fraction of each chunk that is read again, its first tokens, in (0, 1].
    Raises CrushError for a chunk below 32, another word, and a fraction that is none.
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
    """What a policy wants to see of the cache. What it does not ask for is not computed.

    window: the last query rows whose attention is wanted, 0 = none. With fewer tokens than that, all of them.
    reduce: over those rows: "mean", "max" or "sum_squares".
    keys, values: the cached vectors, keys after RoPE.
    queries: the last `window` query rows themselves, after RoPE.
    carried: `observe` returns something to remember.
    replay: attention of a second reading of the text, if wanted.
    """

    window: int = 0
    reduce: str = "mean"
    keys: bool = False
    values: bool = False
    queries: bool = False
    state: bool = False
    replay: Replay | None = None

    def __or__(self, other: Inputs) -> Inputs:
        """Needs of two parts. Both must want the same reduction if both want attention."""
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
    """What is cached of one KV head.

    positions: int32 (S,), ascending: places in the text.
    attention: float32 (G, S), of the last W query rows, softmax over all tokens that a row sees, reduced; if needed.
    keys, values: float32 (S, D), if needed.
    queries: float32 (W, G, D), if needed, the newest last.
    carried: float32 (S,), what `observe` returned for these tokens, 0 for new ones; if needed.
    replayed: float32 (G, S), the largest attention of a row of the second reading; if needed. NaN for tokens that were
        not read again, 0 for those that stay in any case, such as a system prompt.
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
    """The cache of one sequence at the moment of a choice.

    layers: the heads of every layer. length: tokens of the text so far, kept or not.
    protected: bool (length,): places that stay, whatever their scores.
    """

    layers: tuple[LayerState, ...]
    length: int
    protected: np.ndarray

    def is_protected(self, head: HeadState) -> np.ndarray:
        """bool (S,)"""
        return self.protected[head.positions]


@dataclass(frozen=True)
class Selection:
    """Which cached tokens stay.

    kept: [layer][KV head] int32, ascending indices into the head's cached tokens (not positions).
    representatives: the same of those that stay for others that are like them, or None.
    """

    kept: list[list[np.ndarray]]
    representatives: list[list[np.ndarray]] | None = None


@dataclass(frozen=True)
class Budget:
    """Tokens that a head keeps on average, all-in: sinks, recent tokens and representatives are part of them.

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
        # What floating point adds to an exact product must not become a token more.
        return min(length, max(self.min_tokens, int(np.ceil(round(self.kept * length, 6)))))

    @property
    def floor(self) -> int:
        """The smallest budget that a text long enough to be evicted from can have."""
        return self.kept_tokens if self.kept_tokens is not None else self.min_tokens


@dataclass(frozen=True)
class Component(ABC):
    """A scorer, a splitter or a policy: frozen, its fields are its settings."""

    name: ClassVar[str]

    @property
    def inputs(self) -> Inputs:
        """What it wants to see."""
        return Inputs()


@dataclass(frozen=True)
class Scorer(Component):
    """Says how much each cached token matters."""

    @abstractmethod
    def score(self, layer: LayerState, index: int, length: int) -> list[np.ndarray]:
        """[K] float32 (S,), higher = keep, finite. index: which layer; length: tokens of the text so far."""

    def update(self, layer: LayerState, index: int, length: int) -> list[np.ndarray] | None:
        """[K] float32 (S,), to be remembered for the tokens that stay; None unless `needs.carried`."""
        return None

    def update_all(self, state: CacheState) -> list[list[np.ndarray]]:
        """The same for all layers, of a scorer that carries."""
        seen = [self.update(layer, index, state.length) for index, layer in enumerate(state.layers)]
        return [layer for layer in seen if layer is not None]


@dataclass(frozen=True)
class BudgetAllocator(Component):
    """Says how many tokens each KV head keeps."""

    @abstractmethod
    def allocate(self, state: CacheState, scores: Scores, tokens: int) -> list[list[int]]:
        """[layer][KV head] tokens to keep: at least the head's protected ones, at most all.

        tokens: the mean over all heads. The numbers sum to `tokens` times the heads, exactly; to all that is cached
        where that is less, and to all that is protected where that is more.
        """


@dataclass(frozen=True)
class Policy(Component):
    """Decides what stays in the cache of a sequence.

    budget: how much. sink_tokens, recent_tokens: the first and the last tokens of the text, which always stay.
    stride: tokens over the budget before a choice during the answer: more are fewer choices and more memory. A choice
        takes as long as one to three decode steps, and tokens that move between quantised tiles are rounded again.
    Raises CrushError if the smallest budget is below what always stays.
    """

    budget: Budget = field(default_factory=Budget)
    sink_tokens: int = 4
    recent_tokens: int = 32
    stride: int = 128

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
        """Whether anything can ever go."""
        return self.budget.kept_tokens is not None or self.budget.kept not in (None, 1)

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
        """Choose. tokens: what a head keeps on average; heads with fewer cached tokens keep all they have.

        Met exactly over all heads; protected tokens stay even if they alone are more. Equal scores: the lower position
        stays.
        """

    def update(self, state: CacheState) -> list[list[np.ndarray]] | None:
        """[layer][KV head] float32 (S,) to be remembered for the tokens that stay; None unless `needs.carried`."""
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
