"""Requests run while their handles are held."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def hold(engine: Any, handle: T) -> T:
    """The same handle, held for as long as its engine or pipeline is."""
    vars(engine).setdefault("held_handles", []).append(handle)
    return handle
