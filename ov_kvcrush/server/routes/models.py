"""GET /v1/models: the model, and its adapters under their names."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from ov_kvcrush.server.state import ServerState, state_of

router = APIRouter(prefix="/v1")


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """All of them."""
    state = state_of(request)
    return {"object": "list", "data": [_model(state, name) for name in (state.name, *state.adapters)]}


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """One by its name."""
    state = state_of(request)
    state.check_model(name)
    return _model(state, name)


def _model(state: ServerState, name: str) -> dict[str, Any]:
    found = {"id": name, "object": "model", "created": state.created, "owned_by": "ov_kvcrush"}
    return {**found, "parent": state.name} if name in state.adapters else found
