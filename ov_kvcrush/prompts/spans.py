"""Protected passages and the system prompt of a request, from texts to spans of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.core.cache_params import CacheParams, Span
from ov_kvcrush.errors import RequestError

_FIRST_LOOK = 256  # tokens that are decoded to look for a passage; then twice as many
Protect = Sequence[Any]  # of passages (str) and spans (begin, end) of tokens


def check_protect(protect: Protect) -> tuple[str | Span, ...]:
    """What callers pass as `protect`. Raises RequestError for anything but passages and spans."""
    if isinstance(protect, (str, bytes)) or not isinstance(protect, Sequence):
        raise RequestError(f"protect must be a list of passages and spans (begin, end), got {protect!r}")
    return tuple(item if isinstance(item, str) else _span(item) for item in protect)


def resolve(params: CacheParams, ids: np.ndarray, tokenizer: ov_genai.Tokenizer) -> CacheParams:
    """The same with spans of the prompt int64 (S,) instead of passages.

    Raises RequestError for a protected passage that is not in the prompt.
    """
    text = Decoded(ids, tokenizer)
    protect: list[Span] = []
    for item in params.protect:
        span = (text.find(item) or text.find(item.strip())) if isinstance(item, str) else item
        if span is None:
            raise RequestError(f"protect must name passages of the prompt, got {item!r}, which is not in it")
        protect.append(span)
    return replace(params, protect=tuple(protect))


class Decoded:
    """A prompt's text, of which no more is decoded than must be."""

    def __init__(self, ids: np.ndarray, tokenizer: ov_genai.Tokenizer) -> None:
        self._ids = ids.tolist()
        self._tokenizer = tokenizer

    def tokens_before(self, text: str) -> int | None:
        """How many tokens end within `text`, which the prompt begins with; None if decoding does not give it back."""
        found = self.tokens_with(text)
        return None if found is None else self._most(found + 1, lambda n: len(self._decode(n)) <= len(text))

    def tokens_with(self, text: str) -> int | None:
        """How many tokens hold all of `text`, which the prompt begins with; None if decoding does not give it back."""
        num_tokens = min(_FIRST_LOOK, len(self._ids))
        while len(self._decode(num_tokens)) < len(text) and num_tokens < len(self._ids):
            num_tokens = min(2 * num_tokens, len(self._ids))
        if not self._decode(num_tokens).startswith(text):
            return None
        return self._most(num_tokens, lambda n: not self._decode(n).startswith(text)) + 1

    def find(self, passage: str) -> tuple[int, int] | None:
        """The tokens that hold the passage where it first occurs."""
        # A prefix of the tokens gives a prefix of the text, but for a character that it ends inside of. A system prompt
        # stands in a short one, however long the conversation.
        num_tokens, at = min(_FIRST_LOOK, len(self._ids)), -1
        while passage and (at := self._decode(num_tokens).find(passage)) < 0 and num_tokens < len(self._ids):
            num_tokens = min(2 * num_tokens, len(self._ids))
        if at < 0:
            return None
        begin = self._most(num_tokens, lambda n: len(self._decode(n)) <= at)
        return begin, self._most(num_tokens, lambda n: len(self._decode(n)) < at + len(passage)) + 1

    @staticmethod
    def _most(num_tokens: int, holds: Callable[[int], bool]) -> int:
        """The largest number below num_tokens for which `holds`, by halving."""
        low, high = 0, num_tokens - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if holds(middle) else (low, middle - 1)
        return low

    def _decode(self, num_tokens: int) -> str:
        text: str = self._tokenizer.decode(self._ids[:num_tokens], skip_special_tokens=False)
        return text


def _span(item: Any) -> tuple[int, int]:
    is_pair = isinstance(item, Sequence) and len(item) == 2
    if not is_pair or any(isinstance(x, bool) or not isinstance(x, (int, np.integer)) for x in item):
        raise RequestError(f"protect must be a list of passages and spans (begin, end), got {item!r} in it")
    return int(item[0]), int(item[1])
