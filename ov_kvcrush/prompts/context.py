"""What a context says, and how what is asked of it goes on from its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.core.eviction import ReplayPrompt
from ov_kvcrush.core.perf_metrics import PerfMetrics
from ov_kvcrush.errors import RequestError
from ov_kvcrush.prompts.encoder import PromptEncoder, check_text

BETWEEN = "\n\n"  # a text and the question about it
_MARK = "0"  # a text that no template takes for its own


@dataclass(frozen=True)
class ContextText:
    """The text of a context as its tokens have it, and the conversation that it is the beginning of.

    messages: as ChatHistory has them; none where the model has no chat template. is_open: the last one, the user's,
    goes on with the question. tools, extra_context: as of a ChatHistory.
    """

    rendered: str
    messages: tuple[dict[str, Any], ...] = ()
    is_open: bool = False
    tools: tuple[dict[str, Any], ...] = ()
    extra_context: dict[str, Any] = field(default_factory=dict)

    def history(self, messages: Sequence[dict[str, Any]] | None = None) -> ov_genai.ChatHistory:
        """The conversation, or another with the same tools and extra context."""
        made = ov_genai.ChatHistory([dict(x) for x in (self.messages if messages is None else messages)])
        if self.tools:
            made.set_tools([dict(tool) for tool in self.tools])
        if self.extra_context:
            made.set_extra_context(dict(self.extra_context))
        return made

    def asked(self, question: str) -> tuple[dict[str, Any], ...]:
        """The conversation with a question at its end."""
        if not self.is_open:
            return (*self.messages, {"role": "user", "content": question})
        *before, last = self.messages
        return (*before, {**last, "content": f"{last['content']}{BETWEEN}{question}"})


class ContextEncoder:
    """Tokens of contexts and of what goes on from them."""

    def __init__(self, encoder: PromptEncoder, tokenizer: ov_genai.Tokenizer) -> None:
        self._encoder = encoder
        self._has_template = bool(tokenizer.chat_template)

    def open(self, text: Any, metrics: PerfMetrics) -> tuple[ContextText, np.ndarray, int]:
        """A text or a conversation as a context: what it says, its tokens int64 (S,), and how many of them stand before
        the text itself.

        Raises RequestError for an empty one, and for a conversation without a chat template.
        """
        if isinstance(text, str):
            return self._open_text(text, metrics)
        content = _conversation(text)
        if not self._has_template:
            raise RequestError("context must be a text where the tokenizer has no chat template, got messages")
        content = replace(content, rendered=self._encoder.render(content.history(), metrics, answers=False))
        return content, self._ids(content.rendered, metrics), 0

    def _open_text(self, text: str, metrics: PerfMetrics) -> tuple[ContextText, np.ndarray, int]:
        check_text(text)
        if not text.strip():
            raise RequestError("context must have some text, got white space only")
        if not self._has_template:
            return ContextText(text), self._encoder.encode(text, metrics), 0
        text = text.strip()  # as many templates do
        messages = ({"role": "user", "content": text},)
        rendered = self._encoder.render(list(messages), metrics)
        begin = len(rendered) - len(text) - len(after := self._after_message(metrics))
        if begin < 0 or rendered[begin:] != text + after:
            raise RequestError("context must be a text that the chat template leaves as it is, got one that it changes")
        head = self._ids(rendered[:begin], metrics) if begin else np.zeros(0, np.int64)
        ids = np.concatenate([head, self._after(rendered[:begin], text, metrics)])
        return ContextText(rendered[: begin + len(text)], messages, is_open=True), ids, len(head)

    def more(self, context: ContextText, text: str, metrics: PerfMetrics) -> tuple[ContextText, np.ndarray]:
        """A context that goes on with a text: what it says then, and the tokens of what is new."""
        check_text(text)
        if context.messages and not context.is_open:
            raise RequestError("extend() must follow a text, got a conversation; ask it, and hold the answer as a chat")
        messages = context.messages
        if context.is_open:
            *before, last = messages
            messages = (*before, {**last, "content": last["content"] + text})
        ids = self._after(context.rendered, text, metrics)
        return replace(context, rendered=context.rendered + text, messages=messages), ids

    def question(self, ids: np.ndarray, context: ContextText, question: str, metrics: PerfMetrics) -> np.ndarray:
        """Tokens int64 (T,) of a context, `ids` (S,), that is asked something. Raises RequestError."""
        check_text(question)
        if not context.messages:
            return np.concatenate([ids, self._after(context.rendered, question, metrics)])
        history = context.history(context.asked(question))
        return self.joined(ids, context, self._encoder.render(history, metrics), metrics)

    def conversation(
        self, ids: np.ndarray, context: ContextText, history: ov_genai.ChatHistory, metrics: PerfMetrics
    ) -> np.ndarray:
        """Tokens int64 (T,) of a context, `ids` (S,), and the messages that follow it. Raises RequestError."""
        new = content_of(history)
        check_messages(new.messages)
        if not context.messages:
            raise RequestError("context must be of a model with a chat template to be followed by messages, got a text")
        if new.tools and new.tools != context.tools:
            raise RequestError("tools must be those of the context, got others: it was read with its own")
        first, *rest = new.messages
        if not context.is_open:
            messages = (*context.messages, *new.messages)
        elif first["role"] == "user" and isinstance(first["content"], str):
            messages = (*context.asked(first["content"]), *rest)
        else:
            raise RequestError(
                f"messages must begin with a text of the user where the context is a text, got {first['role']!r}"
            )
        return self.joined(ids, context, self._encoder.render(context.history(messages), metrics), metrics)

    def joined(self, ids: np.ndarray, context: ContextText, rendered: str, metrics: PerfMetrics) -> np.ndarray:
        """Tokens int64 (T,) of a rendered conversation that begins with a context, `ids` (S,). Raises RequestError."""
        if not rendered.startswith(context.rendered):
            raise RequestError("context must stay as it is when it is asked, got a chat template that changes it")
        return np.concatenate([ids, self._after(context.rendered, rendered[len(context.rendered) :], metrics)])

    def replay_prompt(self, metrics: PerfMetrics) -> ReplayPrompt:
        """What stands between a text and its repetition, as KVzip asks for it."""
        answer = self._after_message(metrics) if self._has_template else ""
        return ReplayPrompt(
            first=self._after("", "\n\nRepeat the previous context exactly.", metrics),
            again=self._after("", "\n\nRepeat the part of the previous context exactly, starting with", metrics),
            answer=self._after("", answer or "\n", metrics),
        )

    def _after_message(self, metrics: PerfMetrics) -> str:
        """What the chat template has between a user's text and the answer to it."""
        rendered = self._encoder.render([{"role": "user", "content": _MARK}], metrics)
        return rendered[rendered.rfind(_MARK) + len(_MARK) :]

    def _ids(self, text: str, metrics: PerfMetrics) -> np.ndarray:
        return self._encoder.encode(text, metrics, add_special_tokens=False)

    def _after(self, before: str, text: str, metrics: PerfMetrics) -> np.ndarray:
        return self._encoder.encode_after(before, text, metrics)


