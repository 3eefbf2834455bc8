"""Rows: questions are averaged by item, differences are paired, intervals are what drawing item by item gives."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from eval_runs import FULL, SETTINGS, U8, answers
from hypothesis import given, settings
from hypothesis import strategies as st

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.records import AVERAGE, Prediction, Setting, bits
from ov_kvcrush.eval.report.tables import by_task, kept_label, policy_label, row_label, sorted_rows, summary
from ov_kvcrush.eval.statistics import ResultRow, bootstrap_means, full_cache_of, generator, interval, result_rows

KVCRUSH = SETTINGS[2]
ISSUE_FIELDS = ("suite", "task", "engine", "policy", "kept", "query", "n", "score", "full_score", "kept_tokens")


def prediction(item: str, score: float, setting: Setting = FULL, question: int = 0, **changes: Any) -> Prediction:
    values = {"task": "qa", "turn": 0, "text": "", "kept_tokens": 10.0, "prompt_tokens": 100, "bytes": 500}
    return Prediction(item, question_index=question, setting_key=setting.key, score=score, seconds=0.0,
                      **{**values, **changes})  # fmt: skip


def slow_draws(differences: dict[str, list[float]], seed: int, resamples: int) -> list[float]:
    """Means over tasks of the means of drawn items, by loops; the same items are drawn as in the rows."""
    picked = {
        task: generator(seed, task).integers(0, len(values), (resamples, len(values)))
        for task, values in differences.items()
    }
    draws = []
    for r in range(resamples):
        means = [sum(values[i] for i in picked[task][r]) / len(values) for task, values in differences.items()]
        draws.append(sum(means) / len(means))
    return draws


def slow_quantile(draws: list[float], share: float) -> float:
    """Linear between the two nearest of the sorted draws."""
    ordered, place = sorted(draws), share * (len(draws) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def item_means(predictions: list[Prediction], setting: Setting, task: str) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for p in predictions:
        if (p.task, p.setting_key) == (task, setting.key):
            found.setdefault(p.item_id, []).append(p.score)
    return {item: sum(scores) / len(scores) for item, scores in sorted(found.items())}


def test_rows_equal_slow_loops() -> None:
    made = answers()
    rows = {(row_label(row), row.task): row for row in result_rows(made, SETTINGS, "ruler", seed=3, resamples=200)}
    assert len(rows) == len(SETTINGS) * 3
    for setting in SETTINGS:
        reference = FULL if setting.engine == "crush" else SETTINGS[7]
        differences: dict[str, list[float]] = {}
        for task in ("qa", "code"):
            own, full = (item_means(made, s, task) for s in (setting, reference))
            differences[task] = [own[item] - full[item] for item in own]
            row = rows[row_label(setting), task]
            assert row.n == len(own) == 6
            assert row.score == pytest.approx(sum(own.values()) / 6)
            assert row.full_score == pytest.approx(sum(full.values()) / 6)
            check_interval(row, {task: differences[task]})
        average = rows[row_label(setting), AVERAGE]
        assert average.n == 12
        for name in ("score", "full_score", "difference", "kept_tokens", "bytes_per_prompt_token"):
            values = [getattr(rows[row_label(setting), task], name) for task in ("qa", "code")]
            assert getattr(average, name) == pytest.approx(sum(values) / 2)
        check_interval(average, differences)


def check_interval(row: ResultRow, differences: dict[str, list[float]]) -> None:
    draws = slow_draws(differences, 3, 200)
    mean = sum(sum(values) / len(values) for values in differences.values()) / len(differences)
    assert row.difference == pytest.approx(mean, abs=1e-12)
    assert (row.low, row.high) == pytest.approx((slow_quantile(draws, 0.025), slow_quantile(draws, 0.975)), abs=1e-12)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_interval_contains_the_mean(values: list[float], seed: int) -> None:
    low, high = interval(bootstrap_means(np.array([values]), generator(seed, "qa"), 2000))[0]
    assert low - 1e-12 <= np.mean(values) <= high + 1e-12
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        low, high = interval(bootstrap_means(rng.normal(0.1, 1, (1, 60)), rng, 400))[0]
        covered += bool(low <= 0.1 <= high)
    assert 0.88 <= covered / 300 <= 0.99


def test_questions_of_an_item_are_averaged_first() -> None:
    made = [prediction("a", 1.0, question=i) for i in range(9)] + [prediction("b", 0.0)]
    row = result_rows(made, [FULL], "ruler")[0]
    assert (row.n, row.score) == (2, 0.5)


def test_bytes_are_all_bytes_by_all_tokens() -> None:
    made = [prediction("a", 1.0, bytes=1000, prompt_tokens=10), prediction("b", 1.0, bytes=1000, prompt_tokens=90)]
    row = result_rows(made, [FULL], "ruler")[0]
    assert (row.bytes_per_prompt_token, row.kept_tokens) == (20.0, 10.0)


def test_full_cache_differs_from_itself_by_nothing() -> None:
    for row in result_rows(answers(), SETTINGS, "ruler", resamples=100):
        if row_label(row) == row_label(FULL):
            assert (row.difference, row.low, row.high, row.kept) == (0, 0, 0, 1.0)


def test_order_of_answers_changes_nothing() -> None:
    made = answers()
    shuffled = random.Random(1).sample(made, len(made))
    shuffled.sort(key=lambda p: p.task != "qa")  # tasks come in their order
    assert result_rows(shuffled, SETTINGS, "ruler", resamples=100) == result_rows(
        made, SETTINGS, "ruler", resamples=100
    )


def test_interval_of_a_task_depends_on_no_other_task() -> None:
    made = answers()
    alone = result_rows([p for p in made if p.task == "code"], SETTINGS, "ruler", resamples=100)
    both = result_rows(made, SETTINGS, "ruler", resamples=100)
    assert [row for row in alone if row.task == "code"] == [row for row in both if row.task == "code"]


def test_rows_have_the_fields_that_were_promised() -> None:
    row = result_rows(answers(), SETTINGS, "ruler", resamples=10)[5]
    more = ("budget", "contexts", "kl_mean", "kl_median", "top1")
    fields = (*ISSUE_FIELDS, *more, "bytes_per_prompt_token", "difference", "low", "high", "precisions", "settings")
    assert sorted(asdict(row)) == sorted(fields)
    assert (row.kept, row.settings, row.precisions) == (None, {"kept_tokens": 64}, "u8/u8")


def test_full_cache_is_the_most_precise_of_the_engine_rather_of_the_query() -> None:
    coarse = Setting(engine="crush", policy="none", query="agnostic", **U8)
    agnostic = replace(KVCRUSH, query="agnostic")
    assert full_cache_of(KVCRUSH, [SETTINGS[1], coarse, FULL]) == FULL
    assert full_cache_of(agnostic, [SETTINGS[1], FULL]) == FULL
    assert full_cache_of(agnostic, [SETTINGS[1], coarse, FULL]) == coarse


def test_keys_tell_settings_apart_and_nothing_else() -> None:
    assert len({setting.key for setting in SETTINGS}) == len(SETTINGS)
    one = replace(KVCRUSH, kept=1.0, policy_settings={"a": 1, "b": 2.5})
    assert one.key == replace(one, kept=1, policy_settings={"b": 2.5, "a": 1.0}).key
    assert one.key != replace(one, policy_settings={"a": 1, "b": 2}).key
    assert FULL.key == "crush-none-full-bf16-bf16-aware-" + FULL.key[-10:]


def test_a_budget_has_a_name_and_rows_of_its_own() -> None:
    sixth = replace(KVCRUSH, kept=None, budget=1 / 6)
    assert (sixth.precisions, sixth.settings["budget"], bits(sixth.precisions)) == ("plan", "1/6", 0)
    assert sixth.key.startswith("crush-kvcrush-plan-0.1667-aware-")
    assert len({sixth.key, KVCRUSH.key, replace(sixth, budget=1 / 9).key}) == 3
    settings = (FULL, replace(KVCRUSH, kept=None, kept_tokens=9), KVCRUSH, replace(sixth, budget=0.15), sixth)
    rows = [row for row in result_rows(answers(settings), settings, "ruler") if row.task == AVERAGE]
    assert [row.settings.get("budget") for row in rows] == [None] * 3 + ["0.15", "1/6"]
    assert [row.kept for row in rows[3:]] == [None, None]
    shown = [(kept_label(row), row.precisions) for row in sorted_rows(rows)]
    assert shown == [
        ("100 %", "bf16/bf16"), ("25 %", "u8/u8"), ("9 tokens", "u8/u8"), ("1/6 of bf16", "plan"),
        ("0.15 of bf16", "plan"),
    ]  # fmt: skip
    assert {policy_label(row) for row in rows} == {"full", "kvcrush"}


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "engine": ({"engine": "crash"}, "engine must be one of crush, genai, got 'crash'"),
    "query": ({"query": "blind"}, "query must be one of aware, agnostic"),
    "precision": ({"key_precision": "u9"}, "key_precision must be one of"),
    "fraction": ({"kept": 1.5}, "kept must be a fraction"),
    "both": ({"kept_tokens": 5}, "kept must be given, or kept_tokens or budget instead, with policy 'kvcrush'"),
    "fraction and bytes": ({"budget": 0.1}, "got kept=0.25, kept_tokens=None and budget=0.1"),
    "neither": ({"kept": None}, "kept must be given, or kept_tokens or budget instead"),
    "bytes": ({"kept": None, "budget": 2}, "budget must be a fraction"),
    "bytes in precisions": (
        {"kept": None, "budget": 0.1, "key_precision": "u4"},
        "key_precision and value_precision must be u8 with a budget, got u4/u8",
    ),
    "full": ({"policy": "none"}, "kept must be left out with policy 'none'"),
    "settings": ({"policy_settings": [1]}, "policy_settings must be an object"),
    "name": ({"policy": ""}, "policy must be a string that is not empty"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_setting_is_refused(case: str) -> None:
    changes, message = BAD_SETTINGS[case]
    with pytest.raises(CrushError, match=message):
        replace(KVCRUSH, **changes)


BAD_ANSWERS: dict[str, tuple[Callable[[list[Prediction]], list[Prediction]], str]] = {
    "none": (lambda made: [], "must have at least one answer"),
    "one missing": (lambda made: made[:-1], r"got none for question 2 of 'code-5' \(code\) under crush-snapkv-plan"),
    "one twice": (lambda made: [*made, made[0]], "answer a question once"),
    "other setting": (lambda made: [replace(made[0], setting_key="x")], "setting_key must be one of"),
}


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_what_cannot_be_compared_is_refused(case: str) -> None:
    change, message = BAD_ANSWERS[case]
    with pytest.raises(CrushError, match=message):
        result_rows(change(answers()), SETTINGS, "ruler")


def test_a_run_without_its_full_cache_is_refused() -> None:
    chosen = [setting for setting in SETTINGS if setting is not SETTINGS[7]]
    with pytest.raises(CrushError, match="must have the full cache of engine 'genai'"):
        result_rows(answers(chosen), chosen, "ruler")


@pytest.mark.parametrize("name", ["score", "kept_tokens", "seconds"])
@pytest.mark.parametrize("value", [math.nan, math.inf, "1", True, None])
def test_a_number_that_is_none_is_refused(name: str, value: Any) -> None:
    with pytest.raises(CrushError, match=f"{name} must be a finite number"):
        replace(answers()[0], **{name: value})


def test_tables_have_full_first_then_most_kept_and_the_incumbent_beside() -> None:
    rows = result_rows(answers(), SETTINGS, "ruler", resamples=50)
    chosen = [row for row in rows if row.task == AVERAGE]
    expected = [row_label(SETTINGS[i]) for i in (0, 1, 7, 4, 2, 3, 8, 6, 5, 9)]
    assert [row_label(row) for row in sorted_rows(chosen)] == expected
    assert sorted_rows(chosen[::-1]) == sorted_rows(chosen)
    grid = summary(rows)
    assert [(line[0], line[1]) for line in grid.lines] == [
        (policy_label(row), kept_label(row)) for row in sorted_rows(chosen)
    ]
    assert grid.lines[3][:3] == ("kvcrush (share=0.5)", "50 %", "u8/u8")
    assert grid.lines[6][0] == "genai kvcrush"
    assert grid.lines[8][1] == "64 tokens"
    wide = by_task(rows)
    assert wide.header == ("setting", AVERAGE, "qa", "code")
    assert [line[0] for line in wide.lines] == expected


def test_markdown_has_every_cell_and_no_broken_line() -> None:
    rows = result_rows(answers(), SETTINGS, "ruler", resamples=50)
    odd = [replace(row, settings={**row.settings, "note": "a|b"}) for row in rows]
    lines = summary(odd).markdown().splitlines()
    assert len(lines) == 2 + len(SETTINGS)
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    kvcrush = next(line for line in lines if line.startswith("| kvcrush") and "u8/u4" in line)
    row = next(row for row in rows if row.task == AVERAGE and row.precisions == "u8/u4")
    for text in (f"{100 * row.score:.1f}", f"{100 * row.difference:+.1f}", f"{row.bytes_per_prompt_token:.0f}"):
        assert f" {text} " in kvcrush
