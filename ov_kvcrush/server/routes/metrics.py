"""Figures for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from ov_kvcrush.server.state import state_of

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """All figures, as text."""
    return Response(state_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)
