"""GET /v1/models: there is one."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from ov_kvcrush.server.state import ServerState, state_of

router = APIRouter(prefix="/v1")


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """All of them."""
    return {"object": "list", "data": [_model(state_of(request))]}


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """One by its name."""
    state = state_of(request)
    state.check_model(name)
    return _model(state)


def _model(state: ServerState) -> dict[str, Any]:
    return {"id": state.name, "object": "model", "created": state.created, "owned_by": "ov_kvcrush"}
