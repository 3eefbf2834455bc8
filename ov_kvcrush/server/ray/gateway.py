"""What takes requests from clients: finds out what ties them to a replica, passes answers on, and asks another replica
when one dies before the first token."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
from collections.abc import AsyncIterator
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ov_kvcrush.server.errors import ApiError
from ov_kvcrush.server.keys import LOCAL
from ov_kvcrush.server.ray.asgi import Headers, HttpRequest, ResponseStart
from ov_kvcrush.server.ray.exposition import labelled
from ov_kvcrush.server.ray.routing import Holders, affinity_of, context_key
from ov_kvcrush.server.ray.settings import RaySettings
from ov_kvcrush.server.settings import ServerSettings

_UPLOAD = "application/octet-stream"
_METRICS_TIMEOUT_S = 5.0
_READY_TIMEOUT_S = 2.0
_EVENTS = b"text/event-stream"
_TOKEN = re.compile(rb'"(content|reasoning_content|text|delta|arguments|error)": ?["{][^"}]')
_GONE = (RayError, ReplicaUnavailableError)


class ReplicaLost(Exception):
    """The replica that had a request is gone, and nothing of its answer was passed on."""


class Gateway:
    """One of the processes behind Serve's proxy. It has no model, no contexts and checks no keys: replicas do."""

    def __init__(self, settings: RaySettings, server: ServerSettings, replicas: DeploymentHandle) -> None:
        self._settings = settings
        self._server = server
        self._replicas = replicas
        self._answers = replicas.options(stream=True, method_name="answer")
        self._holders = Holders()
        self._registry = CollectorRegistry()
        self._routed = Counter(
            "ov_kvcrush_routed",
            "Requests by where they went: to their holder, moved elsewhere, new, or tied to nothing",
            ["affinity"],
            registry=self._registry,
        )
        self._retries = Counter(
            "ov_kvcrush_retries", "Requests sent once more since their replica died", registry=self._registry
        )
        self._lost = Counter("ov_kvcrush_lost", "Answers that ended with their replica", registry=self._registry)

    async def __call__(self, request: Request) -> Response:
        """Called by Serve for each request."""
        try:
            self._check_place(request)
            if request.url.path == "/health":
                return JSONResponse({"status": "ok"})
            if request.url.path == "/metrics":
                return Response(await self._metrics(), media_type=CONTENT_TYPE_LATEST)
            if request.url.path == "/ready":
                return await asyncio.wait_for(self._answer(await self._received(request)), _READY_TIMEOUT_S)
            return await self._answer(await self._received(request))
        except ApiError as error:
            return error.response()
        except asyncio.TimeoutError:
            return ApiError(503, "no replica is ready").response()

    def _check_place(self, request: Request) -> None:
        """Without keys a server is for its own machine, wherever Serve's proxy listens."""
        if self._server.api_keys or request.client is None:
            return
        try:
            is_local = ipaddress.ip_address(request.client.host).is_loopback
        except ValueError:
            is_local = False
        if not is_local:
            raise ApiError(403, "api_keys must have at least one where others can reach the server, got none")

    async def _received(self, request: Request) -> HttpRequest:
        """The whole request, and what ties it."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        is_file = kind == _UPLOAD and request.url.path == "/v1/contexts"
        limit = (self._server.max_upload_mb if is_file else self._server.max_body_mb) << 20
        body = bytearray()
        try:
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise ApiError(413, f"body must be at most {limit} bytes, got more")
        except ClientDisconnect:
            raise ApiError(400, "body must be whole, got a part") from None
        headers = tuple(request.headers.raw)
        affinity = affinity_of(request.url.path, _parsed(body, kind), _caller(headers))
        return HttpRequest(
            method=request.method,
            path=request.url.path,
            query=request.url.query.encode(),
            headers=headers,
            body=bytes(body),
            client=(request.client.host, request.client.port) if request.client else None,
            affinity=affinity,
            holder=self._holders.of(affinity.key) if affinity else None,
        )

    async def _answer(self, request: HttpRequest) -> Response:
        """The answer of a replica; of another one if it dies before the first token."""
        for tries_left in reversed(range(self._settings.tries)):
            pieces = self._answers.remote(request)
            try:
                start, held_back, is_whole = await _begun(pieces)
                break
            except ReplicaLost:
                if not tries_left:
                    self._lost.inc()
                    raise ApiError(503, "the replica that had the request is gone; send it again") from None
                self._retries.inc()  # Serve's router knows by now that it is gone
        self._note(request, start, held_back)
        headers = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in start.headers
            if name.lower() not in (b"content-length", b"transfer-encoding", b"connection")
        }
        if is_whole:
            return Response(b"".join(held_back), start.status, headers)
        return StreamingResponse(self._passed_on(start, held_back, pieces), start.status, headers)

    async def _passed_on(self, start: ResponseStart, held_back: list[bytes], pieces: Any) -> AsyncIterator[bytes]:
        """The body, as it comes. A stream whose replica dies ends with an error, anything else is cut."""
        try:
            for piece in held_back:
                yield piece
            async for piece in pieces:
                yield piece
        except _GONE as error:
            if not _is_loss(error):
                raise
            self._lost.inc()
            if not start.header(b"content-type").startswith(_EVENTS):
                raise
            lost = ApiError(503, "the replica that wrote this answer is gone; send the request again", None, "lost")
            yield b"data: " + json.dumps(lost.body()).encode() + b"\n\n"
        finally:
            pieces.cancel()

    def _note(self, request: HttpRequest, start: ResponseStart, held_back: list[bytes]) -> None:
        """Count where a request went, and remember who holds what."""
        affinity, holder = request.affinity, request.holder
        if affinity is None:
            self._routed.labels("none").inc()
        else:
            self._routed.labels("new" if holder is None else "holder" if holder == start.replica else "moved").inc()
            if start.status < 400:
                self._holders.note(affinity.key, start.replica)
        if request.method == "POST" and request.path.startswith("/v1/contexts") and start.status < 300:
            made = _parsed(b"".join(held_back), "application/json")
            if isinstance(made, dict) and isinstance(made.get("id"), str):
                self._holders.note(context_key(made["id"], _caller(request.headers)), start.replica)

    async def _metrics(self) -> bytes:
        """The figures of this gateway, and those of each replica with its name as a label."""
        response = self._replicas.broadcast("metrics")
        try:
            results = await response.results_async(timeout_s=_METRICS_TIMEOUT_S, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError):
            results = []  # one is starting or ending: figures are there the next time
        return generate_latest(self._registry) + labelled([x for x in results if not isinstance(x, BaseException)])


async def _begun(pieces: Any) -> tuple[ResponseStart, list[bytes], bool]:
    """The start of an answer, its pieces up to the first token, and whether that is all of it.

    Raises ReplicaLost where another replica can be asked, since the client has nothing yet; ApiError where too many
    wait.
    """
    held_back: list[bytes] = []
    try:
        start: ResponseStart = await anext(pieces)
        kind = start.header(b"content-type")
        async for piece in pieces:
            held_back.append(piece)
            if kind.startswith(_EVENTS) and _TOKEN.search(piece):
                return start, held_back, False
            if not kind.startswith((_EVENTS, b"application/json")):
                return start, held_back, False
        return start, held_back, True
    except BackPressureError:
        raise ApiError(429, "too many requests wait already; try again later") from None
    except DeploymentUnavailableError:
        raise ApiError(503, "no replica can be started; the log of Ray Serve says why") from None
    except _GONE as error:
        if _is_loss(error):
            raise ReplicaLost from error
        raise
    except asyncio.CancelledError:
        pieces.cancel()
        raise


def _is_loss(error: Exception) -> bool:
    """Whether an error of Ray is about a replica, not what the replica raised or that somebody gave up."""
    return not isinstance(error, (RayTaskError, TaskCancelledError))


def _caller(headers: Headers) -> str:
    return next((value.decode("latin-1") for name, value in headers if name.lower() == b"authorization"), LOCAL)


def _parsed(body: bytes | bytearray, kind: str) -> Any:
    if kind != "application/json":
        return None
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None  # the replica says what is wrong with it
