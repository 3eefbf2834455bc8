"""From what callers pass as a prompt to token ids."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as ov_genai

from ov_kvcrush.errors import RequestError
from ov_kvcrush.results import PerfMetrics


class PromptEncoder:
    """Chat template and tokenizer, with the time they take noted in the metrics of the call."""

    def __init__(self, tokenizer: ov_genai.Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, metrics: PerfMetrics, add_special_tokens: bool = True) -> np.ndarray:
        """Tokens int64 (S,) of a text as it is. Raises RequestError if there are none."""
        if not isinstance(text, str):
            raise RequestError(f"prompt must be a string, got {type(text).__name__}")
        if not text:
            raise RequestError("prompt must have at least one token, got an empty text")
        start = time.perf_counter()
        ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).input_ids.data.reshape(-1).copy()
        metrics.tokenization_s.append(time.perf_counter() - start)
        return np.asarray(ids, np.int64)

    def render(self, history: Any, metrics: PerfMetrics) -> str:
        """The text of a conversation, ending where the model is to answer."""
        start = time.perf_counter()
        text: str = self._tokenizer.apply_chat_template(history, add_generation_prompt=True)
        metrics.chat_template_s.append(time.perf_counter() - start)
        return text

    def encode_user_text(self, text: str, config: ov_genai.GenerationConfig, metrics: PerfMetrics) -> np.ndarray:
        """Tokens of a prompt outside a chat: as the only message of a conversation if the model has a chat template."""
        if isinstance(text, str) and text and config.apply_chat_template and self._tokenizer.chat_template:
            rendered = self.render([{"role": "user", "content": text}], metrics)
            return self.encode(rendered, metrics, add_special_tokens=False)
        return self.encode(text, metrics)


def rows_of(inputs: Any) -> list[np.ndarray]:
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
