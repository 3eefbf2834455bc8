"""One request of the engine: begun, read as it grows or as a whole, counted at its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as ov_genai

from ov_kvcrush.contexts.context import Context
from ov_kvcrush.core.end_reason import EndReason
from ov_kvcrush.core.outputs import GenerationOutput, RequestStats
from ov_kvcrush.pipelines.backend import Handle
from ov_kvcrush.server.detokenizer import TextStream
from ov_kvcrush.server.keys import LOCAL
from ov_kvcrush.server.state import ServerState

_REASONS = {"STOP": "stop", "LENGTH": "length"}


@dataclass(frozen=True, eq=False)
class Question:
    """What the engine is asked. prompt: a text, a conversation, or tokens int64 (S,). context: its id.

    model: by its name in the API, which may be an adapter's.
    """

    prompt: str | ov_genai.ChatHistory | np.ndarray
    config: ov_genai.GenerationConfig
    model: str
    stops: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    context: str | None = None
    protect: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """More of one sequence: its text and its tokens, of which the text may lag behind. finish: why it ended."""

    index: int
    text: str
    output: GenerationOutput
    finish: str | None


class Answer:
    """A request that runs. Whoever has it calls `close` at the end, whatever that is."""

    def __init__(self, state: ServerState, handle: Handle, question: Question) -> None:
        self._state = state
        self._handle = handle
        self._question = question
        self._is_closed = False
        self._num_read = 0

    @property
    def stats(self) -> RequestStats:
        """What it has taken so far."""
        return self._handle.get_stats()

    @property
    def end(self) -> str:
        """Why it has ended, or is ended now."""
        return (self._handle.end_reason or EndReason.CANCELLED).value

    @property
    def num_read(self) -> int:
        """Tokens of all its pieces so far."""
        return self._num_read

    async def pieces(self) -> AsyncIterator[Piece]:
        """What it says, as it comes. Raises what kept it from a whole answer."""
        streams: dict[int, TextStream] = {}
        async for outputs in self._handle:  # type: ignore[attr-defined]
            for index, output in outputs.items():
                stream = streams.get(index)
                if stream is None:
                    stream = streams[index] = self._state.texts.stream(self._question.stops)
                self._num_read += len(output.generated_ids)
                text, finish = stream.add(output.generated_ids), _REASONS.get(output.finish_reason.name)
                if finish is not None:
                    text += stream.end(self._handle.outputs()[index].text if self._question.stops else None)
                if text or finish or output.generated_ids:
                    yield Piece(index, text, output, finish)

    async def whole(self) -> list[Piece]:
        """All sequences when they have ended. Raises what kept it from a whole answer."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        handle = self._handle

        def notice() -> None:
            if handle.end_reason is not None and not loop.is_closed():
                loop.call_soon_threadsafe(ended.set)

        handle.on_change(notice)  # type: ignore[attr-defined]
        await ended.wait()
        handle.raise_error()
        found = []
        for index, output in enumerate(handle.outputs()):
            text = output.text if output.text is not None else self._state.texts.decode(output.generated_ids)
            found.append(Piece(index, text, output, _REASONS.get(output.finish_reason.name, "stop")))
            self._num_read += len(output.generated_ids)
        return found

    def usage(self, num_generated: int | None = None) -> dict[str, Any]:
        """Tokens, as the API counts them."""
        stats = self.stats
        made = self._num_read if num_generated is None else num_generated
        return {
            "prompt_tokens": stats.num_input_tokens,
            "completion_tokens": made,
            "total_tokens": stats.num_input_tokens + made,
            "prompt_tokens_details": {"cached_tokens": stats.num_reused_tokens},
        }

    def cost(self) -> dict[str, Any]:
        """What it took, beyond OpenAI's API: seconds, tokens whose KV is held, bytes and those of a bf16 cache."""
        stats = self.stats
        first = stats.token_times[0] if stats.token_times else []
        num_tokens = stats.num_input_tokens + sum(map(len, stats.token_times))
        spent = (first[-1] - first[0]) / (len(first) - 1) if len(first) > 1 else None
        return {
            "ttft_s": round(first[0] - stats.arrival, 4) if first else None,
            "tpot_s": None if spent is None else round(spent, 5),
            "num_tokens": num_tokens,
            "kept_tokens": stats.kept_tokens,
            "reused_tokens": stats.num_reused_tokens,
            "kv_bytes": stats.kv_bytes,
            "bf16_bytes": self._state.pipeline.bf16_kv_bytes(num_tokens),
        }

    def close(self) -> None:
        """Count it; end it if it runs."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._handle.end_reason is None:
            self._handle.cancel()
        made = sum(map(len, self.stats.token_times))
        self._state.metrics.note(self.end, self.stats, made, has_context=self._question.context is not None)


async def begin(state: ServerState, owner: str, question: Question) -> Answer:
    """Have the engine run a question. Raises what `add_request` does, and 404 for a context that is not there."""
    context = await state.contexts.lease(owner, question.context) if question.context is not None else None
    try:
        handle = await state.encode(_add, state, owner, question, context)
    finally:
        if context is not None:
            context.close()
    return Answer(state, handle, question)


def _add(state: ServerState, owner: str, question: Question, context: Context | None) -> Handle:
    prompt: Any = question.prompt
    if isinstance(prompt, np.ndarray):
        prompt = ov.Tensor(np.ascontiguousarray(prompt[None], np.int64))
    adapters = state.adapters.get(question.model)
    handle = state.pipeline.add_request(
        state.next_number(),
        prompt,
        question.config,
        protect=question.protect,
        context=context,
        timeout_s=state.settings.request_timeout_s,
        logit_bias=question.logit_bias,
        cache_salt=salt_of(state, owner),
        **({} if adapters is None else {"adapters": adapters}),
    )
    handle.drive()
    return handle


def salt_of(state: ServerState, owner: str) -> str:
    """Whose cached prefixes an owner's prompts may go on from."""
    return "" if state.settings.share_prefixes or owner == LOCAL else owner


def figures(answers: list[Answer]) -> dict[str, Any]:
    """What the log says of the answers of one request."""
    stats = [answer.stats for answer in answers]
    firsts = [times[0] - s.arrival for s in stats for times in s.token_times if times]
    return {
        "prompt_tokens": sum(s.num_input_tokens for s in stats),
        "reused_tokens": sum(s.num_reused_tokens for s in stats),
        "completion_tokens": sum(len(times) for s in stats for times in s.token_times),
        "ttft": round(min(firsts), 4) if firsts else None,
        "ends": [answer.end for answer in answers],
    }