def content_of(history: ov_genai.ChatHistory, rendered: str = "", is_open: bool = False) -> ContextText:
    """What a ChatHistory holds."""
    tools, extra_context = tuple(history.get_tools()), dict(history.get_extra_context())
    return ContextText(rendered, tuple(history.get_messages()), is_open, tools, extra_context)


def check_messages(value: Any) -> tuple[dict[str, Any], ...]:
    """Messages as they are. Raises RequestError for what is none."""
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and len(value) > 0
    if not is_list or not all(_is_message(x) for x in value):
        raise RequestError(f"context must be a text or messages with role and content, got {value!r}")
    return tuple(dict(x) for x in value)


def _conversation(value: Any) -> ContextText:
    if isinstance(value, ov_genai.ChatHistory):
        content = content_of(value)
        check_messages(content.messages)
        return content
    messages = check_messages(value)
    try:
        return content_of(ov_genai.ChatHistory(list(messages)))  # copied, and all of it is JSON from here on
    except (RuntimeError, TypeError, ValueError):
        raise RequestError(f"context must be messages that JSON can hold, got {value!r}") from None


def _is_message(value: Any) -> bool:
    """A role, and a text, parts or calls of tools."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content")
    if content is None:
        return bool(value.get("tool_calls"))
    return isinstance(content, str) or (isinstance(content, list) and all(isinstance(x, dict) for x in content))
