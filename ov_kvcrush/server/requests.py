"""Bodies of requests, and clients that go away before they have their answer."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel

from ov_kvcrush.server.errors import ApiError

Body = TypeVar("Body", bound=BaseModel)
T = TypeVar("T")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def read_json(request: Request, kind: type[Body]) -> Body:
    """The body, checked. Raises ValidationError, 415 for what does not say that it is JSON."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":  # which no page of another site can send without being allowed to
        raise ApiError(415, f"Content-Type must be application/json, got {media or 'none'}")
    return kind.model_validate_json(await request.body())


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns or raises; cancelled, and ClientGone is raised, when the client goes away."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            if not one.done():
                one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
