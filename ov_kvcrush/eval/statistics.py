"""From predictions to rows: score, the full cache's score beside it, and the interval of their difference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ov_kvcrush.config import ENGINES, PRECISIONS
from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.bootstrap import RESAMPLES, bootstrap_means, generator, interval
from ov_kvcrush.eval.fields import check_number, check_object, check_text
from ov_kvcrush.utils.checks import check_choice, check_fraction, check_integer

QUERIES = ("aware", "agnostic")
FULL = "none"  # the policy that keeps everything
AVERAGE = "average"
_BITS = {"f32": 32, "bf16": 16, "f16": 16, "u8": 8, "u4": 4, "u2": 2}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to hold the cache.

    policy: its name, "none" = the full cache. policy_settings: of the policy, besides the budget. kept, kept_tokens:
    the budget as it was asked for, a fraction of the prompt or a number of tokens; the full cache has neither.
    query: "aware" = the policy sees the question, "agnostic" = it sees the context alone.
    Raises CrushError for anything else.
    """

    engine: str
    policy: str
    key_precision: str
    value_precision: str
    query: str = "aware"
    kept: float | None = None
    kept_tokens: int | None = None
    policy_settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("engine", self.engine, ENGINES)
        check_choice("key_precision", self.key_precision, PRECISIONS)
        check_choice("value_precision", self.value_precision, PRECISIONS)
        check_choice("query", self.query, QUERIES)
        check_text("policy", self.policy)
        check_object("policy_settings", self.policy_settings)
        if self.kept is not None:
            check_fraction("kept", self.kept)
        if self.kept_tokens is not None:
            check_integer("kept_tokens", self.kept_tokens, 1)
        if (self.kept is not None) + (self.kept_tokens is not None) != (self.policy != FULL):
            rule = "left out" if self.policy == FULL else "given, or kept_tokens instead"
            raise CrushError(
                f"kept must be {rule} with policy {self.policy!r}, got kept={self.kept} and "
                f"kept_tokens={self.kept_tokens}"
            )

    @property
    def precisions(self) -> str:
        """As a row has them."""
        return f"{self.key_precision}/{self.value_precision}"

    @property
    def settings(self) -> dict[str, Any]:
        """As a row has them."""
        asked = {} if self.kept_tokens is None else {"kept_tokens": self.kept_tokens}
        return {**self.policy_settings, **asked}

    @property
    def key(self) -> str:
        """A name for files: the same for equal settings, today and tomorrow, another for others."""
        values = {name: _canonical(value) for name, value in asdict(self).items()}
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]
        budget = "full" if self.policy == FULL else f"{self.kept or self.kept_tokens:g}"
        return f"{self.engine}-{self.policy}-{budget}-{self.key_precision}-{self.value_precision}-{self.query}-{digest}"


class PredictionKey(NamedTuple):
    """What was asked of which setting; nothing is asked twice in a run."""

    task: str
    item_id: str
    question_index: int
    setting_key: str


