"""What may follow a text, and how often such guesses were right."""

from __future__ import annotations

from typing import NamedTuple

_MEMORY = 0.95  # weight of what is known, beside one more token: twenty or so count
_WEIGHT = 1.5  # of what is believed of guesses before any was seen, in tokens


class Guess(NamedTuple):
    """tokens: that may come next. kind: of how much it is trusted, such as the length of what was found again."""

    tokens: tuple[int, ...]
    kind: int


class Odds:
    """How probable it is that one more token of a guess of a sequence is right, for each kind of guess.

    What was guessed is compared with what came, also where it was not run: to stop guessing costs nothing, and neither
    does to begin again.
    """

    def __init__(self) -> None:
        self._right: dict[int, float] = {}
        self._seen: dict[int, float] = {}
        self._open: tuple[int, Guess] | None = None  # the last guess, and the tokens before it
        self.kind = 3  # of the last guess
        self.num_unseen = 0  # steps since one, where guesses cost something

    def note(self, num_tokens: int, guess: Guess | None) -> None:
        """A guess of what follows `num_tokens` tokens."""
        self._open = None if guess is None else (num_tokens, guess)
        self.kind = guess.kind if guess else self.kind

    def learn(self, ids: list[int], begin: int) -> None:
        """ids: those from position `begin` on; what came behind the last guess is among them."""
        if self._open is None:
            return
        position, guess = self._open
        self._open = None
        if position < begin:  # it was not asked about for a while
            return
        for token, came in zip(guess.tokens, ids[position - begin :], strict=False):
            self._count(guess.kind, token == came)
            if token != came:
                break

    def _count(self, kind: int, is_right: bool) -> None:
        self._right[kind] = _MEMORY * self._right.get(kind, 0.0) + is_right
        self._seen[kind] = _MEMORY * self._seen.get(kind, 0.0) + 1

    def of(self, kind: int) -> float:
        """In (0, 1). Unseen, a longer n-gram is believed more: 1/2, 2/3, 3/4."""
        believed = kind / (kind + 1)
        return (self._right.get(kind, 0.0) + _WEIGHT * believed) / (self._seen.get(kind, 0.0) + _WEIGHT)
