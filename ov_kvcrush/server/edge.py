"""What stands before every path: ids, keys, limits of bodies, the server's end; and behind it a line in the log."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ov_kvcrush.server.errors import ApiError
from ov_kvcrush.server.keys import LOCAL, Owners
from ov_kvcrush.server.logs import tell
from ov_kvcrush.server.metrics import Metrics
from ov_kvcrush.server.settings import ServerSettings

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_CLOSED_REQUEST = 499  # in logs: the client went away before the answer's end
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
UPLOAD = "application/octet-stream"  # the only body that may be as long as a context's file


class Drain:
    """Whether the server is to end, and how many requests are being answered."""

    def __init__(self) -> None:
        self.is_draining = False
        self.num_active = 0
        self._idle = asyncio.Event()

    async def wait_idle(self) -> None:
        """Until nothing is being answered."""
        while self.num_active:
            self._idle.clear()
            await self._idle.wait()

    def enter(self) -> None:
        """A request has come."""
        self.num_active += 1

    def leave(self) -> None:
        """It has its answer, or nobody waits for it."""
        self.num_active -= 1
        if not self.num_active:
            self._idle.set()


class Edge:
    """The outermost part of an app. `metrics` and `owners` are there when the app has started."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, drain: Drain) -> None:
        self._app = app
        self._settings = settings
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await _Exchange(self._settings, self._drain, scope, receive, send).run(self._app)


class _Exchange:
    """One request and its answer."""

    def __init__(self, settings: ServerSettings, drain: Drain, scope: Scope, receive: Receive, send: Send) -> None:
        self._settings = settings
        self._drain = drain
        self._scope = scope
        self._receive = receive
        self._send = send
        self._headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self._start = time.perf_counter()
        self._status = 0
        self._is_over = False
        self._has_body = False  # all of it was received
        self._num_bytes = 0
        self._is_gone = False
        given = self._headers.get("x-request-id", "")
        self._id = given if _ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = self._id

    async def run(self, app: ASGIApp) -> None:
        is_api = self._scope["path"].startswith("/v1/")
        if is_api:
            self._drain.enter()
        try:
            self._admit(is_api)
            await app(self._scope, self._receive_limited, self._send_noted)
        except ApiError as error:
            await self._refuse(error)
        except Exception as error:
            self._scope["state"]["error"] = error
            await self._refuse(ApiError(500, "the server failed to answer; its log says more under the request's id"))
        finally:
            if is_api:
                self._drain.leave()
            self._tell()

    # -- before --------------------------------------------------------------------------------------------------------

    def _admit(self, is_api: bool) -> None:
        """Raise what keeps a request from being answered, before anything of its body is read."""
        self._check_place()
        if not is_api:
            return
        owners: Owners = self._scope["app"].state.owners if "app" in self._scope else Owners(())
        owner = owners.of(_bearer(self._headers.get("authorization", "")))
        if owner is None:
            raise ApiError(
                401, "API key must be one of the server's, as Authorization: Bearer KEY, got none or another"
            )
        self._scope["state"]["owner"] = owner
        if self._drain.is_draining:
            raise ApiError(503, "the server is about to end; ask another or try again later")
        length = self._headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._limit:
            raise self._too_long()

    def _check_place(self) -> None:
        """Without keys a page of some other site, open in a browser here, must not ask in its user's name."""
        if self._settings.api_keys:
            return
        host = _host_of(f"//{self._headers.get('host', '')}")
        if host not in (*_LOCAL_NAMES, self._settings.host):
            raise ApiError(403, f"Host must be this machine's for a server without keys, got {host!r}")
        origin = self._headers.get("origin")
        if origin is not None and _host_of(origin) not in (*_LOCAL_NAMES, self._settings.host):
            raise ApiError(403, "Origin must be this machine's for a server without keys, got another")

    @property
    def _announces_body(self) -> bool:
        return "transfer-encoding" in self._headers or self._headers.get("content-length", "0") != "0"

    @property
    def _limit(self) -> int:
        kind = self._headers.get("content-type", "").partition(";")[0].strip().lower()
        is_file = kind == UPLOAD and self._scope["path"] == "/v1/contexts"
        return (self._settings.max_upload_mb if is_file else self._settings.max_body_mb) << 20

    def _too_long(self) -> ApiError:
        return ApiError(413, f"body must be at most {self._limit} bytes, got more")

    # -- the body ------------------------------------------------------------------------------------------------------

    async def _receive_limited(self) -> Message:
        if self._has_body:  # what comes now is the client's going
            return self._noted(await self._receive())
        left = self._start + self._settings.body_timeout_s - time.perf_counter()
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0.01))
        except asyncio.TimeoutError:
            raise ApiError(408, f"body must come within {self._settings.body_timeout_s:g} s, got a part") from None
        self._noted(message)
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._limit:
            raise self._too_long()
        self._has_body = message["type"] == "http.request" and not message.get("more_body", False)
        return message

    def _noted(self, message: Message) -> Message:
        self._is_gone = self._is_gone or (message["type"] == "http.disconnect" and not self._is_over)
        return message

    # -- the answer ----------------------------------------------------------------------------------------------------

    async def _send_noted(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self._id.encode())]
            if self._drain.is_draining or (self._announces_body and not self._has_body):
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body":
            self._is_over = not message.get("more_body", False)
        await self._send(message)

    async def _refuse(self, error: ApiError) -> None:
        self._scope["state"].setdefault("error", error)
        if not self._status:
            await error.response()(self._scope, self._receive, self._send_noted)

    def _tell(self) -> None:
        state: dict[str, Any] = self._scope["state"]
        route = self._scope.get("route")
        path = getattr(route, "path", None) or "other"
        status = _CLOSED_REQUEST if self._is_gone and not self._is_over else self._status
        metrics: Metrics | None = getattr(self._scope["app"].state, "metrics", None) if "app" in self._scope else None
        if metrics is not None:
            metrics.responses.labels(path, str(status)).inc()
        error = state.get("error")
        is_failure = status >= 500 and not isinstance(error, ApiError)
        owner = state.get("owner")
        tell(
            "request",
            logging.ERROR if is_failure else logging.INFO,
            error if is_failure else None,
            request_id=self._id,
            method=self._scope["method"],
            path=path,
            status=status,
            seconds=round(time.perf_counter() - self._start, 4),
            owner=owner if owner in (None, LOCAL) else owner[:8],
            **state.get("figures", {}),
        )


def _bearer(header: str) -> str | None:
    kind, _, key = header.partition(" ")
    return key.strip() if kind.lower() == "bearer" else None


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
