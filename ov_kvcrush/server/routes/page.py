"""The page at `/`: plain files, which may ask this server and nobody else."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

from ov_kvcrush.server.errors import ApiError

PAGE = Path(__file__).parents[1] / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again by its ETag: a new release is seen at once
}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def index() -> FileResponse:
    """The page. Anyone may load it: whatever it then asks for needs the key."""
    return _file("index.html")


@router.get("/page/{name}")
async def part(name: str) -> FileResponse:
    """One of its files."""
    return _file(name)


def _file(name: str) -> FileResponse:
    path = PAGE / name
    if path.name != name or path.suffix not in TYPES or not path.is_file():
        raise ApiError(404, "path must be one of the server's, got another")
    return FileResponse(path, media_type=TYPES[path.suffix], headers=HEADERS)