@dataclass(frozen=True)
class Prediction:
    """One answer and what it cost.

    turn: of a conversation, from 0 on; 0 where there is none. score: of `text` by the task's metric, or a loss.
    kept_tokens: cached tokens of a head, on average, when the prompt had been read and the policy had chosen; bytes:
    of the whole cache of this request then. prompt_tokens: all that was read, earlier turns included.
    seconds: from the adopted cache to the end of the answer. Raises CrushError for wrong types and negative numbers.
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

    def __post_init__(self) -> None:
        for name in ("item_id", "task", "setting_key"):
            check_text(name, getattr(self, name))
        if not isinstance(self.text, str):
            raise CrushError(f"text must be a string, got {self.text!r}")
        for name, minimum in (("question_index", 0), ("turn", 0), ("prompt_tokens", 1), ("bytes", 0)):
            check_integer(name, getattr(self, name), minimum)
        check_number("score", self.score)
        check_number("kept_tokens", self.kept_tokens, 0)
        check_number("seconds", self.seconds, 0)

    @property
    def key(self) -> PredictionKey:
        """What this is the answer to."""
        return PredictionKey(self.task, self.item_id, self.question_index, self.setting_key)


@dataclass(frozen=True)
class Row:
    """One setting on one task, or on the average of all tasks (task = "average": mean of the tasks' means).

    kept: fraction that was asked for, 1.0 = full cache, None where tokens were asked for (settings["kept_tokens"]).
    n: items. score: mean over items, of an item over its questions. full_score: of the full cache of the same engine,
    the most precise one that ran. difference: score - full_score; low, high: its 95 % interval, a paired bootstrap over
    items (within tasks). kept_tokens: mean over items. bytes_per_prompt_token: all bytes by all tokens of the prompts.
    precisions: "keys/values".
    """

    suite: str
    task: str
    engine: str
    policy: str
    kept: float | None
    query: str
    n: int
    score: float
    full_score: float
    difference: float
    low: float
    high: float
    kept_tokens: float
    bytes_per_prompt_token: float
    precisions: str
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        for name in ("suite", "task", "engine", "policy", "query", "precisions"):
            check_text(name, getattr(self, name))
        check_object("settings", self.settings)
        bits(self.precisions)
        if self.kept is not None:
            check_fraction("kept", self.kept)
        else:
            check_integer("settings['kept_tokens']", self.settings.get("kept_tokens"), 1)
        check_integer("n", self.n, 1)
        for name in ("score", "full_score", "difference", "low", "high", "kept_tokens", "bytes_per_prompt_token"):
            check_number(name, getattr(self, name))


def rows_of(
    predictions: Iterable[Prediction],
    settings: Sequence[Setting],
    suite: str,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[Row]:
    """A row for every setting on every task, then on the average; tasks in the order in which they first appear.

    The order of the predictions of a task changes nothing. Raises CrushError if there are none, for a setting whose
    engine has no full cache among them, and unless every setting answered the same questions once.
    """
    check_integer("resamples", resamples, 1)
    full = [settings.index(full_cache_of(setting, settings)) for setting in settings]
    rows: list[Row] = []
    draws: list[np.ndarray] = []
    numbers: list[np.ndarray] = []
    num_items = 0
    for task, own in _by_task(predictions, settings).items():
        means = _item_means(own, settings)
        num_items += means.score.shape[1]
        draws.append(bootstrap_means(means.score - means.score[full], generator(seed, task), resamples))
        per_token = means.bytes.sum(axis=1) / means.prompt.sum(axis=1)
        numbers.append(np.stack([means.score.mean(axis=1), means.kept.mean(axis=1), per_token], axis=1))
        rows += _rows(suite, task, settings, means.score.shape[1], numbers[-1], full, interval(draws[-1]))
    average, spread = np.mean(numbers, axis=0), interval(np.mean(draws, axis=0))
    return rows + _rows(suite, AVERAGE, settings, num_items, average, full, spread)


def full_cache_of(setting: Setting, settings: Sequence[Setting]) -> Setting:
    """The full cache to compare with: of the same engine, rather with the same query, the most precise one.

    Raises CrushError if there is none.
    """
    found = [other for other in settings if (other.engine, other.policy) == (setting.engine, FULL)]
    if not found:
        raise CrushError(f"settings must have the full cache of engine {setting.engine!r} to compare with, got none")
    return min(found, key=lambda full: (full.query != setting.query, -bits(full.precisions)))


def bits(precisions: str) -> int:
    """Bits of a key's and a value's number together, scales left out. Raises CrushError unless it is "keys/values"."""
    names = precisions.split("/")
    for name in names:
        check_choice("precisions", name, PRECISIONS)
    return sum(_BITS[name] for name in names)


class _Means(NamedTuple):
    """Means over the questions of each item, float64 (S, n), items by their ids."""

    score: np.ndarray
    kept: np.ndarray
    bytes: np.ndarray
    prompt: np.ndarray


def _by_task(predictions: Iterable[Prediction], settings: Sequence[Setting]) -> dict[str, list[Prediction]]:
    """Predictions by their task. Raises CrushError unless every setting has the same questions, each once."""
    known = {setting.key: number for number, setting in enumerate(settings)}
    if len(known) < len(settings):
        raise CrushError("settings must be different from each other, got the same twice")
    found: dict[PredictionKey, Prediction] = {}
    for prediction in predictions:
        check_choice("setting_key", prediction.setting_key, known)
        if prediction.key in found:
            raise CrushError(f"predictions must answer a question once, got two for {_words(prediction.key)}")
        found[prediction.key] = prediction
    if not found:
        raise CrushError("predictions must have at least one answer, got none")
    for key in dict.fromkeys(key._replace(setting_key="") for key in found):
        for setting_key in known:
            if key._replace(setting_key=setting_key) not in found:
                missing = _words(key._replace(setting_key=setting_key))
                raise CrushError(f"predictions must be complete to be compared, got none for {missing}")
    tasks: dict[str, list[Prediction]] = {}
    for prediction in found.values():
        tasks.setdefault(prediction.task, []).append(prediction)
    return tasks


def _words(key: PredictionKey) -> str:
    return f"question {key.question_index} of {key.item_id!r} ({key.task}) under {key.setting_key}"


def _item_means(predictions: Sequence[Prediction], settings: Sequence[Setting]) -> _Means:
    row = {setting.key: number for number, setting in enumerate(settings)}
    column = {item: number for number, item in enumerate(sorted({p.item_id for p in predictions}))}
    sums, counts = np.zeros((4, len(row), len(column))), np.zeros((len(row), len(column)))
    for p in sorted(predictions, key=lambda p: p.key):  # sums of floats depend on their order
        place = row[p.setting_key], column[p.item_id]
        sums[:, place[0], place[1]] += (p.score, p.kept_tokens, p.bytes, p.prompt_tokens)
        counts[place] += 1
    return _Means(*(sums / counts))


def _rows(
    suite: str,
    task: str,
    settings: Sequence[Setting],
    num_items: int,
    numbers: np.ndarray,
    full: Sequence[int],
    intervals: np.ndarray,
) -> list[Row]:
    """numbers: score, kept tokens, bytes per token, float64 (S, 3). full: each one's full cache. intervals: (S, 2)."""
    scores = numbers[:, 0].tolist()
    return [
        Row(
            suite=suite,
            task=task,
            engine=setting.engine,
            policy=setting.policy,
            kept=1.0 if setting.policy == FULL else setting.kept,
            query=setting.query,
            n=num_items,
            score=score,
            full_score=scores[reference],
            difference=score - scores[reference],
            low=float(low),
            high=float(high),
            kept_tokens=float(kept_tokens),
            bytes_per_prompt_token=float(per_token),
            precisions=setting.precisions,
            settings=setting.settings,
        )
        for setting, score, reference, (_, kept_tokens, per_token), (low, high) in zip(
            settings, scores, full, numbers, intervals, strict=True
        )
    ]


def _canonical(value: Any) -> Any:
    """Equal values in one form: 1 and 1.0 are the same setting."""
    if isinstance(value, dict):
        return {name: _canonical(inner) for name, inner in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value
