"""Which guessed tokens run behind the decoding sequences of a step."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from typing import Protocol
from weakref import WeakKeyDictionary

from ov_kvcrush.core.request import MAX_DRAFT_TOKENS, Sequence
from ov_kvcrush.engine.lookahead.draft_pace import DraftPace
from ov_kvcrush.engine.lookahead.guess import Guess, Odds
from ov_kvcrush.kvcache.manager import KVCacheManager

MAX_ROWS = MAX_DRAFT_TOKENS + 1  # of a step with guessed tokens


class Guesser(Protocol):
    """Guesses what follows texts: PromptLookup, DraftModel."""

    def guess(self, sequences: Iterable[Sequence], most: int) -> list[Guess | None]:
        """What may follow each, `most` tokens at most; None = nothing is known."""


class Drafts:
    """Guesses, as many as pay: by how often they were right, and by what a row costs beside those that are there.

    A step has at most eight rows with them. cache: says how far a sequence may run ahead.
    """

    def __init__(self, guesser: Guesser, cache: KVCacheManager) -> None:
        self._guesser = guesser
        self._cache = cache
        self._odds: WeakKeyDictionary[Sequence, Odds] = WeakKeyDictionary()
        self.pace = DraftPace()

    def guess(self, sequences: Items[Sequence], room: int) -> list[tuple[int, ...]]:
        """The tokens to run behind the next one of each decoding sequence. room: rows that are left in the step."""
        none: list[tuple[int, ...]] = [()] * len(sequences)
        room = min(room, MAX_ROWS - len(sequences))
        if room <= 0:
            return none
        asked = [s for s in sequences if s.request.lookahead and s.num_generated and self._room_of(s) > 0]
        if not asked:
            return none
        for sequence in asked:
            self._learn(sequence)
        guesses = dict(zip(asked, self._guesser.guess(asked, min(room, MAX_DRAFT_TOKENS)), strict=True))
        for sequence, guess in guesses.items():
            self._odds[sequence].note(len(sequence.ids), guess)
        odds = [self._odds[s].of(guess.kind) if (guess := guesses.get(s)) else 0.0 for s in sequences]
        most = [self._most_of(s, guess) if (guess := guesses.get(s)) else 0 for s in sequences]
        counts = self.pace.choose(odds, most, room)
        return [
            guess.tokens[:count] if count and (guess := guesses.get(sequence)) else ()
            for sequence, count in zip(sequences, counts, strict=True)
        ]

    def _learn(self, sequence: Sequence) -> None:
        odds = self._odds.get(sequence)
        if odds is None:
            odds = self._odds[sequence] = Odds()
        begin = max(len(sequence.ids) - MAX_DRAFT_TOKENS - 1, 0)
        odds.learn(sequence.ids[begin:].tolist(), begin)

    def _most_of(self, sequence: Sequence, guess: Guess) -> int:
        return self._cache.max_draft(sequence, min(len(guess.tokens), self._room_of(sequence)))

    def _room_of(self, sequence: Sequence) -> int:
        """Guessed tokens that can be of use: the step gives one more than those that are right."""
        return sequence.request.params.max_new_tokens - sequence.num_generated - 1
