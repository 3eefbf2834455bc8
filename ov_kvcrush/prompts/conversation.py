"""The tokens of a conversation: a later turn goes on from the very tokens of the earlier ones, so their KV fits."""

from __future__ import annotations

import numpy as np

from ov_kvcrush.core.outputs import PerfMetrics
from ov_kvcrush.prompts.encoder import PromptEncoder


class ConversationTokens:
    """Text and tokens of a conversation up to its last answer.

    The text of an answer, encoded again, may give other tokens than those that were generated; their KV would be lost.
    So only the text after the answer is encoded, and joined to the known tokens.
    """

    def __init__(self, encoder: PromptEncoder) -> None:
        self._encoder = encoder
        self.clear()

    def clear(self) -> None:
        """Forget the conversation."""
        self._text = ""
        self._ids = np.zeros(0, np.int64)

    def encode(self, text: str, metrics: PerfMetrics) -> np.ndarray:
        """Tokens int64 (S,) of the whole rendered conversation `text`."""
        if self._text and text.startswith(self._text) and len(text) > len(self._text):
            rest = self._encoder.encode(text[len(self._text) :], metrics, add_special_tokens=False)
            return np.concatenate([self._ids, rest])
        return self._encoder.encode(text, metrics, add_special_tokens=False)

    def remember(self, prompt_text: str, prompt_ids: np.ndarray, answer_text: str, answer_ids: list[int]) -> None:
        """Note the prompt of a turn and its answer; `answer_ids` without the token that ended it."""
        self._text = prompt_text + answer_text
        self._ids = np.concatenate([prompt_ids, np.asarray(answer_ids, np.int64)])
