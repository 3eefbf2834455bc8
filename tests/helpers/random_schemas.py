"""JSON schemas by a seed, with answers of bounded length: objects, arrays, choices, references, all kinds of values."""

from __future__ import annotations

import json
import random
from typing import Any

_WORDS = ("name", "age", "city", "colour", "tags", "size", "price", "owner", "état", "a b", 'say "hi"', "x")


def random_schema(seed: int) -> dict[str, Any]:
    """A schema of at most three levels; the same for the same seed."""
    rng = random.Random(seed)
    schema = _schema(rng, 2)
    if rng.random() < 0.2:
        schema = {"type": "array", "items": {"$ref": "#/$defs/item"}, "maxItems": 2, "$defs": {"item": _schema(rng, 1)}}
    return schema


def text_of(schema: dict[str, Any]) -> str:
    return json.dumps(schema, ensure_ascii=False)


def _schema(rng: random.Random, depth: int) -> dict[str, Any]:
    leaves = (_string, _number, _choice, _constant, _plain)
    make = rng.choice(leaves + (_object, _array, _any_of) * 2) if depth else rng.choice(leaves)
    return make(rng, depth)


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    pattern = rng.choice([r"^[A-Z][a-z]{2,8}$", r"^\d{3}-\d{2}$", r"^(red|green|blue)$", r"^[a-z]+@[a-z]{2,5}\.org$"])
    low = rng.randint(0, 3)
    return rng.choice(
        [
            {"type": "string", "maxLength": rng.randint(3, 20)},
            {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 9)},
            {"type": "string", "pattern": pattern.replace("+", "{1,6}")},
            {"type": "string", "format": rng.choice(["date", "time", "uuid", "ipv4"])},
        ]
    )


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-50, 50)
    high = low + rng.randint(1, 200)
    return rng.choice(
        [
            {"type": "integer", "minimum": low, "maximum": high},
            {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high + 1},
            {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": rng.randint(2, 9)},
        ]
    )


def _choice(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": rng.sample([1, -2.5, True, None, "yes", "no", "maybe so", "ü"], rng.randint(1, 4))}


def _constant(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"const": rng.choice([0, "fixed", False, None, ["a", 1], {"k": "v"}])}


def _plain(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": rng.choice(["boolean", "null"])}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_WORDS, rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _schema(rng, depth - 1) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(0, 2)
    return {"type": "array", "items": _schema(rng, depth - 1), "minItems": low, "maxItems": low + rng.randint(0, 2)}


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_schema(rng, depth - 1) for _ in range(rng.randint(2, 3))]}
