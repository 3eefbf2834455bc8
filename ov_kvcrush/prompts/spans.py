"""What a caller wants of the KV cache, in the terms of texts; what a request is told, in tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.errors import RequestError
from ov_kvcrush.pipelines.backend import NO_REPLAY_PROMPT, CacheParams, ReplayPrompt
from ov_kvcrush.policies.base import Policy

if TYPE_CHECKING:
    from ov_kvcrush.core.snapshot import KVSnapshot

_FIRST_LOOK = 256  # tokens that are decoded to look for a passage; then twice as many
Protect = Sequence[Any]  # of passages (str) and spans (begin, end) of tokens


@dataclass(frozen=True)
class CacheWish:
    """policy: None = as the pipeline was told. protect: passages and spans of tokens that stay. system: the text of the
    system prompt, which stays if it is found, with what stands before it. keep_kv: leave the KV for a prompt that goes
    on from this one. words, context, hold: as of CacheParams.
    """

    policy: Policy | None = None
    protect: Protect = ()
    keep_kv: bool = False
    system: str = ""
    words: ReplayPrompt = NO_REPLAY_PROMPT
    context: KVSnapshot | None = None
    hold: bool = False

    def of(self, ids: np.ndarray, tokenizer: ov_genai.Tokenizer) -> CacheParams:
        """The same for the tokens of one prompt. Raises RequestError for a passage that is not in it."""
        if isinstance(self.protect, (str, bytes)) or not isinstance(self.protect, Sequence):
            raise RequestError(f"protect must be a list of passages and spans (begin, end), got {self.protect!r}")
        text = _Text(ids, tokenizer)
        spans = []
        for item in self.protect:
            span = text.find(item) if isinstance(item, str) else _span(item)
            if span is None:
                raise RequestError(f"protect must name passages of the prompt, got {item!r}, which is not in it")
            spans.append(span)
        found = text.find(self.system)
        system = (0, found[1]) if found else None
        return CacheParams(
            self.keep_kv, self.policy, tuple(spans), system, self.words, context=self.context, hold=self.hold
        )


def system_text(history: Any) -> str:
    """The system prompt that a history begins with; "" if there is none or it is no history."""
    if not isinstance(history, ov_genai.ChatHistory) or not len(history):
        return ""
    first = history.get_messages()[0]
    content = first.get("content") if first.get("role") == "system" else ""
    return content if isinstance(content, str) else ""


class _Text:
    """A prompt's text, of which no more is decoded than must be."""

    def __init__(self, ids: np.ndarray, tokenizer: ov_genai.Tokenizer) -> None:
        self._ids = ids.tolist()
        self._tokenizer = tokenizer

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
