"""How a request has tokens guessed that a step then checks: openvino_genai's fields, with their defaults."""

from __future__ import annotations

from dataclasses import dataclass

import openvino_genai as ov_genai

from ov_kvcrush.errors import RequestError

NUM_TOKENS = 5  # where a request does not say, as in openvino_genai
NGRAM_SIZE = 3
MAX_NGRAM_SIZE = 64


@dataclass(frozen=True)
class LookaheadParams:
    """num_tokens: guessed for a step at most. max_ngram_size: tokens of the end of the text that are looked for in it,
    at most. confidence: a draft model guesses no more behind a token that it gives less than this; 0 = it goes on.
    """

    num_tokens: int = NUM_TOKENS
    max_ngram_size: int = NGRAM_SIZE
    confidence: float = 0.0

    def __post_init__(self) -> None:
        rules = (
            ("num_assistant_tokens", self.num_tokens, self.num_tokens >= 1, "at least 1"),
            (
                "max_ngram_size",
                self.max_ngram_size,
                1 <= self.max_ngram_size <= MAX_NGRAM_SIZE,
                f"in 1..{MAX_NGRAM_SIZE}",
            ),
            ("assistant_confidence_threshold", self.confidence, 0 <= self.confidence < 1, "in [0, 1)"),
        )
        for name, value, holds, rule in rules:
            if not holds:
                raise RequestError(f"{name} must be {rule}, got {value!r}")

    @classmethod
    def from_config(cls, config: ov_genai.GenerationConfig) -> LookaheadParams:
        """What `config` says; 0 = the default. Raises RequestError naming the field."""
        num_tokens, confidence = config.num_assistant_tokens, config.assistant_confidence_threshold
        if num_tokens and confidence:
            raise RequestError(
                "num_assistant_tokens must be 0 where assistant_confidence_threshold is given, "
                f"got {num_tokens} and {confidence}"
            )
        return cls(num_tokens or NUM_TOKENS, config.max_ngram_size or NGRAM_SIZE, confidence)
