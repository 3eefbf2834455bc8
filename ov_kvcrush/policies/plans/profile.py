"""A profile of a model: what each choice for each KV head costs, measured on calibration texts, as a file.

Costs are KL divergences in nats of the next-token distribution to the full cache, over the rows of the full cache's own
greedy answer. Each text has the cost of one head at a time at the coarsest precisions and at some fractions, and of all
heads at once for every level; the levels between are divided among the heads as the coarse ones are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ov_kvcrush.errors import CrushError
from ov_kvcrush.policies.budgets.head_profile import HeadProfile

PROFILE_NAME = "kv_profile.json"
UNKNOWN_PROFILE_NAME = "kv_profile.unknown.json"
USES = ("known", "unknown")
FORMAT = 1
FRACTIONS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.12)
HEAD_CHOICES = ("key.u2", "value.u2", "kept.0.5", "kept.0.25", "kept.0.12")  # measured head by head
ALL_CHOICES = (
    *(f"{part}.{precision}" for part in ("key", "value") for precision in ("u8", "u4", "u2")),
    *(f"kept.{fraction:g}" for fraction in FRACTIONS[1:]),
)  # measured in all heads at once


@dataclass(frozen=True, eq=False)
class TextCosts:
    """Costs on one text. heads: float64 (N,) for each of HEAD_CHOICES; together: a number for each of ALL_CHOICES."""

    name: str
    num_tokens: int
    num_rows: int
    heads: Mapping[str, np.ndarray]
    together: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Rung:
    """A plan that was solved from the costs and measured on the same texts.

    kl: float64 (texts,), measured. of_bf16: its bytes over those of bf16. excess_power: of the costs that it was solved
    from, which of some did best on the texts (see `cost_table`).
    """

    kl: np.ndarray
    of_bf16: float
    excess_power: float = 0.5


@dataclass(frozen=True, eq=False)
class KVProfile:
    """What compressing the KV cache of one model costs.

    model: its fingerprint. num_kv_heads: of each layer. policy: settings of the policy that chose the tokens.
    made_with: versions, command, machine. baklava: budgets by what heads do to their input, for comparison; None where
    nobody measured it. use: whether the question was "known" when the cache was compressed, as in a prompt that ends
    with it, or "unknown", as in a context that is asked later.
    """

    model: str
    num_kv_heads: tuple[int, ...]
    policy: Mapping[str, Any]
    texts: tuple[TextCosts, ...]
    rungs: tuple[Rung, ...] = ()
    made_with: Mapping[str, Any] | None = None
    baklava: HeadProfile | None = None
    use: str = "known"

    @property
    def num_heads(self) -> int:
        """KV heads of all layers."""
        return sum(self.num_kv_heads)

    def to_json(self) -> dict[str, Any]:
        """As it is written to the file."""
        return {
            "format": FORMAT,
            "use": self.use,
            "model": self.model,
            "num_kv_heads": list(self.num_kv_heads),
            "policy": dict(self.policy),
            "made_with": dict(self.made_with or {}),
            "baklava": None if self.baklava is None else asdict(self.baklava),
            "texts": [
                {
                    "name": text.name,
                    "num_tokens": text.num_tokens,
                    "num_rows": text.num_rows,
                    "heads": {name: [round(float(x), 7) for x in values] for name, values in text.heads.items()},
                    "together": {name: round(float(x), 7) for name, x in text.together.items()},
                }
                for text in self.texts
            ],
            "rungs": [
                {
                    "of_bf16": rung.of_bf16,
                    "excess_power": rung.excess_power,
                    "kl": [round(float(x), 7) for x in rung.kl],
                }
                for rung in self.rungs
            ],
        }


def read_profile(path: Path, model: str, num_kv_heads: tuple[int, ...]) -> KVProfile:
    """The profile in a file, checked. Raises CrushError for a file that is none, and for one of another model."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CrushError(f"profile must be a readable JSON file, got {str(path)!r}: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        got = found.get("format") if isinstance(found, dict) else type(found).__name__
        raise CrushError(f"profile must have format {FORMAT}, got {got!r} in {str(path)!r}; make it again")
    heads = found.get("num_kv_heads")
    if heads != list(num_kv_heads):
        raise CrushError(
            f"profile must be of this model: num_kv_heads must be {list(num_kv_heads)}, got {heads!r} in {str(path)!r}"
        )
    if found.get("model") != model:
        raise CrushError(
            f"profile must be of this model: its fingerprint must be {model[:12]}..., got "
            f"{str(found.get('model'))[:12]}... in {str(path)!r}; ov_kvcrush-profile makes one"
        )
    try:
        return _parse(found, sum(num_kv_heads))
    except (KeyError, TypeError, ValueError) as error:
        raise CrushError(f"profile must be as ov_kvcrush-profile writes it, got {str(path)!r}: {error}") from None


def _parse(found: dict[str, Any], num_heads: int) -> KVProfile:
    texts = tuple(
        TextCosts(
            str(text["name"]),
            int(text["num_tokens"]),
            int(text["num_rows"]),
            {name: _numbers(text["heads"][name], num_heads) for name in HEAD_CHOICES},
            {name: float(_numbers([text["together"][name]], 1)[0]) for name in ALL_CHOICES},
        )
        for text in found["texts"]
    )
    if not texts:
        raise ValueError("texts must hold at least one text")
    rungs = tuple(
        Rung(_numbers(rung["kl"], len(texts)), float(rung["of_bf16"]), float(rung["excess_power"]))
        for rung in found["rungs"]
    )
    if any(not math.isfinite(x) or x < 0 for rung in rungs for x in (rung.of_bf16, rung.excess_power)):
        raise ValueError("rungs must have finite sizes and powers")
    use = found.get("use", USES[0])
    if use not in USES:
        raise ValueError(f"use must be one of {', '.join(USES)}, got {use!r}")
    return KVProfile(
        str(found["model"]), tuple(int(x) for x in found["num_kv_heads"]), dict(found["policy"]), texts, rungs,
        dict(found["made_with"]), _parse_baklava(found.get("baklava"), num_heads), use,
    )  # fmt: skip


def _parse_baklava(found: Mapping[str, Any] | None, num_heads: int) -> HeadProfile | None:
    if found is None:
        return None
    changes = tuple(float(x) for x in _numbers(found["changes"], num_heads))
    return HeadProfile(changes, float(found["low_share"]), float(found["high_share"]), float(found["spread"]))


def _numbers(values: Any, count: int) -> np.ndarray:
    found = np.asarray(values, np.float64)
    if found.shape != (count,) or not np.isfinite(found).all() or (found < 0).any():
        raise ValueError(f"costs must be {count} finite numbers of at least 0")
    return found
