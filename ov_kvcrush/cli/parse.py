"""Values of options that several commands have: lists of numbers, OpenVINO properties."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ov_kvcrush.errors import CrushError
from ov_kvcrush.utils.checks import key_values

Property = str | int


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """Return the numbers of "1024,4096", without repetitions. Raises CrushError naming the option."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[+-]?\d+", part) for part in parts):
        raise CrushError(f"--{option} must be whole numbers separated by commas, got {text!r}")
    return tuple(dict.fromkeys(int(part) for part in parts))


def parse_words(text: str) -> tuple[str, ...]:
    """Return what stands between the commas of "a, b", without repetitions."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def parse_fractions(option: str, text: str) -> tuple[float, ...]:
    """Return the numbers of "0.5,0.25", without repetitions. Raises CrushError naming the option."""
    try:
        return tuple(dict.fromkeys(float(part) for part in parse_words(text)))
    except ValueError:
        raise CrushError(f"--{option} must be numbers separated by commas, got {text!r}") from None


def parse_properties(texts: Iterable[str], **named: str | None) -> dict[str, Property]:
    """Return OpenVINO properties from KEY=VALUE texts and from options with a name of their own.

    named: property -> value, None where the option was not given. Whole numbers become int, all else stays text.
    Raises CrushError for a text without key or value, and for a key that is given twice.
    """
    pairs = [(key, value) for key, value in named.items() if value is not None]
    pairs += key_values("--property", texts)
    properties: dict[str, Property] = {}
    for key, value in pairs:
        if key in properties:
            raise CrushError(f"property {key} must be given once, got {properties[key]!r} and {value!r}")
        properties[key] = int(value) if re.fullmatch(r"-?\d+", value) else value
    return properties


def check_at_least(option: str, value: int, minimum: int) -> None:
    """Raise CrushError naming the option if its value is below `minimum`."""
    if value < minimum:
        raise CrushError(f"--{option} must be at least {minimum}, got {value}")


def check_numbers(option: str, values: tuple[int, ...]) -> None:
    """Raise CrushError naming the option unless there are numbers and all are at least 1."""
    if not values:
        raise CrushError(f"--{option} must have at least one number, got none")
    for value in values:
        check_at_least(option, value, 1)
