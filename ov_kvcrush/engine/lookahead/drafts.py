"""Which guessed tokens run behind the decoding sequences of a step."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Protocol
from weakref import WeakKeyDictionary

from ov_kvcrush.core.draft_metrics import ModelStep
from ov_kvcrush.core.request import MAX_DRAFT_TOKENS, Sequence
from ov_kvcrush.engine.lookahead.draft_pace import DraftPace
from ov_kvcrush.engine.lookahead.guess import Guess, Odds
from ov_kvcrush.kvcache.manager import KVCacheManager

MAX_ROWS = MAX_DRAFT_TOKENS + 1  # of a step with guessed tokens


_UNSEEN_STEPS = 16  # after so many without a guess that costs something, one is tried again


class Guesser(Protocol):
    """Guesses what follows texts: PromptLookup, DraftModel."""

    @property
    def is_free(self) -> bool:
        """Whether a guess costs nothing until it is run."""

    def guess(self, sequences: Items[Sequence], most: Items[int]) -> list[Guess | None]:
        """What may follow each, that many tokens at most; None = nothing is known, or nothing is wanted."""

    def forget(self, sequence: Sequence) -> None:
        """Give back what is held for a sequence."""

    def taken(self) -> tuple[ModelStep, ...] | None:
        """The steps of a model of its own since this was asked last, None = it has none."""


class Drafts:
    """Guesses, as many as pay: by how often they were right, and by what a row costs beside those that are there.

    A step has at most eight rows with them. cache: says how far a sequence may run ahead.
    """

    def __init__(self, guesser: Guesser, cache: KVCacheManager) -> None:
        self._guesser = guesser
        self._cache = cache
        self._odds: WeakKeyDictionary[Sequence, Odds] = WeakKeyDictionary()
        self.pace = DraftPace()

    def forget(self, sequence: Sequence) -> None:
        """Give back what is held for a sequence that has ended."""
        self._guesser.forget(sequence)

    def taken(self) -> tuple[ModelStep, ...] | None:
        """What a draft model did since this was asked last, None = there is none."""
        return self._guesser.taken()

    def guess(self, sequences: Items[Sequence], room: int) -> list[tuple[int, ...]]:
        """The tokens to run behind the next one of each decoding sequence. room: rows that are left in the step."""
        room = min(room, MAX_ROWS - len(sequences))
        limits = [self._limit_of(sequence, room) for sequence in sequences]
        if not any(limits):
            return [()] * len(sequences)
        odds = [self._learnt(sequence) for sequence in sequences]
        if self._guesser.is_free:
            guesses = self._guess(sequences, odds, limits)
            chances = [of.of(guess.kind) if guess else 0.0 for of, guess in zip(odds, guesses, strict=True)]
            limits = [len(guess.tokens) if guess else 0 for guess in guesses]
            counts = self.pace.choose(chances, limits, room)
        else:
            counts = self.pace.choose([of.of(of.kind) for of in odds], limits, room)
            for i, of in enumerate(odds):
                of.num_unseen = 0 if counts[i] else of.num_unseen + 1
                if limits[i] and of.num_unseen >= _UNSEEN_STEPS and sum(counts) < room:
                    counts[i], of.num_unseen = 1, 0
            guesses = self._guess(sequences, odds, counts)
        return [guess.tokens[:n] if guess else () for guess, n in zip(guesses, counts, strict=True)]

    def _guess(self, sequences: Items[Sequence], odds: Items[Odds], most: Items[int]) -> list[Guess | None]:
        found = dict.fromkeys(sequences)
        asked = [(s, n) for s, n in zip(sequences, most, strict=True) if n]
        guesses = self._guesser.guess([s for s, _ in asked], [n for _, n in asked])
        found.update({s: g and Guess(g.tokens[:n], g.kind) for (s, n), g in zip(asked, guesses, strict=True)})
        for sequence, of in zip(sequences, odds, strict=True):
            of.note(len(sequence.ids), found[sequence])
        return list(found.values())

    def _learnt(self, sequence: Sequence) -> Odds:
        odds = self._odds.get(sequence)
        if odds is None:
            odds = self._odds[sequence] = Odds()
        begin = max(len(sequence.ids) - MAX_DRAFT_TOKENS - 1, 0)
        odds.learn(sequence.ids[begin:].tolist(), begin)
        return odds

    def _limit_of(self, sequence: Sequence, room: int) -> int:
        """Tokens that can be of use: the step gives one more than those that are right."""
        request = sequence.request
        if request.lookahead is None or not sequence.num_generated:
            return 0
        useful = request.params.max_new_tokens - sequence.num_generated - 1
        most = min(request.lookahead.num_tokens, MAX_DRAFT_TOKENS, room, useful)
        return self._cache.max_draft(sequence, most) if most > 0 else 0
