"""From what callers pass as a prompt to token ids."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as ov_genai

from ov_kvcrush.core.perf_metrics import PerfMetrics
from ov_kvcrush.errors import RequestError, reason_of

_SHORTEST_LIMIT = 128  # tokens; no tokenizer of an LLM cuts below
_MORE_TEXT = " and so on"
_TAIL = 64  # characters before a text that decide how it is encoded
_MARKS = ("\n", "0")  # stand before a text where what stands there merges with it
_PIECE = 4000  # characters; to count the tokens of a text that is cut as a whole


def check_text(text: Any, *, empty: bool = False) -> None:
    """Raise RequestError unless `text` is a string that can be encoded, with something in it unless it may be empty."""
    if not isinstance(text, str):
        raise RequestError(f"prompt must be a string, got {type(text).__name__}")
    if not text and not empty:
        raise RequestError("prompt must have at least one token, got an empty text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError("prompt must be valid Unicode, got a text with lone surrogates") from None


class PromptEncoder:
    """Chat template and tokenizer, with the time they take noted in the metrics of the call."""

    def __init__(self, tokenizer: ov_genai.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._longest = 0  # tokens of the longest prompt so far that was not cut
        self._changes_begin: bool | None = None  # whether a text alone is not encoded as behind another

    def encode(self, text: str, metrics: PerfMetrics, add_special_tokens: bool = True) -> np.ndarray:
        """Tokens int64 (S,) of a text as it is. Raises RequestError if there are none."""
        check_text(text)
        start = time.perf_counter()
        ids = self._encode(text, add_special_tokens)
        if len(ids) > self._longest:
            if len(ids) >= _SHORTEST_LIMIT and self._is_cut(text, len(ids), add_special_tokens):
                pieces = [text[i : i + _PIECE] for i in range(0, len(text), _PIECE)]
                count = sum(len(self._encode(piece, False)) for piece in pieces)
                raise RequestError(
                    f"prompt must be shorter than the {len(ids)} tokens at which the model's tokenizer cuts a text, "
                    f"usually its context, got about {count} tokens"
                )
            self._longest = len(ids)
        metrics.tokenization_s.append(time.perf_counter() - start)
        return ids

    def encode_after(self, before: str, text: str, metrics: PerfMetrics) -> np.ndarray:
        """Tokens int64 (T,) of a text that stands behind `before`: as in the whole, wherever they do not merge.

        SentencePiece puts a space before each text that it encodes. So the text is encoded behind something, whose
        tokens are cut off. Raises RequestError for an empty text.
        """
        check_text(text)
        if self._changes_begin is None:
            mark, behind, alone = (self._encode(text, False) for text in (_MARKS[0], f"{_MARKS[0]}a", "a"))
            self._changes_begin = not np.array_equal(behind[len(mark) :], alone)
        if self._changes_begin:
            for head in filter(None, (before[-_TAIL:], *_MARKS)):
                ids = self._encode(head, False)
                whole = self.encode(head + text, metrics, add_special_tokens=False)
                if 0 < len(ids) < len(whole) and np.array_equal(whole[: len(ids)], ids):
                    return whole[len(ids) :]
        return self.encode(text, metrics, add_special_tokens=False)

    def _is_cut(self, text: str, num_tokens: int, add_special_tokens: bool) -> bool:
        """A tokenizer may cut long texts without a word; then more text gives no more tokens."""
        return len(self._encode(text + _MORE_TEXT, add_special_tokens)) == num_tokens

    def _encode(self, text: str, add_special_tokens: bool) -> np.ndarray:
        data = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).input_ids.data
        return np.array(data, np.int64).reshape(-1)

    def render(self, history: Any, metrics: PerfMetrics, *, answers: bool = True) -> str:
        """The text of a conversation, ending where the model is to answer; answers=False: after its last message."""
        start = time.perf_counter()
        try:
            text: str = self._tokenizer.apply_chat_template(history, add_generation_prompt=answers)
        except RuntimeError as error:
            raise RequestError(f"history must fit the model's chat template, got: {reason_of(error)}") from None
        metrics.chat_template_s.append(time.perf_counter() - start)
        return text

    def encode_user_text(self, text: str, config: ov_genai.GenerationConfig, metrics: PerfMetrics) -> np.ndarray:
        """Tokens of a prompt outside a chat: as the only message of a conversation if the model has a chat template."""
        is_message = config.apply_chat_template and bool(self._tokenizer.chat_template)
        check_text(text, empty=is_message)
        if is_message:
            rendered = self.render([{"role": "user", "content": text}], metrics)
            return self.encode(rendered, metrics, add_special_tokens=False)
        return self.encode(text, metrics)


def token_rows(inputs: Any) -> list[np.ndarray]:
    """The rows of an ov.Tensor or TokenizedInputs `[B, S]`, each without the padding that its mask marks."""
    mask = None
    if isinstance(inputs, ov_genai.TokenizedInputs):
        inputs, mask = inputs.input_ids, inputs.attention_mask.data
    data = inputs.data if isinstance(inputs, ov.Tensor) else np.asarray(inputs)
    if data.ndim == 1:
        data = data[None]
    if data.ndim != 2:
        raise RequestError(f"input ids must have the shape [batch, tokens], got {list(data.shape)}")
    return [row[mask[i].astype(bool)] if mask is not None else row for i, row in enumerate(data)]
