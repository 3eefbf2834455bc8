"""The process of a server: signals that let running requests end, and connections that say nothing."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ov_kvcrush.server.edge import Drain
from ov_kvcrush.server.logs import tell
from ov_kvcrush.server.settings import ServerSettings

_BACKLOG = 1024
_LINGER_S = 2.0
_LINGER_BYTES = 1 << 20


class _Closing:
    """A transport that asks before it closes: `linger` returns whether it closes later."""

    def __init__(self, transport: asyncio.Transport, linger: Callable[[asyncio.Transport], bool]) -> None:
        self._transport = transport
        self._linger = linger
        self._is_closing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Of asyncio.BaseTransport."""
        return self._is_closing or self._transport.is_closing()

    def close(self) -> None:
        """Of asyncio.BaseTransport; the second time in any case."""
        if self.is_closing() or not self._linger(self._transport):
            self._transport.close()
        self._is_closing = True


class ImpatientProtocol(HttpToolsProtocol):
    """Closes a connection that has not sent the whole head of a request in time; uvicorn waits for ever.

    A client that is still sending when it is refused would lose the answer by a reset (RFC 9112, 9.6): of what it
    sends a little more is read, and dropped.
    """

    _is_whole = True  # no body is being sent
    _num_dropped: int | None = None  # bytes, once it has its answer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Of asyncio.Protocol."""
        super().connection_made(transport)
        self.transport: Any = _Closing(transport, self._linger)
        self._head_timer = self.loop.call_later(self.timeout_keep_alive, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """Of asyncio.Protocol."""
        self._head_timer.cancel()
        super().connection_lost(exc)

    def on_headers_complete(self) -> None:
        """Of httptools."""
        self._head_timer.cancel()
        self._is_whole = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Of httptools."""
        self._is_whole = True
        super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        """Of asyncio.Protocol."""
        if self._num_dropped is None:
            super().data_received(data)
            return
        self._num_dropped += len(data)
        if self._num_dropped > _LINGER_BYTES:
            self.transport.close()

    def _linger(self, transport: asyncio.Transport) -> bool:
        if self._is_whole or not transport.can_write_eof():
            return False
        transport.write_eof()
        self._num_dropped = 0
        self.flow.resume_reading()
        self._head_timer = self.loop.call_later(_LINGER_S, transport.close)
        return True

    def on_message_begin(self) -> None:
        """Of httptools: also of the second request of a connection."""
        super().on_message_begin()
        self._head_timer.cancel()
        self._head_timer = self.loop.call_later(self.timeout_keep_alive, self._give_up)

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


class DrainingServer(uvicorn.Server):
    """Ends as an orchestrator wants it: at SIGTERM new requests are answered with 503, running ones end, exit 0.

    A second signal ends at once.
    """

    def __init__(self, config: uvicorn.Config, drain: Drain, timeout_s: float) -> None:
        super().__init__(config)
        self._drain = drain
        self._timeout_s = timeout_s
        self._ending: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In the place of uvicorn's, which closes at once what listens."""
        if threading.current_thread() is not threading.main_thread():  # which alone is told of signals
            yield
            return
        loop = asyncio.get_running_loop()
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(one, self._told, one)
        try:
            yield
        finally:
            for one in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(one)

    def _told(self, number: signal.Signals) -> None:
        if self._ending is not None:
            self.should_exit = self.force_exit = True
            return
        tell("draining", signal=number.name, active=self._drain.num_active)
        self._drain.is_draining = True
        self._ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        try:
            await asyncio.wait_for(self._drain.wait_idle(), self._timeout_s)
        except asyncio.TimeoutError:
            tell("drain cut", active=self._drain.num_active)
        self.should_exit = True


def make_server(app: FastAPI, settings: ServerSettings) -> DrainingServer:
    """uvicorn for an app that `create_app` made."""
    options: dict[str, Any] = {
        "host": settings.host,
        "port": settings.port,
        "http": ImpatientProtocol,
        "ws": "none",
        "loop": "auto",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "backlog": _BACKLOG,
        "timeout_keep_alive": settings.idle_timeout_s,
        "timeout_graceful_shutdown": 1,  # what runs has had its time by then
    }
    return DrainingServer(uvicorn.Config(app, **options), app.state.drain, settings.drain_timeout_s)
