"""One conversation with a model: its messages, and turns that Ctrl-C can stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from openvino_genai import ChatHistory, GenerationFinishReason, Tokenizer

from ov_kvcrush.errors import RequestError
from ov_kvcrush.llm_pipeline import LLMPipeline
from ov_kvcrush.results import KeptTokens, PerfMetrics


@dataclass(frozen=True)
class Turn:
    """One answer. finish_reason: "stop", "length" (max_new_tokens reached) or "interrupted" (Ctrl-C).

    kv_bytes_per_token: of all tokens that a head kept when the answer ended; None where the bytes are not those of this
    answer, because the engine tells what it allocated. kept: None where nothing was evicted.
    """

    text: str
    finish_reason: str
    metrics: PerfMetrics
    kv_bytes_per_token: float | None = None
    kept: KeptTokens | None = None

    @property
    def num_text_tokens(self) -> int:
        """Of prompt and answer, without the last one of the answer: it is never run, so it has no KV."""
        return self.metrics.num_input_tokens + self.metrics.num_generated_tokens - 1


@dataclass
class Interrupt:
    """Whether Ctrl-C was pressed while an answer was generated."""

    pressed: bool = False


class Conversation:
    """Messages up to now; `ask` adds a question and its answer, together or not at all.

    options: as for `LLMPipeline.generate`.
    Raises RequestError if `system` is given and the model has no chat template to put it in.
    """

    def __init__(self, pipe: LLMPipeline, system: str, options: dict[str, Any]) -> None:
        self._pipe = pipe
        self._options = options
        self._system = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._system)
        self.is_chat = bool(pipe.get_tokenizer().chat_template)
        if system and not self.is_chat:
            raise RequestError(f"system must be empty for a model without a chat template, got {system!r}")

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self._pipe.get_tokenizer()

    def reset(self) -> None:
        """Forget all messages but the system message, and give their KV back."""
        self._messages = list(self._system)
        self._pipe.finish_chat()

    def ask(self, question: str, write: Callable[[str], None] | None = None) -> Turn:
        """Generate the answer to `question`, streaming its text to `write`. Ctrl-C ends it early; what is there counts.

        A model without a chat template goes on from the text of the question. Raises RequestError; then, and when
        nothing was generated, the conversation stays as it was.
        """
        messages = [*self._messages, {"role": "user", "content": question}]
        inputs = ChatHistory(messages) if self.is_chat else [question]
        with stop_on_interrupt(self._pipe) as interrupt:

            def stream(text: str) -> bool:
                if write:
                    write(text)
                return interrupt.pressed  # for a Ctrl-C that came before there was a request to stop

            results = self._pipe.generate(inputs, streamer=stream, **self._options)
        text = results.texts[0]
        if text or not interrupt.pressed:
            self._messages = [*messages, {"role": "assistant", "content": text}]
        metrics = results.perf_metrics
        reason = _reason(results.finish_reasons[0], interrupt)
        return Turn(text, reason, metrics, self._kv_bytes_per_token(metrics), results.kept[0])

    def _kv_bytes_per_token(self, metrics: PerfMetrics) -> float | None:
        # An engine that does not tell what it keeps does not tell whose its bytes are.
        return metrics.kv_bytes / metrics.kept_tokens if metrics.kept_tokens and metrics.kv_bytes else None


@contextmanager
def stop_on_interrupt(pipe: LLMPipeline) -> Iterator[Interrupt]:
    """Within this context Ctrl-C ends the running `generate` instead of raising KeyboardInterrupt. Main thread only."""
    interrupt = Interrupt()

    def on_signal(*_: object) -> None:
        interrupt.pressed = True
        pipe.stop()

    previous = signal.signal(signal.SIGINT, on_signal)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)


def _reason(reason: GenerationFinishReason, interrupt: Interrupt) -> str:
    if interrupt.pressed:
        return "interrupted"
    return "length" if reason == GenerationFinishReason.LENGTH else "stop"
