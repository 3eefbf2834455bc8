"""Where the system prompt of a conversation lies, in its text and in its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.core.cache_params import Span
from ov_kvcrush.core.perf_metrics import PerfMetrics
from ov_kvcrush.errors import RequestError
from ov_kvcrush.prompts.context import ContextText
from ov_kvcrush.prompts.encoder import PromptEncoder
from ov_kvcrush.prompts.spans import Decoded

_ROLES = ("system", "developer")
_MARK = "7c1e90b4"  # stands for the system prompt; templates change no letters and digits


class SystemFinder:
    """Finds system prompts as the chat template has them: trimmed, joined from parts, moved into another message."""

    def __init__(self, encoder: PromptEncoder, tokenizer: ov_genai.Tokenizer) -> None:
        self._encoder = encoder
        self._tokenizer = tokenizer

    def span(self, content: ContextText, ids: np.ndarray, metrics: PerfMetrics, answers: bool = True) -> Span | None:
        """Tokens of the system prompt of a conversation and of what the template puts before it; None without one.

        content: the conversation, rendered. ids: int64 (S,), its tokens. answers: as it was rendered.
        Raises RequestError for a system prompt that the template changes so that it cannot be found.
        """
        found = self._place(content, metrics, answers)
        if found is None:
            return None
        begin, end = found
        text = Decoded(ids, self._tokenizer)
        first = text.tokens_before(content.rendered[:begin]) if begin else 0
        last = text.tokens_with(content.rendered[:end])
        if first is None:
            first = max(self._count(content.rendered[:begin], metrics) - 1, 0)
        if last is None:  # decoding does not give the text back: one token too many rather than one too few
            last = self._count(content.rendered[:end], metrics) + 1
        return min(first, len(ids) - 1), min(last, len(ids))

    def _count(self, text: str, metrics: PerfMetrics) -> int:
        return len(self._encoder.encode(text, metrics, add_special_tokens=False))

    def _place(self, content: ContextText, metrics: PerfMetrics, answers: bool) -> tuple[int, int] | None:
        """Characters of the rendered conversation."""
        first, *others = content.messages or ({},)
        texts = _texts(first.get("content")) if first.get("role") in _ROLES else []
        if not any(text.strip() for text in texts):
            return None
        marked = self._marked(content, first, others, metrics, answers)
        before, mark, after = marked.partition(_MARK)
        if not mark:
            return None  # the template leaves it out
        end = len(content.rendered) - len(after)
        if content.rendered.startswith(before) and content.rendered.endswith(after) and len(before) < end:
            user = {"role": "user", "content": "0"}
            alone = self._marked(content, first, [user], metrics, True) if others else marked
            return (0 if alone.startswith(before + _MARK) else len(before)), end
        return self._found(content.rendered, texts)

    @staticmethod
    def _found(rendered: str, texts: Sequence[str]) -> tuple[int, int]:
        begin, at = -1, 0
        for text in filter(None, (text.strip() for text in texts)):
            at = rendered.find(text, at)
            if at < 0:
                raise RequestError(
                    "system message must be one that the chat template leaves as it is where a policy evicts, got one "
                    "that it changes; protect its tokens as a span"
                )
            begin, at = (at if begin < 0 else begin), at + len(text)
        return begin, at

    def _marked(
        self, content: ContextText, first: dict[str, Any], others: Sequence[Any], metrics: PerfMetrics, answers: bool
    ) -> str:
        """The conversation with a mark in the place of the system prompt."""
        told: Any = _MARK
        if not isinstance(first["content"], str):
            told = [{**next(part for part in first["content"] if _texts([part])), "text": _MARK}]
        history = content.history([{**first, "content": told}, *others])
        return self._encoder.render(history, metrics, answers=answers)


def _texts(content: Any) -> list[str]:
    """The texts of a message's content: a str, or a list of parts."""
    if isinstance(content, str):
        return [content]
    parts = content if isinstance(content, list) else []
    return [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
