"""From questions to the response that answers them: counted, logged, and ended when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response

from ov_kvcrush.server.answers import Answer, Piece, figures
from ov_kvcrush.server.requests import unless_gone
from ov_kvcrush.server.sse import EventStream

T = TypeVar("T")
Asked = Coroutine[Any, Any, Answer]
Numbered = AsyncIterator[tuple[int, Piece]]
Events = Callable[[Answer, AsyncIterator[Piece]], AsyncIterator[bytes]]


async def answer_whole(request: Request, asked: Asked, form: Callable[[Answer], Awaitable[T]]) -> T:
    """What `form` makes of the answer when it is complete."""
    return await answer_all(request, [asked], lambda answers: form(answers[0]))


async def stream_events(request: Request, asked: Asked, form: Events) -> Response:
    """The answer as `form` streams it. What goes wrong before the first token is an error with its status."""
    return await stream_all(request, [asked], lambda answers, pieces: form(answers[0], _unnumbered(pieces)))


async def answer_all(request: Request, asked: Sequence[Asked], form: Callable[[list[Answer]], Awaitable[T]]) -> T:
    """The same for several questions at once."""

    async def run() -> T:
        answers: list[Answer] = []
        try:
            await _begin_all(asked, answers)
            return await form(answers)
        finally:
            _close(request, answers)

    return await unless_gone(request, run())


async def stream_all(
    request: Request, asked: Sequence[Asked], form: Callable[[list[Answer], Numbered], AsyncIterator[bytes]]
) -> Response:
    """The same as a stream."""
    answers: list[Answer] = []

    async def first() -> tuple[Numbered, tuple[int, Piece] | None]:
        await _begin_all(asked, answers)
        pieces = _merged([answer.pieces() for answer in answers])
        return pieces, await anext(pieces, None)

    try:
        pieces, one = await unless_gone(request, first())
    except BaseException:
        _close(request, answers)
        raise
    return EventStream(form(answers, _from(one, pieces)), lambda: _close(request, answers))


async def _begin_all(asked: Sequence[Asked], answers: list[Answer]) -> None:
    """One by one; none of the others is begun when one is refused."""
    rest = list(asked)
    try:
        while rest:
            answers.append(await rest.pop(0))
    finally:
        for one in rest:
            one.close()


async def _merged(streams: list[AsyncIterator[Piece]]) -> Numbered:
    """Pieces of all, as they come. Raises what the first to fail raises."""
    if len(streams) == 1:
        async for piece in streams[0]:
            yield 0, piece
        return
    tasks = {asyncio.ensure_future(_next(stream)): number for number, stream in enumerate(streams)}
    try:
        while tasks:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number, found = tasks.pop(task), task.result()
                if found is not None:
                    tasks[asyncio.ensure_future(_next(streams[number]))] = number
                    yield number, found
    finally:
        for task in tasks:
            task.cancel()


async def _next(stream: AsyncIterator[Piece]) -> Piece | None:
    return await anext(stream, None)


async def _from(first: tuple[int, Piece] | None, rest: Numbered) -> Numbered:
    if first is not None:
        yield first
    async for one in rest:
        yield one


async def _unnumbered(pieces: Numbered) -> AsyncIterator[Piece]:
    async for _, piece in pieces:
        yield piece


def _close(request: Request, answers: list[Answer]) -> None:
    for answer in answers:
        answer.close()
    if answers:
        request.scope["state"]["figures"] = figures(answers)
