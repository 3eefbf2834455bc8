"""Why a request has ended."""

from __future__ import annotations

import enum


class EndReason(enum.Enum):
    """Why a request has ended.

    STOP: an end token, a stop string, or its caller who had enough. LENGTH: it has all the tokens it may have. MEMORY:
    the KV cache had no room for the next one. CANCELLED: by its caller. TIMEOUT: its time was over. ERROR: something
    broke. The last four leave no whole answer, and say so in `GenerationHandle.error`, but for CANCELLED.
    """

    STOP = "stop"
    LENGTH = "length"
    MEMORY = "memory"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    ERROR = "error"
