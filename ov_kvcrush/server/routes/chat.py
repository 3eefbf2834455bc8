"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ov_kvcrush.server import logprobs
from ov_kvcrush.server.answers import Answer, Piece, Question, begin
from ov_kvcrush.server.errors import ApiError
from ov_kvcrush.server.requests import read_json
from ov_kvcrush.server.running import answer_whole, stream_events
from ov_kvcrush.server.sampling import biases, generation_config
from ov_kvcrush.server.schemas.chat import ChatRequest
from ov_kvcrush.server.sse import DONE, event
from ov_kvcrush.server.state import ServerState, owner_of, state_of
from ov_kvcrush.server.tools.forced import call_grammar, must_call, offered
from ov_kvcrush.server.tools.formats import CallReader, ToolCall
from ov_kvcrush.server.tools.prompt import history_of

router = APIRouter(prefix="/v1")


@router.post("/chat/completions")
async def chat(request: Request) -> Response:
    """Answer a conversation."""
    body = await read_json(request, ChatRequest)
    state = state_of(request)
    state.check_model(body.model)
    question = question_of(state, body)
    form = _Form(state, body)
    asked = begin(state, owner_of(request), question)
    if body.stream:
        return await stream_events(request, asked, form.events)
    return JSONResponse(await answer_whole(request, asked, form.whole))


def question_of(state: ServerState, body: ChatRequest) -> Question:
    """What the engine is asked. Raises ApiError."""
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs must be left out without logprobs", "top_logprobs")
    if not state.pipeline.get_tokenizer().chat_template:
        raise ApiError(400, "model must have a chat template to chat, got one without; use /v1/completions", "model")
    tools = offered(body)
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    max_tokens = body.max_completion_tokens or body.max_tokens
    config = generation_config(state.pipeline.get_config(), body, max_tokens, num_logprobs)
    forced = must_call(body)
    if forced:
        config.structured_output_config = call_grammar(forced, state.tools)
    history = history_of(body.messages, tools, state.tools)
    return Question(history, config, body.model, body.stops, biases(body), body.context, tuple(body.protect or ()))


class _Form:
    """Answers in the form of this path."""

    def __init__(self, state: ServerState, body: ChatRequest) -> None:
        self._state = state
        self._body = body
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._reads_calls = bool(offered(body))

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._body.model,
            "choices": choices,
        }

    def _calls(self, reader: CallReader, num_told: int = 0) -> list[ToolCall]:
        calls = reader.calls[:1] if self._body.parallel_tool_calls is False else reader.calls
        return calls[num_told:]

    # -- as a whole ----------------------------------------------------------------------------------------------------

    async def whole(self, answer: Answer) -> dict[str, Any]:
        """One object."""
        choices = [self._choice(piece) for piece in await answer.whole()]
        return {
            **self._frame("chat.completion", choices),
            "usage": answer.usage(),
            "system_fingerprint": None,
            "kvcrush": answer.cost(),
        }

    def _choice(self, piece: Piece) -> dict[str, Any]:
        text, finish, calls = piece.text, piece.finish, list[ToolCall]()
        if self._reads_calls:
            reader = self._state.tools.reader()
            text = reader.add(text) + reader.end()
            calls = self._calls(reader)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message["content"] = text.strip() or None
            message["tool_calls"] = [call.as_message() for call in calls]
            finish = "tool_calls"
        return {"index": piece.index, "message": message, "logprobs": self._logprobs(piece), "finish_reason": finish}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return logprobs.of_chat(self._state.texts, piece.output, self._body.top_logprobs or 0)

    # -- as a stream ---------------------------------------------------------------------------------------------------

    async def events(self, answer: Answer, pieces: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
        """Chunks, the usage if it was asked for, and the mark of the end."""
        readers: dict[int, CallReader] = {}
        begun = set[int]()
        async for piece in pieces:
            if piece.index not in begun:
                begun.add(piece.index)
                yield self._chunk(answer, piece.index, {"role": "assistant", "content": ""})
            for delta, finish, scores in self._deltas(piece, readers):
                yield self._chunk(answer, piece.index, delta, finish, scores)
        if self._body.wants_usage:
            frame = self._frame("chat.completion.chunk", [])
            yield event({**frame, "usage": answer.usage(), "kvcrush": answer.cost()})
        yield DONE

    def _deltas(
        self, piece: Piece, readers: dict[int, CallReader]
    ) -> list[tuple[dict[str, Any], str | None, dict[str, Any] | None]]:
        """What changes with a piece: delta, why the sequence ended, log probabilities."""
        scores = self._logprobs(piece)
        if not self._reads_calls:
            delta = {"content": piece.text} if piece.text or not piece.finish else {}
            return [(delta, piece.finish, scores)] if delta.get("content") or scores or piece.finish else []
        reader = readers.setdefault(piece.index, self._state.tools.reader())
        num_told = len(reader.calls)
        text = reader.add(piece.text) + (reader.end() if piece.finish else "")
        if reader.calls:  # what stands between calls is white space
            text = text if text.strip() else ""
        found: list[tuple[dict[str, Any], str | None, dict[str, Any] | None]] = []
        if text or scores:
            found.append(({"content": text}, None, scores))
        for place, call in enumerate(self._calls(reader, num_told), num_told):
            found.append(({"tool_calls": [{"index": place, **call.as_message()}]}, None, None))
        if piece.finish:
            found.append(({}, "tool_calls" if reader.calls else piece.finish, None))
        return found

    def _chunk(
        self,
        answer: Answer,
        index: int,
        delta: dict[str, Any],
        finish: str | None = None,
        scores: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": scores, "finish_reason": finish}
        frame = self._frame("chat.completion.chunk", [choice])
        if self._body.wants_usage:
            frame["usage"] = answer.usage() if self._body.wants_usage_always else None
        return event(frame)
