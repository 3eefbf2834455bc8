"""Rules for the fields of what a run writes down and reads back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ov_kvcrush.errors import CrushError


def check_number(name: str, value: Any, minimum: float = -math.inf) -> None:
    """Raise CrushError unless value is a finite number of at least minimum."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < minimum:
        least = "" if minimum == -math.inf else f" of at least {minimum:g}"
        raise CrushError(f"{name} must be a finite number{least}, got {value!r}")


def check_text(name: str, value: Any) -> None:
    """Raise CrushError unless value is a string that is not empty."""
    if not isinstance(value, str) or not value:
        raise CrushError(f"{name} must be a string that is not empty, got {value!r}")


def check_object(name: str, value: Any) -> None:
    """Raise CrushError unless value is a mapping from strings."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise CrushError(f"{name} must be an object with names, got {value!r}")
