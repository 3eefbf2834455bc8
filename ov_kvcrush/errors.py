"""Errors that a caller can act on. Each is a ValueError, so `except ValueError` catches bad input of every kind, and a
RuntimeError, which is what openvino_genai raises for it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CrushError(ValueError, RuntimeError):
    """Base of every error this package raises for bad input: the text names field, rule and value."""


class ModelError(CrushError):
    """A model folder is missing, incomplete, damaged, or holds something that the engine cannot run."""


class ExportError(CrushError):
    """An export was refused or failed; nothing that looks like a finished model is left behind."""


class RequestError(CrushError):
    """One request was refused; no other request is touched."""


class QueueFull(RequestError):
    """Too many requests wait already; try again later."""


class RequestTimeout(CrushError, TimeoutError):
    """A request was not complete when its time was over."""


class ContextFileError(CrushError):
    """A context's file cannot be written or read, is damaged, or belongs to something else than what was asked for."""


class OutOfMemory(CrushError):
    """The KV cache cannot hold what was asked beside what it must keep."""


def reason_of(error: Exception) -> str:
    """The last line of an OpenVINO error that says something: the lines before name places in its C++ sources."""
    lines = [line for line in str(error).strip().splitlines() if not line.startswith("Exception from ")]
    return (lines or [str(error).strip() or type(error).__name__])[-1]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the known name closest to `name`, or "" if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
