"""POST /v1/completions: one prompt or several, each as it is."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ov_kvcrush.server import logprobs
from ov_kvcrush.server.answers import Answer, Piece, Question, begin
from ov_kvcrush.server.errors import ApiError
from ov_kvcrush.server.requests import read_json
from ov_kvcrush.server.running import answer_all, stream_all
from ov_kvcrush.server.sampling import biases, generation_config
from ov_kvcrush.server.schemas.completions import CompletionRequest
from ov_kvcrush.server.sse import DONE, event
from ov_kvcrush.server.state import ServerState, owner_of, state_of

router = APIRouter(prefix="/v1")
_DEFAULT_TOKENS = 16  # as OpenAI's API has it


@router.post("/completions")
async def completions(request: Request) -> Response:
    """Go on from each prompt."""
    body = await read_json(request, CompletionRequest)
    state = state_of(request)
    state.check_model(body.model)
    questions = questions_of(state, body)
    form = _Form(state, body, [question.prompt for question in questions])
    asked = [begin(state, owner_of(request), question) for question in questions]
    if body.stream:
        return await stream_all(request, asked, form.events)
    return JSONResponse(await answer_all(request, asked, form.whole))


def questions_of(state: ServerState, body: CompletionRequest) -> list[Question]:
    """One for each prompt. Raises ApiError."""
    n = body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise ApiError(400, f"best_of must be n={n}, got {body.best_of}: the best are not chosen", "best_of")
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "logprobs must be left out with echo: those of prompts are not computed", "logprobs")
    max_tokens = _DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    found = []
    for prompt in _prompts(body):
        config = generation_config(state.pipeline.get_config(), body, max_tokens, body.logprobs)
        found.append(
            Question(prompt, config, body.model, body.stops, biases(body), body.context, tuple(body.protect or ()))
        )
    return found


def _prompts(body: CompletionRequest) -> list[str | np.ndarray]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [np.array(prompt, np.int64)]
    return [x if isinstance(x, str) else np.array(x, np.int64) for x in prompt]


class _Form:
    """Answers in the form of this path: choices are numbered through all prompts."""

    def __init__(self, state: ServerState, body: CompletionRequest, prompts: list[Any]) -> None:
        self._state = state
        self._body = body
        self._n = body.n or 1
        self._echoes = [self._echo(prompt) if body.echo else "" for prompt in prompts]
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._lengths: dict[int, int] = {}  # of what was shown of each choice

    def _echo(self, prompt: str | np.ndarray) -> str:
        return prompt if isinstance(prompt, str) else self._state.texts.decode(prompt.tolist())

    def _frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._body.model,
            "choices": choices,
        }

    def _choice(self, number: int, piece: Piece) -> dict[str, Any]:
        index = number * self._n + piece.index
        text = piece.text
        if index not in self._lengths:
            text, self._lengths[index] = self._echoes[number] + text, 0
        scores = None
        if self._body.logprobs is not None:
            offset = self._lengths[index]
            scores = logprobs.of_completion(self._state.texts, piece.output, self._body.logprobs, offset)
        self._lengths[index] += len(text)
        return {"index": index, "text": text, "logprobs": scores, "finish_reason": piece.finish}

    async def whole(self, answers: list[Answer]) -> dict[str, Any]:
        """One object."""
        found = await asyncio.gather(*(answer.whole() for answer in answers))
        choices = [self._choice(number, piece) for number, pieces in enumerate(found) for piece in pieces]
        return {**self._frame(choices), "usage": usage_of(answers), "kvcrush": answers[0].cost()}

    async def events(self, answers: list[Answer], pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[bytes]:
        """Chunks, the usage if it was asked for, and the mark of the end."""
        async for number, piece in pieces:
            if not (piece.text or piece.finish or self._body.logprobs is not None):
                continue
            frame = self._frame([self._choice(number, piece)])
            if self._body.wants_usage:
                frame["usage"] = usage_of(answers) if self._body.wants_usage_always else None
            yield event(frame)
        if self._body.wants_usage:
            yield event({**self._frame([]), "usage": usage_of(answers), "kvcrush": answers[0].cost()})
        yield DONE


def usage_of(answers: list[Answer]) -> dict[str, Any]:
    """The sum of several."""
    parts = [answer.usage() for answer in answers]
    total: dict[str, Any] = {
        name: sum(part[name] for part in parts) for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    }
    cached = sum(part["prompt_tokens_details"]["cached_tokens"] for part in parts)
    return {**total, "prompt_tokens_details": {"cached_tokens": cached}}
