"""Which tokens each sequence may take next, worked out by a thread beside the engine's while the model runs."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from llguidance import LLMatcher

from ov_kvcrush.core.request import Sequence
from ov_kvcrush.errors import CrushError

_WORD = 32  # tokens of one int32 of a mask, lowest bit first


class MaskThread:
    """Advances matchers and fills masks; llguidance does both without the interpreter's lock.

    vocab_size: tokens of a mask. ends: those that llguidance takes for the end of a text. work_s, wait_s: seconds that
    it has worked, and that sampling has waited for it.
    """

    def __init__(self, vocab_size: int, ends: Items[int]) -> None:
        self.num_words = -(-vocab_size // _WORD)
        self.ends = tuple(ends)
        self.work_s = 0.0
        self.wait_s = 0.0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ov_kvcrush masks")

    def fill(self, matchers: Items[LLMatcher]) -> np.ndarray:
        """Masks int32 (matchers, words) of the next token of each.

        One after the other: a mask takes 4 to 100 us, and handing eight of them to the threads of an LLExecutor took
        1 ms while the model ran on all cores, 0.1 ms here.
        """
        masks = np.empty((len(matchers), self.num_words), np.int32)
        for matcher, row in zip(matchers, masks, strict=True):
            matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        return masks

    def advance(self, states: Items[GrammarState], tokens: Items[list[int]]) -> None:
        """Have the masks made that come after these new tokens of each sequence; `GrammarState.mask` waits for them."""
        try:
            pending = self._pool.submit(self._advance, states, tokens)
        except RuntimeError:  # the process ends
            self._advance(states, tokens)
            return
        for state in states:
            state.pending = pending

    def _advance(self, states: Items[GrammarState], tokens: Items[list[int]]) -> None:
        start = time.perf_counter()
        for state, new in zip(states, tokens, strict=True):
            state.consume(new)
        for state, mask in zip(states, self.fill([state.matcher for state in states]), strict=True):
            state.take(mask)
        self.work_s += time.perf_counter() - start


class GrammarState:
    """Where one sequence is in its grammar.

    It follows the tokens of its sequence and counts those that it has seen: a sequence that is computed again after
    it lost its memory finds it as it was. matcher: its own. mask: of the next token, not shared. end_tokens: of the
    request. pending: what makes the next mask.
    """

    def __init__(
        self, thread: MaskThread, matcher: LLMatcher, mask: np.ndarray, end_tokens: frozenset[int], num_seen: int = 0
    ) -> None:
        self.thread = thread
        self.matcher = matcher
        self.pending: Future[None] | None = None
        self.num_seen = num_seen
        self._ends = end_tokens
        self._mask = mask
        self._set_ends()

    def fork(self) -> GrammarState:
        """The same place in the grammar, for another sequence with the same tokens."""
        mask = self.mask().copy()  # first of all: it waits until the matcher has seen all tokens
        return GrammarState(self.thread, self.matcher.deep_copy(), mask, self._ends, self.num_seen)

    def mask(self) -> np.ndarray:
        """int32 (words,): bit 1 = the token may come next. Raises CrushError where following takes too much."""
        if self.pending is not None:
            start = time.perf_counter()
            pending, self.pending = self.pending, None
            pending.result()
            self.thread.wait_s += time.perf_counter() - start
        if self.matcher.is_error():
            raise CrushError(f"grammar must be one that can be followed within limits, got: {reason_in(self.matcher)}")
        return self._mask

    @property
    def is_complete(self) -> bool:
        """Whether nothing but an end may follow, as far as it is known: what was seen when `mask` returned."""
        return self.matcher.is_stopped() and not self.matcher.is_error()

    def completes(self, generated: np.ndarray) -> bool:
        """Whether an answer that has no end token (`ignore_eos`) is complete with these tokens, int64 (n,)."""
        if self._ends:
            return False
        self.mask()
        self.consume(generated[self.num_seen :].tolist())
        return self.is_complete

    def consume(self, tokens: list[int]) -> None:
        """Follow new tokens of the sequence."""
        self.num_seen += len(tokens)
        self.matcher.consume_tokens(tokens)

    def take(self, mask: np.ndarray) -> None:
        """The mask (words,) of the next token."""
        self._mask = mask
        self._set_ends()

    def _set_ends(self) -> None:
        """Where the text may end, the request's end tokens are possible, and not those that it has not."""
        if self._ends == frozenset(self.thread.ends):
            return
        bits = self._mask.view(np.uint32)
        for token in self.thread.ends:
            if token not in self._ends:
                bits[token // _WORD] &= np.uint32(~(1 << token % _WORD) & 0xFFFFFFFF)
        if self.matcher.is_accepting():
            for token in self._ends:
                bits[token // _WORD] |= np.uint32(1 << token % _WORD)


def advance(sequences: Items[Sequence]) -> None:
    """Have the next masks made of those sequences that have a grammar, after they got their tokens."""
    members = [(s, s.grammar) for s in sequences if isinstance(s.grammar, GrammarState) and not s.is_finished]
    if members:
        new = [sequence.generated[state.num_seen :].tolist() for sequence, state in members]
        members[0][1].thread.advance([state for _, state in members], new)


def reason_in(matcher: LLMatcher) -> str:
    """What is wrong with a grammar, in a line."""
    lines = [line.strip() for line in matcher.get_error().splitlines()]
    return next((line for line in lines if line.startswith("error: ")), lines[0]).removeprefix("error: ")
