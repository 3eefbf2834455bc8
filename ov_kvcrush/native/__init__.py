"""The compressed KV store and its kernels in C++. Names of the compiled module are loaded when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ov_kvcrush.native.loader import available, info, load, why_unavailable

if TYPE_CHECKING:
    from ov_kvcrush.native._crush import Product, Store, StoreFull, can_prefill, encode_decode, tile_bytes

__all__ = [
    "Product", "Store", "StoreFull", "available", "can_prefill", "encode_decode", "info", "load", "tile_bytes",
    "why_unavailable",
]  # fmt: skip

_COMPILED = ("Product", "Store", "StoreFull", "can_prefill", "encode_decode", "tile_bytes")


def __getattr__(name: str) -> Any:
    if name in _COMPILED:
        return getattr(load(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
