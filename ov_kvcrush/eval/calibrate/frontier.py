"""What bytes buy: plans of some sizes beside uniform settings, on texts that calibrated nothing."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.benchmarks.jsonl import records
from ov_kvcrush.eval.calibrate.measure import baklava_variant, keeping, variant_of
from ov_kvcrush.eval.calibrate.meter import CacheMeter, CacheVariant, ReadPrompt
from ov_kvcrush.eval.calibrate.rendering import PromptRenderer
from ov_kvcrush.kvcache.planning import geometry_of
from ov_kvcrush.policies.base import Policy
from ov_kvcrush.policies.plans.geometry import CacheGeometry
from ov_kvcrush.policies.plans.plan import TILE, HeadPlan
from ov_kvcrush.policies.plans.planner import BytePlanner
from ov_kvcrush.policies.plans.profile import KVProfile
from ov_kvcrush.policies.registry import build

BUDGETS = (1 / 5.5, 1 / 6.6, 1 / 8, 1 / 11, 1 / 16)
QUALITIES = (0.02, 0.05, 0.1)
PRECISIONS = (("u8", "u8"), ("u4", "u4"), ("u4", "u2"), ("u2", "u2"))
FRACTIONS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12)
LEAN = (
    (0.7, "u8/u4", "u2/u2"), (0.7, "u4/u2", "u2/u2"), (0.5, "u8/u4", "u4/u2"), (0.5, "u4/u2", "u2/u2"),
    (0.35, "u4/u4", "u4/u2"), (0.25, "u8/u4", "u4/u2"),
)  # fmt: skip
BAKLAVA = ((0.7, "u4", "u2"), (0.5, "u4", "u4"), (0.35, "u4", "u4"), (0.25, "u4", "u4"))
METHODS = ("plan", "quality", "uniform", "equal", "leankv", "baklava")
EQUAL = PRECISIONS[1:]  # u8 loses to each of these at the bytes of a plan
SHARING = (("u8", "u8"), ("u4", "u4"), ("u4", "u2"))
_LEAST_ANSWER = 8  # tokens: a shorter answer is no measure


@dataclass(frozen=True)
class Compared:
    """What each text's caches are.

    methods: some of METHODS; "equal": uniform settings of the plans' bytes. fractions: of the tokens that other uniform
    settings keep.

    Raises CrushError for a method or a fraction that there is not.
    """

    methods: tuple[str, ...] = METHODS
    fractions: tuple[float, ...] = FRACTIONS

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise CrushError(f"methods must be some of {', '.join(METHODS)}, got {method!r}")
        if not self.methods:
            raise CrushError(f"methods must be some of {', '.join(METHODS)}, got none")
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise CrushError(f"fractions must be in (0, 1], got {fraction:g}")


@dataclass(frozen=True)
class FrontierRow:
    """One cache of one text. of_bf16: its bytes over those of all tokens in bf16. predicted, planned: or NaN.

    predicted: KL divergence. planned: of_bf16 by the plan.
    """

    setting: str
    text: str
    kl: float
    same_top: float
    of_bf16: float
    predicted: float = float("nan")
    planned: float = float("nan")


def read_texts(folder: Path, per_file: int) -> Iterator[tuple[str, str]]:
    """Name and prompt of the first items of each jsonl file with a field "prompt", the files in turn.

    A folder in it with contexts.jsonl and items.jsonl is such a file, too: each context with its first question.
    Raises CrushError without any file, and while iterating for a line that is no JSON object.
    """
    tasks: dict[str, Iterator[dict[str, Any]]] = {path.stem: _rows(path) for path in sorted(folder.glob("*.jsonl"))}
    for path in sorted(folder.glob("*/contexts.jsonl")):
        tasks[path.parent.name] = _asked(path, path.with_name("items.jsonl"))
    if not tasks:
        raise CrushError(f"data must be a folder with jsonl files, got {str(folder)!r}")
    found = {name: list(itertools.islice(rows, per_file)) for name, rows in tasks.items()}
    for index in range(per_file):
        for name, rows in found.items():
            row = rows[index] if index < len(rows) else None
            if row and isinstance(row.get("prompt"), str):
                yield f"{name}:{index}", row["prompt"]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    return (row for _, row in records(path))


def _asked(contexts: Path, items: Path) -> Iterator[dict[str, Any]]:
    questions: dict[Any, Any] = {}
    for row in _rows(items):
        questions.setdefault(row.get("context_id"), row.get("question"))
    for row in _rows(contexts):
        question = questions.get(row.get("context_id"))
        if question is not None:
            yield {"prompt": f"{row.get('context')}\n\n{question}"}


def measure_frontier(
    meter: CacheMeter,
    profile: KVProfile,
    policy: Policy,
    renderer: PromptRenderer,
    texts: Sequence[tuple[str, str]],
    tokens: int,
    answer_tokens: int,
    told: Callable[[str, list[FrontierRow]], None],
    sharing: Sequence[CacheMeter] = (),
    compared: Compared = Compared(),
) -> list[FrontierRow]:
    """Plans and uniform settings on every text; those with answers that are too short to compare are left out.

    sharing: the same model with layers that read another's keys and values.
    """
    rows: list[FrontierRow] = []
    for name, text in texts:
        ids = renderer.render(text, tokens)
        with meter.read(ids, answer_tokens, policy, renderer.ends) as read:
            answer = read.answer
            if len(answer.rows) < _LEAST_ANSWER:
                told(name, [])
                continue
            found = list(_of_text(meter, profile, policy, read, name, compared))
        full_bytes = geometry_of(meter.model, meter.config).full_bytes(len(ids))
        for other in sharing:
            with other.read(ids, answer_tokens, policy, renderer.ends, answer) as read:
                found += _of_sharing(other, read, name, full_bytes)
        rows += found
        told(name, found)
    return rows


def _of_text(
    meter: CacheMeter, profile: KVProfile, policy: Policy, read: ReadPrompt, name: str, compared: Compared
) -> Iterator[FrontierRow]:
    geometry = geometry_of(meter.model, meter.config)
    full_bytes = geometry.full_bytes(read.num_tokens)
    named: list[tuple[str, CacheVariant]] = []
    told: dict[str, tuple[float, float]] = {}  # of plans: KL divergence, bytes
    for label, planner in _planners(geometry, profile, compared):
        plan = planner.plan(read.num_tokens)
        named.append((label, variant_of(read, plan, policy)))
        told[label] = plan.predicted_kl or float("nan"), planner.nbytes(plan, read.num_tokens) / full_bytes
    for fraction in compared.fractions if "uniform" in compared.methods else ():
        kept = read.select(keeping(policy, fraction)) if fraction < 1 else None
        for key, value in PRECISIONS:
            named.append((f"{fraction:g} {key}/{value}", CacheVariant(meter.uniform(key, value), kept)))
    for budget, (key, value) in itertools.product(BUDGETS, EQUAL) if "equal" in compared.methods else ():
        tokens = tokens_of(geometry, key, value, budget * full_bytes, read.num_tokens)
        if tokens is not None:
            kept = read.select(keeping(policy, tokens / read.num_tokens))
            named.append((f"1/{1 / budget:.1f} {key}/{value}", CacheVariant(meter.uniform(key, value), kept)))
    for fraction, high, low in LEAN if "leankv" in compared.methods else ():
        lean = build("leankv", kept=fraction, high=high, low=low)
        named.append((f"leankv {fraction:g} {high} {low}", read.tiered(lean)))
    if profile.baklava is not None and "baklava" in compared.methods:
        for fraction, *pair in BAKLAVA:
            variant = baklava_variant(meter, read, policy, profile.baklava, fraction, (pair[0], pair[1]))
            named.append((f"baklava {fraction:g} {pair[0]}/{pair[1]}", variant))
    for (label, _), one in zip(named, read.measure([variant for _, variant in named]), strict=True):
        known = told.get(label, ())
        yield FrontierRow(label, name, one.kl, one.same_top, one.nbytes / full_bytes, *known)


def _planners(geometry: CacheGeometry, profile: KVProfile, compared: Compared) -> Iterator[tuple[str, BytePlanner]]:
    heads = profile.num_kv_heads
    for budget in BUDGETS if "plan" in compared.methods else ():
        yield f"plan 1/{1 / budget:.1f}", BytePlanner(geometry, heads, profile, budget)
    for kl in QUALITIES if "quality" in compared.methods else ():
        yield f"quality {kl:g}", BytePlanner(geometry, heads, profile, quality=kl)


def tokens_of(geometry: CacheGeometry, key: str, value: str, nbytes: float, length: int) -> int | None:
    """The fewest tokens, kept by each head in these precisions, that take `nbytes`; None where all take less.

    In whole tiles, as plans keep them: other numbers take more bytes for fewer tokens.
    """

    def taken(tiles: int) -> float:
        return float(geometry.sizes([HeadPlan(tiles * TILE / length, key, value)], length).sum())

    tiles = range(1, length // TILE + 1)
    found = bisect.bisect_left(tiles, nbytes, key=taken)
    return tiles[found] * TILE if found < len(tiles) else None


def _of_sharing(meter: CacheMeter, read: ReadPrompt, name: str, full_bytes: float) -> Iterator[FrontierRow]:
    count = len(meter.config.sharing)
    for (key, value), one in zip(
        SHARING, read.measure([CacheVariant(meter.uniform(*x)) for x in SHARING]), strict=True
    ):
        label = f"kvsharer {count} {key}/{value}"
        yield FrontierRow(label, name, one.kl, one.same_top, one.nbytes / full_bytes)


def against_uniform(rows: Sequence[FrontierRow]) -> list[dict[str, float | str]]:
    """All but uniform settings beside the best uniform one that takes at least as many bytes; most bytes first.

    The best: of those that no other beats in bytes and in mean the next larger one, which favours it. "ratio" of the
    means has a bootstrap interval of 95 % over texts. Settings that take more than any uniform one are left out.
    """
    texts = list(dict.fromkeys(row.text for row in rows))
    kl: dict[str, np.ndarray] = {}
    sizes: dict[str, float] = {}
    for setting in dict.fromkeys(row.setting for row in rows):
        of = {row.text: row for row in rows if row.setting == setting}
        if len(of) == len(texts):
            kl[setting] = np.array([of[text].kl for text in texts])
            sizes[setting] = float(np.mean([row.of_bf16 for row in of.values()]))
    best: list[str] = []  # fewest bytes first
    for name in sorted((name for name in kl if name[0].isdigit()), key=lambda name: sizes[name]):
        if not best or kl[name].mean() < kl[best[-1]].mean():
            best.append(name)
    drawn = np.random.default_rng(0).integers(0, len(texts), (2000, len(texts)))
    found: list[dict[str, float | str]] = []
    for name in sorted((name for name in kl if not name[0].isdigit()), key=lambda name: -sizes[name]):
        rival = next((other for other in best if sizes[other] >= sizes[name]), None)
        if rival is None:
            continue
        ratios = kl[name][drawn].mean(axis=1) / np.maximum(kl[rival][drawn].mean(axis=1), 1e-12)
        found.append(
            {
                "setting": name,
                "of_bf16": sizes[name],
                "mean": float(kl[name].mean()),
                "uniform": rival,
                "uniform_of_bf16": sizes[rival],
                "uniform_mean": float(kl[rival].mean()),
                "ratio": float(kl[name].mean() / max(kl[rival].mean(), 1e-12)),
                "low": float(np.quantile(ratios, 0.025)),
                "high": float(np.quantile(ratios, 0.975)),
            }
        )
    return found


def summary(rows: Sequence[FrontierRow]) -> list[dict[str, float | str]]:
    """By setting: mean with a bootstrap interval of 95 %, median and 90 % quantile over texts; most bytes first.

    off_plan: how far the bytes of any text are from its plan's, at most; NaN without a plan.
    """
    random = np.random.default_rng(0)
    found: list[dict[str, float | str]] = []
    for setting in dict.fromkeys(row.setting for row in rows):
        of = [row for row in rows if row.setting == setting]
        kl = np.array([row.kl for row in of])
        means = kl[random.integers(0, len(kl), (2000, len(kl)))].mean(axis=1)
        found.append(
            {
                "setting": setting,
                "texts": len(of),
                "of_bf16": float(np.mean([row.of_bf16 for row in of])),
                "mean": float(kl.mean()),
                "low": float(np.quantile(means, 0.025)),
                "high": float(np.quantile(means, 0.975)),
                "median": float(np.median(kl)),
                "q90": float(np.quantile(kl, 0.9)),
                "same_top": float(np.mean([row.same_top for row in of])),
                "predicted": float(np.mean([row.predicted for row in of])),
                "off_plan": float(np.max([abs(row.of_bf16 / row.planned - 1) for row in of])),
            }
        )
    return sorted(found, key=lambda row: -float(row["of_bf16"]))
