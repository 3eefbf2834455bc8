"""The server on many replicas with Ray Serve: `serve run ov_kvcrush.server.ray:app`. See docs/ray.md.

Nothing of Ray is imported until somebody asks for `app`.
"""

from __future__ import annotations

from typing import Any

__all__ = ["app"]


def __getattr__(name: str) -> Any:
    if name == "app":
        from ov_kvcrush.server.ray.application import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
