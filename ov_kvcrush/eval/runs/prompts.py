"""Token ids of a suite's items: the context, and what follows it for each question."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.core.perf_metrics import PerfMetrics
from ov_kvcrush.errors import CrushError, RequestError
from ov_kvcrush.eval.benchmarks.items import Item, Question, truncate_middle
from ov_kvcrush.eval.benchmarks.scbench import gold_text
from ov_kvcrush.prompts.context import ContextEncoder, ContextText
from ov_kvcrush.prompts.encoder import PromptEncoder

_TOO_MANY = 1 << 40  # tokens of a text that the tokenizer would cut
_PIECE = 20_000  # characters of a long text that are tokenized at a time


@dataclass(frozen=True, eq=False)
class QuestionPrompt:
    """A question as tokens: its prompt is the context's tokens and then `ids`, int64 (T,), at least one.

    turn: of a conversation, whose earlier questions and references are in `ids` too; 0 outside of one. forced: int64
    (N,), the tokens of each of `question.forced`.
    """

    index: int
    turn: int
    question: Question
    ids: np.ndarray
    forced: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True, eq=False)
class ItemPrompts:
    """An item's context, int64 (S,), and its questions. head: leading tokens of the chat template, never evicted."""

    item: Item
    ids: np.ndarray
    head: int
    asked: tuple[QuestionPrompt, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest prompt and its answer."""
        return len(self.ids) + max(_after(asked) for asked in self.asked)


class ItemEncoder:
    """Encodes items to the ids that the pipelines make of `compress(context)` and `generate(question)`."""

    def __init__(self, tokenizer: ov_genai.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._encoder = PromptEncoder(tokenizer)
        self._contexts = ContextEncoder(self._encoder, tokenizer)
        self._metrics = PerfMetrics()

    def count(self, text: str) -> int:
        """Tokens of a text; a huge number for one that is too long for the tokenizer."""
        try:
            return len(self._ids(text))
        except RequestError:
            return _TOO_MANY

    def encode(self, item: Item, max_tokens: int | None = None) -> ItemPrompts:
        """The prompts of an item. max_tokens: limit of the longest prompt and its answer; the context is cut in its
        middle to fit. None = no limit. Raises RequestError for an item that cannot be put into the chat template.
        """
        if max_tokens is not None and len(item.context) > max_tokens:
            item = replace(item, context=self._pre_cut(item.context, max_tokens))
        state, ids, head = self._open(item)
        asked = tuple(
            QuestionPrompt(
                index, index if item.multi_turn else 0, question, self._rest(item, index, state),
                self._forced(question, bool(state.messages)),
            )
            for index, question in enumerate(item.questions)
        )  # fmt: skip
        whole = ItemPrompts(item, ids, head, asked)
        if max_tokens is None or whole.num_tokens <= max_tokens:
            return whole
        longest = max(asked, key=_after)
        room = max_tokens - head - (_after(longest) - len(longest.ids))
        if room - len(longest.ids) < 1:
            raise CrushError(
                f"--length must be more than the {max_tokens - room + len(longest.ids)} tokens around the context of "
                f"item {item.id!r}, got {max_tokens}"
            )
        cut = truncate_middle(ids[head:].tolist(), room, len(longest.ids))
        return replace(whole, ids=np.concatenate([ids[:head], np.array(cut, np.int64)]))

    def _pre_cut(self, text: str, max_tokens: int) -> str:
        """A text cut in its middle to about max_tokens tokens, few enough for the tokenizer."""
        pieces = [text[i : i + _PIECE] for i in range(0, len(text), _PIECE)]
        ids = [token for piece in pieces for token in self._ids(piece).tolist()]
        if len(ids) <= max_tokens:
            return text
        half = max_tokens // 2
        return str(self._tokenizer.decode(ids[:half])) + str(self._tokenizer.decode(ids[len(ids) - half :]))

    def _open(self, item: Item) -> tuple[ContextText, np.ndarray, int]:
        if item.chat:
            return self._contexts.open(item.context, self._metrics)
        return ContextText(item.context), self._encoder.encode(item.context, self._metrics), 0

    def _rest(self, item: Item, index: int, state: ContextText) -> np.ndarray:
        question = item.questions[index]
        earlier = item.questions[:index] if item.multi_turn else ()
        none = np.zeros(0, np.int64)
        if not state.messages:
            said = "".join(f"{q.text}{_answer_of(q)}" for q in earlier)
            rest = said + question.text + question.answer_prefix
            return self._encoder.encode_after(state.rendered, rest, self._metrics)
        if not earlier:
            ids = self._contexts.question(none, state, question.text, self._metrics)
        else:
            rendered = self._encoder.render(_conversation(state, earlier, question), self._metrics)
            ids = self._contexts.joined(none, state, rendered, self._metrics)
        prefix = question.answer_prefix
        return np.concatenate([ids, self._encoder.encode_after("", prefix, self._metrics)]) if prefix else ids

    def _forced(self, question: Question, in_chat: bool) -> tuple[np.ndarray, ...]:
        before = question.answer_prefix or ("\n" if in_chat else question.text)
        space = "" if before[-1:].isspace() else " "
        return tuple(self._encoder.encode_after(before, f"{space}{text}", self._metrics) for text in question.forced)

    def _ids(self, text: str) -> np.ndarray:
        return self._encoder.encode(text, self._metrics, add_special_tokens=False)


def _after(asked: QuestionPrompt) -> int:
    """Tokens behind the context: the question and the longest answer."""
    return len(asked.ids) + max([asked.question.max_new_tokens, *map(len, asked.forced)])


def _answer_of(question: Question) -> str:
    return question.answer_prefix + gold_text(question)


def _conversation(state: ContextText, earlier: Sequence[Question], question: Question) -> list[dict[str, Any]]:
    """Messages up to a question; the model's own are the references."""
    messages = list(state.asked(earlier[0].text))
    for before, after in zip(earlier, (*earlier[1:], question), strict=True):
        messages += [
            {"role": "assistant", "content": _answer_of(before)},
            {"role": "user", "content": after.text},
        ]
    return messages


def encode_items(
    items: Iterable[Item], encoder: ItemEncoder, context_length: int | None, max_tokens: int | None = None
) -> list[ItemPrompts]:
    """All prompts. max_tokens: as `ItemEncoder.encode` has it.

    Raises CrushError, naming the item, for a prompt that with its answer is longer than the model's context.
    """
    found = [encoder.encode(item, max_tokens) for item in items]
    if not found:
        raise CrushError("items must be at least one, got none")
    longest = max(found, key=lambda prompts: prompts.num_tokens)
    if context_length is not None and longest.num_tokens > context_length:
        raise CrushError(
            f"model must have a context of at least {longest.num_tokens} tokens for item {longest.item.id!r}, its chat "
            f"template and its answer, got {context_length}; lower --length"
        )
    return found
