"""Rules for single settings; every config and policy uses the same, so that errors read the same."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from ov_kvcrush.errors import CrushError, did_you_mean


def check_integer(name: str, value: Any, minimum: int) -> None:
    """Raise CrushError unless value is an integer of at least minimum."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise CrushError(f"{name} must be an integer of at least {minimum}, got {value!r}")


def check_fraction(name: str, value: Any, *, zero: bool = False) -> None:
    """Raise CrushError unless value is a number in (0, 1], or in [0, 1] with `zero`."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1 or (value == 0 and not zero):
        raise CrushError(f"{name} must be a fraction in {'[' if zero else '('}0, 1], got {value!r}")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise CrushError unless value is one of choices; the error names the nearest."""
    choices = tuple(choices)
    if value not in choices:
        hint = did_you_mean(str(value), choices)
        raise CrushError(f"{name} must be one of {', '.join(choices)}, got {value!r}{hint}")


def check_number(name: str, value: Any, minimum: float = -math.inf) -> None:
    """Raise CrushError unless value is a finite number of at least minimum."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < minimum:
        least = "" if minimum == -math.inf else f" of at least {minimum:g}"
        raise CrushError(f"{name} must be a finite number{least}, got {value!r}")


def check_string(name: str, value: Any) -> None:
    """Raise CrushError unless value is a string that is not empty."""
    if not isinstance(value, str) or not value:
        raise CrushError(f"{name} must be a string that is not empty, got {value!r}")


def check_object(name: str, value: Any) -> None:
    """Raise CrushError unless value is a mapping from strings."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise CrushError(f"{name} must be an object with names, got {value!r}")


def known_options(options: dict[str, Any], cls: Any, what: str) -> dict[str, Any]:
    """Return options; raise CrushError if one of them is not a field of the dataclass `cls`."""
    known = [f.name for f in fields(cls)]
    for name in options:
        if name not in known:
            raise CrushError(f"{what} must be one of {', '.join(known)}, got {name!r}{did_you_mean(str(name), known)}")
    return options


def key_values(option: str, texts: Iterable[str]) -> list[tuple[str, str]]:
    """Key and value of each KEY=VALUE text. Raises CrushError naming the option for one without either."""
    pairs = []
    for text in texts:
        key, _, value = (part.strip() for part in text.partition("="))
        if not (key and value):
            raise CrushError(f"{option} must be KEY=VALUE, got {text!r}")
        pairs.append((key, value))
    return pairs
