"""From predictions to result rows: score, the full cache's score beside it, and the interval of their difference."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ov_kvcrush.config import parse_budget
from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.records import AVERAGE, FULL, Prediction, PredictionKey, Setting, bits
from ov_kvcrush.utils.checks import (
    check_choice,
    check_fraction,
    check_integer,
    check_number,
    check_object,
    check_string,
)

RESAMPLES = 10_000
BY_QUESTION = (
    "longqa",
    "fidelity",
)  # suites whose contexts have different numbers of questions, each of which counts as much
_TAILS = (0.025, 0.975)


@dataclass(frozen=True)
class ResultRow:
    """One setting on one task, or on the average of all tasks (task = "average": mean of the tasks' means).

    kept: requested fraction, 1.0 = full cache, None if tokens (settings["kept_tokens"]) or bytes (budget, such as
    "1/6", in settings too) were requested.
    contexts: number of items. n: of what the score is a mean: items, each the mean of its questions, or in BY_QUESTION
    questions. full_score: score of the full cache of the same engine, at the highest precision that ran. difference:
    score - full_score; low, high: its 95 % interval, by a paired bootstrap over items within tasks, so that questions
    about one context count as one draw. kl_mean, kl_median, top1: over questions, to that full cache along its own
    answer, nats and share; None where some were not measured. kept_tokens: mean as the score. bytes_per_prompt_token:
    sum of bytes / sum of prompt tokens. precisions: "keys/values", or PLAN.
    """

    suite: str
    task: str
    engine: str
    policy: str
    budget: str | None
    kept: float | None
    query: str
    n: int
    contexts: int
    score: float
    full_score: float
    difference: float
    low: float
    high: float
    kl_mean: float | None
    kl_median: float | None
    top1: float | None
    kept_tokens: float
    bytes_per_prompt_token: float
    precisions: str
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        for name in ("suite", "task", "engine", "policy", "query", "precisions"):
            check_string(name, getattr(self, name))
        check_object("settings", self.settings)
        bits(self.precisions)
        if self.kept is not None:
            check_fraction("kept", self.kept)
        elif self.budget is not None:
            parse_budget(self.budget)
        else:
            check_integer("settings['kept_tokens']", self.settings.get("kept_tokens"), 1)
        check_integer("n", self.n, 1)
        check_integer("contexts", self.contexts, 1)
        for name in ("kl_mean", "kl_median", "top1"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0)
        for name in ("score", "full_score", "difference", "low", "high", "kept_tokens", "bytes_per_prompt_token"):
            check_number(name, getattr(self, name))


def result_rows(
    predictions: Iterable[Prediction],
    settings: Sequence[Setting],
    suite: str,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[ResultRow]:
    """A row for every setting on every task, then on the average; tasks in the order in which they first appear.

    The result does not depend on the order of a task's predictions. Raises CrushError if there are no predictions, if
    an engine has no full cache among the settings, and unless every setting answered every question exactly once.
    """
    check_integer("resamples", resamples, 1)
    full = [settings.index(full_cache_of(setting, settings)) for setting in settings]
    rows: list[ResultRow] = []
    draws: list[np.ndarray] = []
    numbers: list[np.ndarray] = []
    counts = np.zeros(2, np.int64)
    for task, own in _by_task(predictions, settings).items():
        means = _item_means(own, settings)
        weights = means.questions if suite in BY_QUESTION else np.ones_like(means.questions)
        count = np.array([weights.sum(), len(weights)], np.int64)
        counts += count
        draws.append(bootstrap_means(means.score - means.score[full], generator(seed, task), resamples, weights))
        score, kept, nbytes, prompt = (
            (values * weights).sum(axis=1) / weights.sum()
            for values in (means.score, means.kept, means.bytes, means.prompt)
        )
        numbers.append(np.stack([score, kept, nbytes / prompt, *_divergences(own, settings)], axis=1))
        rows += _rows(suite, task, settings, count, numbers[-1], full, interval(draws[-1]))
    average, spread = np.mean(numbers, axis=0), interval(np.mean(draws, axis=0))
    return rows + _rows(suite, AVERAGE, settings, counts, average, full, spread)


def full_cache_of(setting: Setting, settings: Sequence[Setting]) -> Setting:
    """The full cache to compare with: same engine, all of it read, the same query if there is one, then most bits.

    Raises CrushError if there is none.
    """
    wanted = (setting.engine, FULL, None)
    found = [other for other in settings if (other.engine, other.policy, other.recall_tokens) == wanted]
    if not found:
        raise CrushError(f"settings must have the full cache of engine {setting.engine!r} to compare with, got none")
    return min(found, key=lambda full: (full.query != setting.query, -bits(full.precisions)))


class _Means(NamedTuple):
    """Means over the questions of each item, float64 (S, n), items sorted by id. questions: of each, float64 (n,)."""

    score: np.ndarray
    kept: np.ndarray
    bytes: np.ndarray
    prompt: np.ndarray
    questions: np.ndarray


def _by_task(predictions: Iterable[Prediction], settings: Sequence[Setting]) -> dict[str, list[Prediction]]:
    """Predictions by task. Raises CrushError unless every setting answered every question exactly once."""
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
    score, kept, nbytes, prompt = sums / counts
    return _Means(score, kept, nbytes, prompt, counts[0])


def _divergences(predictions: Sequence[Prediction], settings: Sequence[Setting]) -> np.ndarray:
    """float64 (3, S): mean and median of KL, and the mean of top1, over questions; NaN where one has none."""
    found: dict[str, list[tuple[float, float]]] = {setting.key: [] for setting in settings}
    for p in sorted(predictions, key=lambda p: p.key):
        found[p.setting_key].append((math.nan, math.nan) if p.kl is None or p.top1 is None else (p.kl, p.top1))
    both = np.array([found[setting.key] for setting in settings])
    return np.stack([both[:, :, 0].mean(axis=1), np.median(both[:, :, 0], axis=1), both[:, :, 1].mean(axis=1)])


def _rows(
    suite: str,
    task: str,
    settings: Sequence[Setting],
    counts: np.ndarray,
    numbers: np.ndarray,
    full: Sequence[int],
    intervals: np.ndarray,
) -> list[ResultRow]:
    """counts: n and contexts. full: each one's full cache. intervals: (S, 2).

    numbers: score, kept tokens, bytes per token, mean and median of KL, top1, float64 (S, 6).
    """
    scores = numbers[:, 0].tolist()
    return [
        ResultRow(
            suite=suite,
            task=task,
            engine=setting.engine,
            policy=setting.policy,
            budget=setting.settings.get("budget"),
            kept=1.0 if setting.policy == FULL else setting.kept,
            query=setting.query,
            n=int(counts[0]),
            contexts=int(counts[1]),
            score=score,
            full_score=scores[reference],
            difference=score - scores[reference],
            low=float(low),
            high=float(high),
            kl_mean=_or_none(kl_mean),
            kl_median=_or_none(kl_median),
            top1=_or_none(top1),
            kept_tokens=float(kept_tokens),
            bytes_per_prompt_token=float(per_token),
            precisions=setting.precisions,
            settings=setting.settings,
        )
        for setting, score, reference, (_, kept_tokens, per_token, kl_mean, kl_median, top1), (low, high) in zip(
            settings, scores, full, numbers, intervals, strict=True
        )
    ]


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def generator(seed: int, task: str) -> np.random.Generator:
    """The random generator of a task: separate, so that its interval does not depend on the other tasks of the run."""
    return np.random.default_rng([seed, zlib.crc32(task.encode())])


def bootstrap_means(
    values: np.ndarray, rng: np.random.Generator, resamples: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """Means over items drawn with replacement, with the same draws for every setting: float64 (resamples, S).

    values: float64 (S, n), one row per setting. weights: float64 (n,), of each item in a mean, such as its questions;
    None = all the same. O(resamples * n * S), as one product of matrices.
    """
    n = values.shape[1]
    drawn = rng.integers(0, n, (resamples, n)) + np.arange(resamples)[:, None] * n
    counts = np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n)
    # Centred on the mean, so that equal values have an interval of exactly 0, without rounding noise.
    weights = np.ones(n) if weights is None else weights
    centre = values @ weights / weights.sum()
    drawn_weights = counts * weights
    return centre + drawn_weights @ (values - centre[:, None]).T / drawn_weights.sum(axis=1, keepdims=True)


def interval(draws: np.ndarray) -> np.ndarray:
    """The middle 95 % of means (resamples, S): float64 (S, 2), low and high."""
    return np.quantile(draws, _TAILS, axis=0).T
