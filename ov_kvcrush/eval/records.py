"""What a run records: the settings that it compares, and every answer with its score and its cost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from ov_kvcrush.config import ENGINES, PRECISIONS, budget_text, parse_recall
from ov_kvcrush.errors import CrushError
from ov_kvcrush.utils.checks import (
    check_choice,
    check_fraction,
    check_integer,
    check_number,
    check_object,
    check_string,
)

QUERIES = ("aware", "agnostic")
FULL = "none"  # the policy that keeps everything
AVERAGE = "average"
PLAN = "plan"  # in place of precisions that a plan chooses
_BITS = {"f32": 32, "bf16": 16, "f16": 16, "u8": 8, "u4": 4, "u2": 2}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One configuration of engine, policy, budget and precisions.

    policy: "none" = the full cache. policy_settings: settings of the policy other than its budget. kept, kept_tokens:
    the budget, as a fraction of the prompt or as a number of tokens; budget: as bytes over those of bf16, whose plan
    chooses the precisions, so that those here are u8. The full cache has none of them.
    recall_tokens: what a decode step reads, as in CacheConfig; None = everything.
    query: "aware" = the policy sees the question, "agnostic" = it sees the context alone.
    Raises CrushError for other values.
    """

    engine: str
    policy: str
    key_precision: str
    value_precision: str
    query: str = "aware"
    kept: float | None = None
    kept_tokens: int | None = None
    policy_settings: Mapping[str, Any] = field(default_factory=dict)
    budget: float | None = None
    recall_tokens: float | None = None

    def __post_init__(self) -> None:
        check_choice("engine", self.engine, ENGINES)
        check_choice("key_precision", self.key_precision, PRECISIONS)
        check_choice("value_precision", self.value_precision, PRECISIONS)
        check_choice("query", self.query, QUERIES)
        check_string("policy", self.policy)
        check_object("policy_settings", self.policy_settings)
        if self.kept is not None:
            check_fraction("kept", self.kept)
        if self.kept_tokens is not None:
            check_integer("kept_tokens", self.kept_tokens, 1)
        if self.budget is not None:
            check_fraction("budget", self.budget)
            if (self.key_precision, self.value_precision) != ("u8", "u8"):
                raise CrushError(f"key_precision and value_precision must be u8 with a budget, got {self._stored}")
        if self.recall_tokens is not None:
            parse_recall(self.recall_tokens)
            check_choice("engine", self.engine, ENGINES[:1])
        amounts = (self.kept, self.kept_tokens, self.budget)
        if sum(amount is not None for amount in amounts) != (self.policy != FULL):
            rule = "left out" if self.policy == FULL else "given, or kept_tokens or budget instead,"
            raise CrushError(
                f"kept must be {rule} with policy {self.policy!r}, got kept={self.kept}, "
                f"kept_tokens={self.kept_tokens} and budget={self.budget}"
            )

    @property
    def precisions(self) -> str:
        """Precisions as "keys/values"; PLAN with a budget."""
        return self._stored if self.budget is None else PLAN

    @property
    def _stored(self) -> str:
        return f"{self.key_precision}/{self.value_precision}"

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the policy, kept_tokens or budget among them, and recall_tokens."""
        asked: dict[str, Any] = {} if self.kept_tokens is None else {"kept_tokens": self.kept_tokens}
        if self.budget is not None:
            asked["budget"] = budget_text(self.budget)
        if self.recall_tokens is not None:
            asked["recall_tokens"] = self.recall_tokens
        return {**self.policy_settings, **asked}

    @property
    def key(self) -> str:
        """A name that is the same for equal settings in every run, and differs for others."""
        values = {name: _canonical(value) for name, value in asdict(self).items()}
        for name in ("budget", "recall_tokens"):  # runs from before there were such fields have none
            if values[name] is None:
                del values[name]
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]
        if self.budget is not None:
            return f"{self.engine}-{self.policy}-{PLAN}-{self.budget:.4g}-{self.query}-{digest}"
        budget = "full" if self.policy == FULL else f"{self.kept or self.kept_tokens:g}"
        return f"{self.engine}-{self.policy}-{budget}-{self.key_precision}-{self.value_precision}-{self.query}-{digest}"


class PredictionKey(NamedTuple):
    """Identifies an answer: one question under one setting. Unique in a run."""

    task: str
    item_id: str
    question_index: int
    setting_key: str


@dataclass(frozen=True)
class Prediction:
    """One answer and what it cost.

    turn: index in a conversation; 0 outside of one. score: of `text` by the task's metric, or a loss.
    kept_tokens: cached tokens per head, on average, after prefill and eviction; bytes: of the request's whole cache
    then. prompt_tokens: all prompt tokens, earlier turns included. seconds: from the evicted cache to the end of the
    answer. kl, top1: to the full cache along its own answer, as Divergence has them; loss: of the reference, nats per
    token; None where they were not measured. Raises CrushError for wrong types and negative numbers.
    """

    item_id: str
    task: str
    question_index: int
    turn: int
    setting_key: str
    text: str
    score: float
    kept_tokens: float
    prompt_tokens: int
    bytes: int
    seconds: float
    kl: float | None = None
    top1: float | None = None
    loss: float | None = None

    def __post_init__(self) -> None:
        for name in ("item_id", "task", "setting_key"):
            check_string(name, getattr(self, name))
        if not isinstance(self.text, str):
            raise CrushError(f"text must be a string, got {self.text!r}")
        for name, minimum in (("question_index", 0), ("turn", 0), ("prompt_tokens", 1), ("bytes", 0)):
            check_integer(name, getattr(self, name), minimum)
        check_number("score", self.score)
        check_number("kept_tokens", self.kept_tokens, 0)
        check_number("seconds", self.seconds, 0)
        for name in ("kl", "top1", "loss"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0)

    @property
    def key(self) -> PredictionKey:
        """The question and the setting that this answers."""
        return PredictionKey(self.task, self.item_id, self.question_index, self.setting_key)


def bits(precisions: str) -> int:
    """Bits of one key element plus one value element, without scales; 0 for PLAN.

    Raises CrushError unless it is "keys/values".
    """
    if precisions == PLAN:
        return 0
    names = precisions.split("/")
    for name in names:
        check_choice("precisions", name, PRECISIONS)
    return sum(_BITS[name] for name in names)


def _canonical(value: Any) -> Any:
    """Equal values in one form: 1.0 becomes 1."""
    if isinstance(value, dict):
        return {name: _canonical(inner) for name, inner in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value
