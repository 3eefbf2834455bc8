"""POST /v1/responses: text in, text out; nothing of it is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ov_kvcrush.server.answers import Answer, Piece, Question, begin
from ov_kvcrush.server.requests import read_json
from ov_kvcrush.server.routes.chat import question_of
from ov_kvcrush.server.running import answer_whole, stream_events
from ov_kvcrush.server.schemas.chat import ChatRequest, Message
from ov_kvcrush.server.schemas.common import JsonSchema, ResponseFormat
from ov_kvcrush.server.schemas.responses import InputMessage, ResponseRequest
from ov_kvcrush.server.sse import event
from ov_kvcrush.server.state import ServerState, owner_of, state_of

router = APIRouter(prefix="/v1")


@router.post("/responses")
async def responses(request: Request) -> Response:
    """Answer a text or a conversation."""
    body = await read_json(request, ResponseRequest)
    state = state_of(request)
    state.check_model(body.model)
    form = _Form(state, body)
    asked = begin(state, owner_of(request), _question(state, body))
    if body.stream:
        return await stream_events(request, asked, form.events)
    return JSONResponse(await answer_whole(request, asked, form.whole))


def _question(state: ServerState, body: ResponseRequest) -> Question:
    """As a chat is asked."""
    given = [InputMessage(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    messages = [Message(role="system", content=body.instructions)] if body.instructions is not None else []
    messages += [Message(role=x.role, content=_text(x)) for x in given]
    return question_of(
        state,
        ChatRequest(
            model=body.model,
            messages=messages,
            max_completion_tokens=body.max_output_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            seed=body.seed,
            response_format=_format(body),
            context=body.context,
        ),
    )


def _text(message: InputMessage) -> str:
    content = message.content
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _format(body: ResponseRequest) -> ResponseFormat | None:
    wanted = body.text.format if body.text else None
    if wanted is None:
        return None
    schema = None
    if wanted.type == "json_schema":
        schema = JsonSchema.model_validate({"name": wanted.name, "schema": wanted.schema_, "strict": wanted.strict})
    return ResponseFormat(type=wanted.type, json_schema=schema)


class _Form:
    """Answers in the form of this path."""

    def __init__(self, state: ServerState, body: ResponseRequest) -> None:
        self._state = state
        self._body = body
        self._id = f"resp_{uuid.uuid4().hex}"
        self._item = f"msg_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._number = -1

    def _object(self, status: str, output: list[dict[str, Any]], answer: Answer | None = None) -> dict[str, Any]:
        body = self._body
        used = answer.usage() if answer else None
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": reason,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": body.model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": body.text.model_dump(by_alias=True, exclude_none=True)
            if body.text
            else {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": {
                "input_tokens": used["prompt_tokens"],
                "input_tokens_details": used["prompt_tokens_details"],
                "output_tokens": used["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": used["total_tokens"],
            }
            if used
            else None,
            "metadata": body.metadata or {},
            **({"kvcrush": answer.cost()} if answer else {}),
        }

    @staticmethod
    def _part(text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _ended(self, text: str, finish: str | None, answer: Answer) -> dict[str, Any]:
        status = "incomplete" if finish == "length" else "completed"
        return self._object(status, [self._message(status, [self._part(text)])], answer)

    async def whole(self, answer: Answer) -> dict[str, Any]:
        """One object."""
        piece = (await answer.whole())[0]
        return self._ended(piece.text, piece.finish, answer)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **fields}, kind)

    async def events(self, answer: Answer, pieces: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
        """The events of a response with one message of one part."""
        yield self._event("response.created", response=self._object("in_progress", []))
        yield self._event("response.in_progress", response=self._object("in_progress", []))
        yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress", []))
        place: dict[str, Any] = {"item_id": self._item, "output_index": 0, "content_index": 0}
        yield self._event("response.content_part.added", **place, part=self._part(""))
        text, finish = "", None
        async for piece in pieces:
            finish = piece.finish or finish
            if piece.text:
                text += piece.text
                yield self._event("response.output_text.delta", **place, delta=piece.text, logprobs=[])
        ended = self._ended(text, finish, answer)
        yield self._event("response.output_text.done", **place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **place, part=self._part(text))
        yield self._event("response.output_item.done", output_index=0, item=ended["output"][0])
        yield self._event(f"response.{ended['status']}", response=ended)
