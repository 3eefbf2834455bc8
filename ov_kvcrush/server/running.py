"""From a question to the response that answers it: counted, logged, and ended when the client goes away."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response

from ov_kvcrush.server.answers import Answer, Piece, figures
from ov_kvcrush.server.requests import unless_gone
from ov_kvcrush.server.sse import EventStream

T = TypeVar("T")
Asked = Coroutine[Any, Any, Answer]
Events = Callable[[Answer, AsyncIterator[Piece]], AsyncIterator[bytes]]


async def answer_whole(request: Request, asked: Asked, form: Callable[[Answer], Awaitable[T]]) -> T:
    """What `form` makes of the answer when it is complete."""

    async def run() -> T:
        answer = await asked
        try:
            return await form(answer)
        finally:
            _close(request, [answer])

    return await unless_gone(request, run())


async def stream_events(request: Request, asked: Asked, form: Events) -> Response:
    """The answer as `form` streams it. What goes wrong before the first token is an error with its status."""

    async def first() -> tuple[Answer, AsyncIterator[Piece], Piece | None]:
        answer = await asked
        try:
            pieces = answer.pieces()
            return answer, pieces, await anext(pieces, None)
        except BaseException:
            _close(request, [answer])
            raise

    answer, pieces, piece = await unless_gone(request, first())
    return EventStream(form(answer, _from(piece, pieces)), lambda: _close(request, [answer]))


async def _from(first: Piece | None, rest: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    if first is not None:
        yield first
    async for piece in rest:
        yield piece


def _close(request: Request, answers: list[Answer]) -> None:
    for answer in answers:
        answer.close()
    request.scope["state"]["figures"] = figures(answers)
