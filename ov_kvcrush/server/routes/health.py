"""Whether the server lives, and whether it takes requests."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from ov_kvcrush.server.errors import ApiError
from ov_kvcrush.server.state import state_of

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """The process answers."""
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """The model is there, and the server is not about to end."""
    if request.app.state.drain.is_draining:
        raise ApiError(503, "the server is about to end")
    return JSONResponse({"status": "ready", "model": state_of(request).name})
