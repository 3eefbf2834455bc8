"""Calibration prompts to token ids, as a turn of a chat or as a context and its question."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.core.eviction import ReplayPrompt
from ov_kvcrush.core.perf_metrics import PerfMetrics
from ov_kvcrush.core.sampling_params import model_end_tokens
from ov_kvcrush.errors import CrushError
from ov_kvcrush.pipelines.loading import load_generation_config, load_tokenizer
from ov_kvcrush.prompts.context import BETWEEN, ContextEncoder
from ov_kvcrush.prompts.encoder import PromptEncoder

_MARK = "\u2042"  # stands for the text in the rendered template


class PromptRenderer:
    """The tokenizer of a model folder. ends: tokens that end an answer. Raises ModelError."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_tokenizer(folder, {})
        self._contexts = ContextEncoder(PromptEncoder(self._tokenizer), self._tokenizer)
        config = load_generation_config(folder, self._tokenizer)
        eos = {config.eos_token_id} if config.eos_token_id >= 0 else set()
        self.ends: set[int] = set(model_end_tokens(config)) | eos

    def render(self, text: str, max_tokens: int) -> np.ndarray:
        """int64 (S,): the text as a user's turn, at most `max_tokens`; a longer text loses its middle."""
        before, after = self._around()
        ids = _without_middle(self._encode(text), max_tokens - len(before) - len(after))
        return np.concatenate([before, ids, after])

    def render_context(self, text: str, question: str, max_tokens: int) -> tuple[np.ndarray, np.ndarray, int]:
        """A context int64 (S,), the question behind it int64 (T,), and how many tokens stand before the text itself.

        As `compress` and a question to what it makes have them; together at most `max_tokens`. A longer text loses its
        middle. Raises RequestError for a text that cannot be a context.
        """
        metrics = PerfMetrics()
        content, ids, head = self._contexts.open(text, metrics)
        asked = question if content.is_open else BETWEEN + question
        suffix = self._contexts.question(ids, content, asked, metrics)[len(ids) :]
        room = max_tokens - head - len(suffix)
        if room < 1:
            raise CrushError(f"tokens must leave room for the text beside its question, got {max_tokens}")
        return np.concatenate([ids[:head], _without_middle(ids[head:], room)]), suffix, head

    def replay_prompt(self) -> ReplayPrompt:
        """What asks for a context's repetition."""
        return self._contexts.replay_prompt(PerfMetrics())

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


def _without_middle(ids: np.ndarray, room: int) -> np.ndarray:
    """At most `room` of the tokens, from both ends."""
    if len(ids) <= room:
        return ids
    return np.concatenate([ids[: room // 2], ids[len(ids) - (room - room // 2) :]])
