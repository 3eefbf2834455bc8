"""Stop strings over a token stream: text grows token by token, and a match may begin and end inside a token."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"  # what a tokenizer shows for a character whose bytes are not complete
_MAX_OPEN_CHARACTERS = 3  # what is missing a byte has at most three, and shows as at most as many replacements
_MAX_PENDING = 32  # tokens; more without a complete character are no character


class StopStringTracker:
    """The generated text so far, where it stops, and how much of it can be shown already.

    decode: token ids -> text.
    """

    def __init__(self, stop_strings: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        self._stops = tuple(stop_strings)
        self._decode = decode
        self._ids: list[int] = []
        # Only the tokens of a window are decoded, which keeps the cost of a token constant. Those up to `_settled` are
        # in `text` already, as `_shown` characters of the window's text; they are context for the spaces.
        self._start = 0
        self._settled = 0
        self._shown = 0
        self.text = ""
        self.ends: list[int] = []  # length of `text` after each token
        self.match: tuple[int, int] | None = None  # begin and end of the stop string in `text`

    def copy(self) -> StopStringTracker:
        """An independent copy."""
        twin = StopStringTracker(self._stops, self._decode)
        twin._ids, twin.ends = self._ids.copy(), self.ends.copy()
        twin._start, twin._settled, twin._shown = self._start, self._settled, self._shown
        twin.text, twin.match = self.text, self.match
        return twin

    def add(self, token: int) -> bool:
        """Take one more token; return whether a stop string is complete."""
        self._ids.append(token)
        now = self._decode(self._ids[self._start :])
        # Part of a character shows as a replacement character or, with openvino_genai's tokenizers, not at all.
        if not now.endswith(_REPLACEMENT) and len(now) > self._shown:
            self._take(now, len(now))
            self._start, self._settled = self._settled, len(self._ids)
            self._shown = len(self._decode(self._ids[self._start :]))
        elif len(self._ids) - self._settled > _MAX_PENDING:
            self._take_pending(now)
        self.ends.append(len(self.text))
        return self.match is not None

    def _take(self, now: str, length: int) -> None:
        """Add the window's text, up to `length`."""
        searched = len(self.text)
        self.text += now[self._shown : length]
        self._find(searched)

    def _take_pending(self, now: str) -> None:
        """Take bytes that are no characters for what they show as, and move the window on.

        A decoder finds back to the borders of characters within three bytes, so the window's last characters are the
        same wherever it begins: what is shown is counted from its end.
        """
        num_open = 0
        while num_open < _MAX_OPEN_CHARACTERS and now.endswith(_REPLACEMENT * (num_open + 1)):
            num_open += 1
        length = max(len(now) - num_open, self._shown)
        self._take(now, length)
        self._start = self._settled = len(self._ids) - _MAX_PENDING // 2
        moved = len(self._decode(self._ids[self._start :]))
        self._shown = min(max(moved - (len(now) - length), 0), moved)

    def _find(self, searched: int) -> None:
        """Look for the earliest stop string that ends after `searched`."""
        begins = []
        for stop in self._stops:
            begin = self.text.find(stop, max(0, searched - len(stop) + 1))
            if begin >= 0:
                begins.append((begin, begin + len(stop)))
        self.match = min(begins, default=None)

    @property
    def safe_length(self) -> int:
        """Characters of `text` that no stop string can take back any more."""
        if self.match:
            return self.match[0]
        longest = max((self._open_part(stop) for stop in self._stops), default=0)
        return len(self.text) - longest

    def _open_part(self, stop: str) -> int:
        """Length of the longest beginning of `stop` that `text` ends with."""
        return next((n for n in range(min(len(stop) - 1, len(self.text)), 0, -1) if self.text.endswith(stop[:n])), 0)

    def num_tokens_within(self, length: int) -> int:
        """Tokens whose text begins within the first `length` characters."""
        return bisect.bisect_left([0, *self.ends[:-1]], length)
