"""What may follow a text, and how often such guesses were right."""

from __future__ import annotations

from typing import NamedTuple

_MEMORY = 0.95  # weight of what is known, beside one more token: twenty or so count
_WEIGHT = 1.5  # of what is believed of guesses before any was seen, in tokens


class Guess(NamedTuple):
    """tokens: that may come next. kind: of how much it is trusted, such as the length of what was found again."""

    tokens: tuple[int, ...]
    kind: int


class Record:
    """How often the tokens of one kind of guess were right.

    The last twenty or so count, and what was believed before the first fades with them. What came last says more: after
    r right ones in a row the next is right with r / (r + 2) at least, after w wrong ones with 1 / (w + 1) at most. So a
    text that begins to repeat itself, or ends to, is noticed within a few tokens.
    """

    def __init__(self, believed: float) -> None:
        self._right, self._seen = _WEIGHT * believed, _WEIGHT
        self._run = 0  # right ones in a row, or minus the wrong ones

    def count(self, is_right: bool) -> None:
        """One more."""
        self._right = _MEMORY * self._right + is_right
        self._seen = _MEMORY * self._seen + 1
        self._run = max(self._run, 0) + 1 if is_right else min(self._run, 0) - 1

    @property
    def odds(self) -> float:
        """That the next is right, in (0, 1)."""
        share = self._right / self._seen
        return max(share, self._run / (self._run + 2)) if self._run > 0 else min(share, 1 / (1 - self._run))


class Odds:
    """How probable it is that one more token of a guess of a sequence is right, for each kind of guess.

    What was guessed is compared with what came, also where it was not run: to stop guessing costs nothing, and neither
    does to begin again.
    """

    def __init__(self) -> None:
        self._records: dict[int, Record] = {}
        self._open: tuple[int, Guess] | None = None  # the last guess, and the tokens before it
        self.kind = 6  # of the last guess; of a draft model before the first
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
            self._of(guess.kind).count(token == came)
            if token != came:
                break

    def of(self, kind: int) -> float:
        """In (0, 1). Unseen, a longer n-gram is believed more: 1/3, 1/2, 3/5."""
        return self._of(kind).odds

    def _of(self, kind: int) -> Record:
        return self._records.setdefault(kind, Record(kind / (kind + 2)))
