"""Calibration prompts to token ids, as a turn of a chat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.core.sampling_params import model_end_tokens
from ov_kvcrush.pipelines.loading import load_generation_config, load_tokenizer

_MARK = "\u2042"  # stands for the text in the rendered template


class PromptRenderer:
    """The tokenizer of a model folder. ends: tokens that end an answer. Raises ModelError."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_tokenizer(folder, {})
        config = load_generation_config(folder, self._tokenizer)
        eos = {config.eos_token_id} if config.eos_token_id >= 0 else set()
        self.ends: set[int] = set(model_end_tokens(config)) | eos

    def render(self, text: str, max_tokens: int) -> np.ndarray:
        """int64 (S,): the text as a user's turn, at most `max_tokens`; a longer text loses its middle."""
        before, after = self._around()
        ids = self._encode(text)
        room = max_tokens - len(before) - len(after)
        if len(ids) > room:
            ids = np.concatenate([ids[: room // 2], ids[len(ids) - (room - room // 2) :]])
        return np.concatenate([before, ids, after])

    def _around(self) -> tuple[np.ndarray, np.ndarray]:
        if not self._tokenizer.chat_template:
            return self._encode("", special=True), np.zeros(0, np.int64)
        turn = ov_genai.ChatHistory([{"role": "user", "content": _MARK}])
        rendered = self._tokenizer.apply_chat_template(turn, add_generation_prompt=True)
        before, _, after = rendered.partition(_MARK)
        return self._encode(before), self._encode(after)

    def _encode(self, text: str, *, special: bool = False) -> np.ndarray:
        if not text and not special:
            return np.zeros(0, np.int64)
        return np.array(self._tokenizer.encode(text, add_special_tokens=special).input_ids.data, np.int64).reshape(-1)
