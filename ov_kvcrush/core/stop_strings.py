"""Stop strings over a token stream: text grows token by token, and a match may begin and end inside a token."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"  # what a tokenizer shows for a character whose bytes are not complete


class StopStringTracker:
    """The generated text so far, where it stops, and how much of it can be shown already.

    decode: token ids -> text.
    """

    def __init__(self, stop_strings: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        self._stops = tuple(stop_strings)
        self._decode = decode
        self._ids: list[int] = []
        # Tokens before `_window_start` are settled; those up to `_window_end` have their text in `text` already.
        # Decoding only the window keeps the cost of a token constant; its first part is context for the spaces.
        self._window_start = 0
        self._window_end = 0
        self.text = ""
        self.ends: list[int] = []  # length of `text` after each token
        self.match: tuple[int, int] | None = None  # begin and end of the stop string in `text`

    def add(self, token: int) -> bool:
        """Take one more token; return whether a stop string is complete."""
        self._ids.append(token)
        before = self._decode(self._ids[self._window_start : self._window_end])
        now = self._decode(self._ids[self._window_start :])
        # Part of a character shows as a replacement character or, with openvino_genai's tokenizers, not at all.
        if not now.endswith(_REPLACEMENT) and len(now) > len(before):
            searched = len(self.text)
            self.text += now[len(before) :]
            self._window_start, self._window_end = self._window_end, len(self._ids)
            self._find(searched)
        self.ends.append(len(self.text))
        return self.match is not None

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
