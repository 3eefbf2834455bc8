"""What a guessed token costs, learnt from the steps that were run, and how many are worth it."""

from __future__ import annotations

from collections.abc import Sequence as Items

_BELIEVED = 0.15  # of a step without guesses, for each guessed token, before any was seen
_WEIGHT = 4.0  # of that belief, in squared tokens
_MEMORY = 0.98  # fifty or so steps count: what a row costs changes slowly, and each step is measured badly
_LEAST, _MOST = 0.02, 1.0  # of a step without guesses
_MARGIN = 1.25  # times its row that a guess must be worth: neither odds nor costs are known well
_OUTLIER = 3.0  # times the mean: the machine did something else


class DraftPace:
    """Seconds of a step of answers: base + row * guessed tokens, fitted to what the last steps took.

    A guess is worth its row where the tokens that it gives, times the chance that it is right, come sooner than the
    step's other tokens do, by a margin: the sum of tokens over the sum of seconds grows with each.
    """

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._rows2 = self._both = 0.0

    def note(self, num_drafts: int, seconds: float) -> None:
        """What a step of decode rows took, with so many guessed tokens."""
        if self._weight and seconds > _OUTLIER * self._seconds / self._weight:
            seconds = _OUTLIER * self._seconds / self._weight
        added = (1.0, num_drafts, seconds, num_drafts**2, num_drafts * seconds)
        known = (self._weight, self._rows, self._seconds, self._rows2, self._both)
        self._weight, self._rows, self._seconds, self._rows2, self._both = (
            _MEMORY * old + new for old, new in zip(known, added, strict=True)
        )

    @property
    def row_cost(self) -> float:
        """Seconds of one guessed token over those of a step without."""
        if not self._weight:
            return _BELIEVED
        rows, seconds = self._rows / self._weight, self._seconds / self._weight
        spread = self._rows2 - self._weight * rows**2
        slope_of_all = self._both - self._weight * rows * seconds  # least squares, before it is divided by the spread
        # Drawn to the belief where all steps had about as many: base = seconds - row * rows on both sides.
        believed = _BELIEVED * seconds / (1 + _BELIEVED * rows)
        row = (slope_of_all + _WEIGHT * believed) / (spread + _WEIGHT)
        base = max(seconds - row * rows, 1e-9)
        return min(max(row / base, _LEAST), _MOST)

    def choose(self, odds: Items[float], most: Items[int], room: int) -> list[int]:
        """How many tokens of each guess to run.

        odds: for each decoding sequence, that one more token of its guess is right; most: tokens of the guess; room:
        of all together.
        """
        counts, chances = [0] * len(odds), list(odds)
        tokens, seconds, row = float(len(odds)), 1.0, self.row_cost
        for _ in range(room):
            open_ = [i for i in range(len(odds)) if counts[i] < most[i]]
            if not open_:
                break
            best = max(open_, key=lambda i: chances[i])
            if chances[best] * seconds <= _MARGIN * row * tokens:
                break
            counts[best] += 1
            tokens, seconds = tokens + chances[best], seconds + row
            chances[best] *= odds[best]
        return counts
