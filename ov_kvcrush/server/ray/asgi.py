"""A request that travels to another process, and an ASGI app that answers it there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ov_kvcrush.server.ray.routing import Affinity

Headers = tuple[tuple[bytes, bytes], ...]
Message = MutableMapping[str, Any]
App = Callable[
    [dict[str, Any], Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]


@dataclass(frozen=True)
class HttpRequest:
    """A request with its whole body.

    affinity, holder: for the router: what ties it, and which replica answered last under that, if that is known.
    """

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes
    client: tuple[str, int] | None = None
    affinity: Affinity | None = None
    holder: str | None = None

    def scope(self) -> dict[str, Any]:
        """It as ASGI has it."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": "http",
            "method": self.method,
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": self.query,
            "headers": list(self.headers),
            "client": self.client,
            "server": None,
            "state": {},
        }


@dataclass(frozen=True)
class ResponseStart:
    """The first of what answers a request; pieces of the body follow. replica: who answers."""

    status: int
    headers: Headers
    replica: str

    def header(self, name: bytes) -> bytes:
        """The value of a header; b"" without it."""
        return next((value for key, value in self.headers if key.lower() == name), b"")


async def answer(app: App, request: HttpRequest, replica: str) -> AsyncIterator[ResponseStart | bytes]:
    """Have an app answer a request: the start, then the pieces of the body as they come.

    Who closes the iterator is a client that went away: the app is told so, and ended if it goes on.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()
    is_read = False

    async def receive() -> Message:
        nonlocal is_read
        if not is_read:
            is_read = True
            return {"type": "http.request", "body": request.body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if gone.is_set():
            raise OSError("the client went away")
        sent.put_nowait(message)

    async def run() -> None:
        try:
            await app(request.scope(), receive, send)
        finally:
            sent.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while (message := await sent.get()) is not None:
            if message["type"] == "http.response.start":
                headers = tuple((bytes(name), bytes(value)) for name, value in message.get("headers", ()))
                yield ResponseStart(message["status"], headers, replica)
            elif message["type"] == "http.response.body" and message.get("body"):
                yield bytes(message["body"])
        await task
    finally:
        gone.set()
        if not task.done():
            _, running = await asyncio.wait([task], timeout=1)
            if running:
                task.cancel()
        with suppress(BaseException):
            await task
