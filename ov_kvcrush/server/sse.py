"""Answers as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ov_kvcrush.server.errors import api_error
from ov_kvcrush.server.logs import tell

DONE = b"data: [DONE]\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(value: dict[str, Any], name: str | None = None) -> bytes:
    """One of them."""
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return (b"event: " + name.encode() + b"\n" if name else b"") + b"data: " + data + b"\n\n"


class EventStream(StreamingResponse):
    """Events to the end, or until the client goes away; `close` is called then, whatever happened."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(_guarded(events), media_type="text/event-stream", headers=_HEADERS)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _guarded(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """With an error, for which there is no status any more, as the last event."""
    try:
        async for one in events:
            yield one
    except Exception as error:
        found = api_error(error)
        if found.status >= 500:
            tell("stream broken", 40, error)
        yield event(found.body())
