"""Errors as OpenAI's API has them: a status, and an object with message, type, param and code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from ov_kvcrush.errors import ContextFileError, CrushError, OutOfMemory, QueueFull, RequestError, RequestTimeout

RETRY_AFTER_S = 1  # a step takes less: there may be room by then
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    500: "internal_error",
    503: "unavailable",
    507: "insufficient_storage",
}
_API_NAMES = {  # what requests call the engine's fields
    "max_new_tokens": "max_completion_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "stop_strings": "stop",
    "rng_seed": "seed",
    "json_schema": "response_format",
    "compound_grammar": "tools",
    "history": "messages",
    "logprobs": "top_logprobs",
}
_FIELD = re.compile(r"([A-Za-z_][\w.]*) must ")
_WITH_RETRY = (429, 503)


class ApiError(Exception):
    """What ends a request with a status. param: the field that it is about."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or _CODES.get(status, "error")

    def body(self) -> dict[str, Any]:
        """The JSON of it."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Beside the body."""
        return {"Retry-After": str(RETRY_AFTER_S)} if self.status in _WITH_RETRY else {}

    def response(self) -> JSONResponse:
        """It as an answer."""
        return JSONResponse(self.body(), self.status, self.headers())


def api_error(error: BaseException) -> ApiError:
    """Whatever ended a request, as the API has it. What is not the caller's is not told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return _of_fields(error.errors(include_url=False, include_context=False, include_input=False)[0])
    if isinstance(error, RequestValidationError):
        return _of_fields(error.errors()[0])
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    if isinstance(error, QueueFull):
        return ApiError(429, str(error))
    if isinstance(error, RequestTimeout):
        return ApiError(408, str(error))
    if isinstance(error, OutOfMemory):
        return ApiError(503, str(error), code="out_of_memory")
    if isinstance(error, ContextFileError):
        return ApiError(400, str(error), "file")
    if isinstance(error, (RequestError, CrushError)):
        message, param = _in_api_names(str(error))
        return ApiError(400, message, param)
    return ApiError(500, "the server failed to answer; its log says more under the request's id")


def _in_api_names(message: str) -> tuple[str, str | None]:
    found = _FIELD.match(message)
    if found is None:
        return message, None
    name = _API_NAMES.get(found[1], found[1])
    return name + message[found.end(1) :], name


def _of_fields(first: Mapping[str, Any]) -> ApiError:
    """The first field that is wrong, by its path."""
    # Names of a union's members are pydantic's, not the body's.
    path = [str(part) for part in first["loc"] if not (isinstance(part, str) and ("[" in part or "-" in part))]
    param = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param} must be left out: it is not supported", param, "unsupported_parameter")
    if first["type"] == "json_invalid":
        return ApiError(400, f"body must be JSON: {first['msg']}", None, "invalid_json")
    return ApiError(400, f"{param or 'body'}: {first['msg']}", param)


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """The handler of every exception. Headers that a client needs are kept."""
    found = api_error(error)
    request.scope.setdefault("state", {})["error"] = error
    return found.response()
