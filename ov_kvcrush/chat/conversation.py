"""One conversation with a model: its messages, and turns that Ctrl-C can stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openvino_genai import ChatHistory, GenerationFinishReason, GenerationStatus, Tokenizer

from ov_kvcrush.chat.context_option import ContextFigures, check_target
from ov_kvcrush.contexts.context import Context
from ov_kvcrush.core.outputs import DecodedResults, KeptTokens
from ov_kvcrush.core.perf_metrics import PerfMetrics
from ov_kvcrush.errors import RequestError
from ov_kvcrush.pipelines.llm import LLMPipeline
from ov_kvcrush.prompts.conversation import KnownTokens

_Stream = Callable[[str], bool]


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

    figures: ContextFigures | None = None  # of what it began with

    def __init__(self, pipe: LLMPipeline, system: str, options: dict[str, Any]) -> None:
        self._pipe = pipe
        self._options = options
        self._system = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._system)
        self._history = ChatHistory()  # one object for all turns: the pipeline knows its tokens by it
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
        with stop_on_interrupt(self._pipe) as interrupt:

            def stream(text: str) -> bool:
                if write:
                    write(text)
                return interrupt.pressed  # for a Ctrl-C that came before there was a request to stop

            results = self._generate(question, stream)
        text = results.texts[0]
        self._end_turn(question, text, is_kept=bool(text) or not interrupt.pressed)
        metrics = results.perf_metrics
        reason = _reason(results.finish_reasons[0], interrupt)
        return Turn(text, reason, metrics, self._kv_bytes_per_token(metrics), results.kept[0])

    def save(self, path: Path) -> Context:
        """Write the conversation to a file that --context reads; returns what was written.

        Raises RequestError for one that did not begin with a context, and CrushError where it cannot be written.
        """
        raise RequestError("conversation must have begun with --context to be saved, got one that did not")

    def _generate(self, question: str, stream: _Stream) -> DecodedResults:
        asked = [*self._messages, {"role": "user", "content": question}]
        self._history.set_messages(asked)
        inputs = self._history if self.is_chat else [question]
        results: DecodedResults = self._pipe.generate(inputs, streamer=stream, **self._options)
        return results

    def _end_turn(self, question: str, answer: str, is_kept: bool) -> None:
        if is_kept:
            turn = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
            self._messages = [*self._messages, *turn]

    def _kv_bytes_per_token(self, metrics: PerfMetrics) -> float | None:
        # An engine that does not tell what it keeps does not tell whose its bytes are.
        return metrics.kv_bytes / metrics.kept_tokens if metrics.kept_tokens and metrics.kv_bytes else None


class ChatPipeline(LLMPipeline):
    """LLMPipeline that also holds what the last turn of a chat took: `generate` returns its text alone."""

    last_turn: DecodedResults

    def _generate_turn(self, *args: Any, **kwargs: Any) -> tuple[DecodedResults, GenerationStatus, KnownTokens]:
        result = super()._generate_turn(*args, **kwargs)
        self.last_turn = result[0]
        return result


class ContextConversation(Conversation):
    """A conversation that goes on from a context; `reset` takes it back there."""

    def __init__(self, pipe: ChatPipeline, context: Context, figures: ContextFigures, options: dict[str, Any]) -> None:
        super().__init__(pipe, "", options)
        self._chat = pipe
        self._context = context
        self._before = context  # of the last question
        self.figures = figures
        if self.is_chat:
            pipe.start_chat(context=context)

    def reset(self) -> None:
        """Forget all but the context."""
        self._chat.start_chat(context=self._context)

    def save(self, path: Path) -> Context:
        """Write the conversation to a file that --context reads; returns what was written. Raises CrushError."""
        context = self._chat.chat_context()
        context.save(check_target("file", path))
        return context

    def _generate(self, question: str, stream: _Stream) -> DecodedResults:
        if not self.is_chat:
            results: DecodedResults = self._chat.generate(
                [question], streamer=stream, context=self._context, **self._options
            )
            return results
        self._before = self._chat.chat_context()
        self._chat.generate(question, streamer=stream, **self._options)
        return self._chat.last_turn

    def _end_turn(self, question: str, answer: str, is_kept: bool) -> None:
        if not is_kept and self.is_chat:
            self._chat.start_chat(context=self._before)


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
