"""The benchmark: equal settings on both sides, right arithmetic, clear ends. No test says how fast anything is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from ov_kvcrush import native
from ov_kvcrush.bench import cli, engines
from ov_kvcrush.bench.attention.measure import layers_of
from ov_kvcrush.bench.cli import app
from ov_kvcrush.bench.compare import CellResult, EngineRuns, measure, num_stages
from ov_kvcrush.bench.measure import RunResult, Storage, random_prompts, run_once, summarise
from ov_kvcrush.bench.plot import panels_of, points_of
from ov_kvcrush.bench.process import WorkerError, worker
from ov_kvcrush.bench.report import make_ratios, make_row, make_rows, quotients
from ov_kvcrush.bench.settings import BenchSettings, Cell
from ov_kvcrush.bench.worker import _replies
from ov_kvcrush.cli.environment import describe_environment
from ov_kvcrush.cli.parse import parse_numbers, parse_properties
from ov_kvcrush.config import CacheConfig
from ov_kvcrush.errors import CrushError
from ov_kvcrush.model.plugin import plugin_precisions
from ov_kvcrush.policies.registry import build, settings_of
from ov_kvcrush.utils.json_file import check_writable, write_json

ROW_FIELDS = {
    *("engine", "policy", "context", "batch", "kept_tokens", "ttft_s", "tpot_ms", "tokens_per_s", "kv_bytes"),
    *("peak_rss_bytes", "policy_ms", "overhead_ms_per_step", "runs", "attention", "key_precision", "value_precision"),
    *("is_as_asked", "kv_bytes_per_token", "peak_growth_bytes", "held_growth_bytes", "policy_share"),
}
STORED = Storage("CrushAttention", "u8", "u8")
ENVIRONMENT_FIELDS = {"cpu", "threads", "isa", "os", "python", "versions", "kernel", "total_memory_bytes"}


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def settings(**changes: Any) -> BenchSettings:
    return replace(BenchSettings(Path("model"), vocab_size=100, context_length=None), **changes)


# -- against openvino_genai --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(shallow: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "out.json"
    shape = ("--context", "64", "--batch", "1,3", "--new-tokens", 8, "--runs", 2, "--max-num-batched-tokens", 96)
    types = ("--key-precision", "u4", "--value-precision", "u2")
    done = bench(shallow, *shape, *types, "--against", "genai", "--property", "INFERENCE_NUM_THREADS=1", "--json", path)
    assert done.exit_code == 0, done.output
    assert "crush / genai" in done.output
    assert "u4/u2" in done.output
    assert "u8/u8 *" in done.output
    assert "* cannot store the types that were asked for" in done.output
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def test_report_has_both_engines_in_every_cell(report: dict[str, Any]) -> None:
    cells = [(row["context"], row["batch"], row["engine"]) for row in report["rows"]]
    assert cells == [(64, batch, engine) for batch in (1, 3) for engine in ("crush", "genai")]
    assert {(entry["context"], entry["batch"]) for entry in report["ratios"]} == {(64, 1), (64, 3)}


def test_report_has_the_promised_fields(report: dict[str, Any]) -> None:
    assert set(report) >= {"rows", "ratios", "environment", "command", "settings"}
    assert set(report["environment"]) >= ENVIRONMENT_FIELDS
    assert report["environment"]["kernel"] == f"CrushAttention {native.info()['isa']}"
    assert set(report["environment"]["versions"]) == {"openvino", "openvino_genai", "ov_kvcrush"}
    for row in report["rows"]:
        assert set(row) >= ROW_FIELDS
        assert (row["policy"], row["kept_tokens"]) == ("none", row["context"])
        assert (row["policy_ms"], row["policy_share"]) == (0, 0)
        assert (row["overhead_ms_per_step"] is None) == (row["engine"] == "genai")
        assert row["peak_rss_bytes"] >= row["load_peak_rss_bytes"] > 0
        assert row["peak_growth_bytes"] > 0
        assert len(row["runs"]) == 2
        for run in row["runs"]:
            assert len(run["ttft_s_each"]) == len(run["tpot_ms_each"]) == row["batch"]
            assert 0 < min(run["ttft_s_each"]) <= run["ttft_s"] <= max(run["ttft_s_each"])
            assert min(run["tokens_per_s"], run["total_tokens_per_s"], run["kv_bytes"]) > 0


def test_both_engines_take_the_same_steps(report: dict[str, Any]) -> None:
    """Chunk size and prompts that differed would show in the number of steps."""
    for ours, theirs in zip(report["rows"][::2], report["rows"][1::2], strict=True):
        assert {run["num_steps"] for run in ours["runs"]} == {run["num_steps"] for run in theirs["runs"]}


def test_rows_say_what_is_stored_and_in_how_many_bytes(report: dict[str, Any], shallow: Path) -> None:
    """The bytes are those of a store of the same shape: tiles of what is cached, and nothing of staged prompts."""
    layers = [layer.shape for layer in layers_of(shallow)]
    computed = plugin_precisions({}).inference
    recent = "bf16" if computed == "f32" else computed
    store = native.Store(layers=layers, key="u4", value="u2", recent=recent, recent_tokens=32, group_size=64)
    for ours, theirs in zip(report["rows"][::2], report["rows"][1::2], strict=True):
        assert (ours["attention"], ours["key_precision"], ours["value_precision"]) == ("CrushAttention", "u4", "u2")
        assert (theirs["attention"], theirs["key_precision"]) == ("PagedAttention", "u8")
        assert (ours["is_as_asked"], theirs["is_as_asked"]) == (True, False)
        # One step before the first request ends, which has 7 of its 8 tokens; the last of them is not cached.
        # A step takes 96 rows, so prompts of 64 end one step after the other.
        cached = [64 + 7 - 1 - i for i in range(ours["batch"])]
        held = sum(map(store.bytes_for, cached))
        assert ours["kv_bytes_per_token"] == pytest.approx(held / sum(cached))
        assert ours["kv_bytes"] >= held


def test_ratios_of_the_report_follow_from_its_rows(report: dict[str, Any]) -> None:
    for i, entry in enumerate(report["ratios"]):
        ours, theirs = report["rows"][2 * i : 2 * i + 2]
        for name in ("ttft_s", "tpot_ms", "tokens_per_s", "kv_bytes", "peak_rss_bytes"):
            assert entry[name]["of_medians"] == pytest.approx(ours[name] / theirs[name])


def test_alone_there_is_nothing_to_compare(shallow: Path) -> None:
    chosen = BenchSettings.for_model(shallow, contexts=(40,), new_tokens=2, runs=1)
    stages: list[str] = []
    results = list(measure(chosen, stages.append))
    rows = make_rows(results, chosen)
    assert [row.engine for row in rows] == ["crush"]
    assert make_ratios(rows) == []
    assert len(stages) == num_stages(chosen)


def test_engines_are_told_the_same() -> None:
    chosen = settings(against="genai", properties={"KV_CACHE_PRECISION": "u8"}, max_num_batched_tokens=77)
    ours, theirs = (chosen.worker_job(engine, Cell(1000, 2)) for engine in chosen.engines)
    assert (ours.pop("engine"), theirs.pop("engine")) == ("crush", "genai")
    assert ours == theirs
    assert (ours["properties"], ours["max_num_batched_tokens"]) == ({"KV_CACHE_PRECISION": "u8"}, 77)


# -- with a policy -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy_report(shallow: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "out.json"
    shape = ("--context", 500, "--batch", "2", "--new-tokens", 4, "--runs", 1)
    policy = ("--policy", "kvcrush", "--kept-tokens", 165, "--policy-option", "share=0.5")
    done = bench(shallow, *shape, *policy, "--against", "genai-policy", "--json", path)
    assert done.exit_code == 0, done.output
    assert "crush / genai-policy" in done.output
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def test_rows_tell_what_was_kept_and_what_choosing_took(policy_report: dict[str, Any]) -> None:
    ours, theirs = policy_report["rows"]
    assert (ours["policy"], ours["kept_tokens"]) == ("kvcrush", 165)
    assert 0 < ours["policy_ms"] < 1e3 * ours["ttft_s"] * 2
    assert 0 < ours["policy_share"] < 1
    assert (theirs["policy"], theirs["kept_tokens"]) == ("kvcrush", 160)
    assert (theirs["policy_ms"], theirs["policy_share"]) == (None, None)
    # Bytes of ours are those of the kept tokens, in tiles of 32; theirs once held the whole prompt.
    assert ours["kv_bytes"] < theirs["kv_bytes"]


def test_report_has_all_settings_of_the_policy(policy_report: dict[str, Any]) -> None:
    asked = build("kvcrush", kept_tokens=165, min_tokens=165, share=0.5)
    assert policy_report["settings"]["policy"] == settings_of(asked)
    assert build(**policy_report["settings"]["policy"]) == asked


@pytest.mark.parametrize("name", ["kvcrush", "tova"])
def test_openvino_genai_holds_the_blocks_that_it_is_told_to_keep(name: str, shallow: Path) -> None:
    """Its own count of blocks: those of the kept tokens, and the one that is being filled."""
    chosen = BenchSettings.for_model(
        shallow, policy=build(name, kept_tokens=192, min_tokens=192), against="genai-policy", contexts=(500,)
    )
    job = chosen.worker_job("genai-policy", Cell(500, 1))
    eviction = engines.eviction_of(job)
    assert eviction is not None
    assert (eviction.kept_tokens, eviction.name) == (192, "kvcrush" if name == "kvcrush" else "snapkv")
    engine = engines.GenaiUnderTest(job)
    handle = engine.add(0, random_prompts(1, 500, chosen.vocab_size, 0)[0], 8)
    for _ in range(6):
        engine.step()
    assert handle.can_read()
    used = engine._pipeline.get_metrics().cache_usage * job["num_kv_blocks"] / 100
    assert round(used) == 192 // 32 + 1


def test_engines_without_the_policy_do_not_evict() -> None:
    chosen = settings(policy=build("kvcrush"), against="genai")
    assert engines.eviction_of(chosen.worker_job("genai", Cell(1000, 1))) is None
    row = make_row(Cell(8, 1), chosen, EngineRuns("genai", 1.0, STORED, runs=[made_up_run()]))
    assert (row.policy, row.kept_tokens) == ("none", 8)


def test_prompts_are_the_same_every_time_and_differ_from_each_other() -> None:
    prompts = random_prompts(4, 50, 1000, seed=3)
    assert np.array_equal(prompts, random_prompts(4, 50, 1000, seed=3))
    assert prompts.shape == (4, 50)
    assert prompts.min() >= 0
    assert prompts.max() < 1000
    assert len({row.tobytes() for row in prompts}) == 4


# -- scaling -----------------------------------------------------------------------------------------------------------


def test_scaling_measures_ours_with_and_without_recall_and_openvino_genai(
    shallow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each engine's job says what its steps read; lines of the picture are told apart by it."""
    seen: list[BenchSettings] = []

    def made_up(chosen: BenchSettings, _: Any) -> Iterator[CellResult]:
        seen.append(chosen)
        for cell in chosen.cells:
            yield CellResult(cell, [EngineRuns(n, 1.0, STORED, runs=[made_up_run()]) for n in chosen.engines])

    monkeypatch.setattr(cli, "measure", made_up)
    path = tmp_path / "out.json"
    done = bench(shallow, "--scaling", "64,128", "--recall-tokens", "64", "--json", path)
    assert done.exit_code == 0, done.output
    assert seen[0].engines == ("crush", "crush-recall", "genai")
    told = {engine: seen[0].worker_job(engine, Cell(64, 1)) for engine in seen[0].engines}
    assert [job["recall_tokens"] for job in told.values()] == [None, "64", None]
    assert engines._cache_of(told["crush-recall"])[0].recall_tokens == 64
    report = json.loads(path.read_text())
    assert [(entry["against"], entry["context"]) for entry in report["ratios"]] == [
        (name, context) for context in (64, 128) for name in ("crush-recall", "genai")
    ]
    (panel,) = panels_of(points_of(report))
    assert list(panel.lines) == ["crush u8/u8", "crush u8/u8 recall 64", "genai u8/u8"]
    assert all([x for x, _ in line] == [64, 128] for line in panel.lines.values())
    assert "crush / crush-recall" in done.output


def test_what_is_recalled_stands_beside_the_only_engine_of_ours() -> None:
    chosen = settings(recall_tokens="64", against="genai")
    row = make_row(Cell(8, 1), chosen, EngineRuns("crush", 1.0, STORED, runs=[made_up_run()]))
    assert (chosen.engines, row.recall_tokens) == (("crush", "genai"), "64")


@pytest.mark.parametrize("weights", [None, "packed", "plugin"])
def test_the_job_says_who_multiplies(weights: str | None) -> None:
    cache, _ = engines._cache_of(settings(weights=weights).worker_job("crush", Cell(8, 1)))
    assert cache.weights == (weights or CacheConfig().weights)


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_times_follow_their_definitions() -> None:
    times = [[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]]  # the second prompt is done at 2, then 5 tokens follow in 3 s
    result = summarise(times, kv_bytes=7, overheads=[0.001, 0.003], num_steps=5, num_full_decode_steps=2)
    assert result.ttft_s == 1.5
    assert result.ttft_s_each == [1, 2]
    assert result.tpot_ms == 1000
    assert result.tokens_per_s == pytest.approx(5 / 3)
    assert result.total_tokens_per_s == pytest.approx(8 / 5)
    assert result.overhead_ms_per_step == pytest.approx(2)


def test_quotients_pair_runs_in_order() -> None:
    q = quotients([2.0, 6.0, 4.0], [1.0, 2.0, 4.0])
    assert (q.of_medians, q.of_best) == (4 / 2, 2 / 1)
    assert (q.pairs_median, q.pairs_min, q.pairs_max) == (2, 1, 3)
    assert quotients([2.0, 6.0], [1.0, 2.0], more_is_better=True).of_best == 3


def made_up_run(**changes: Any) -> RunResult:
    run = summarise([[1.0, 2.0, 3.0]], kv_bytes=100, overheads=[0.001], num_steps=3, num_full_decode_steps=2)
    return replace(run, **changes)


def test_rows_hold_medians_and_ratios_compare_only_one_cell() -> None:
    sizes = {"load_peak_rss_bytes": 30, "loaded_rss_bytes": 20}
    runs = [made_up_run(tpot_ms=t, held_growth_bytes=4, kv_bytes_per_token=2.0) for t in (5.0, 1.0, 3.0)]
    ours = EngineRuns("crush", 1.0, STORED, **sizes, run_peak_rss_bytes=28, runs=runs)
    runs = [made_up_run(tpot_ms=6.0, overhead_ms_per_step=None)] * 3
    theirs = EngineRuns("genai", 1.0, STORED, **sizes, run_peak_rss_bytes=60, runs=runs)
    rows = [make_row(Cell(c, 1), settings(new_tokens=3), e) for c in (8, 16) for e in (ours, theirs)]
    assert [row.tpot_ms for row in rows] == [3, 6, 3, 6]
    assert [row.overhead_ms_per_step for row in rows[:2]] == [1, None]
    ratios = make_ratios(rows)
    assert [entry["context"] for entry in ratios] == [8, 16]
    assert ratios[0]["tpot_ms"]["of_medians"] == 0.5
    assert ratios[0]["peak_rss_bytes"]["of_medians"] == 0.5
    assert [row.peak_growth_bytes for row in rows[:2]] == [8, 40]
    assert [row.held_growth_bytes for row in rows[:2]] == [4, None]
    assert [row.kv_bytes_per_token for row in rows[:2]] == [2, None]


@pytest.mark.parametrize(("asked", "as_asked"), [((None, None), True), (("u8", None), True), (("u8", "u4"), False)])
def test_rows_tell_types_that_nobody_asked_for(asked: tuple[str | None, str | None], as_asked: bool) -> None:
    engine = EngineRuns("genai", 1.0, STORED, runs=[made_up_run()])
    chosen = settings(key_precision=asked[0], value_precision=asked[1])
    assert make_row(Cell(8, 1), chosen, engine).is_as_asked == as_asked


def test_memory_that_nobody_tells_is_not_compared() -> None:
    engines = [EngineRuns(name, 1.0, STORED, runs=[made_up_run()]) for name in ("crush", "genai")]
    ratios = make_ratios([make_row(Cell(8, 1), settings(), engine) for engine in engines])
    assert ratios[0]["peak_rss_bytes"] is None
    assert ratios[0]["kv_bytes"]["of_medians"] == 1


class FakeHandle:
    """Gives `gives` tokens, one after each step from the step `begins` on."""

    def __init__(self, gives: int, begins: int) -> None:
        self.gives, self.begins, self.waiting = gives, begins, 0

    def can_read(self) -> bool:
        return self.waiting > 0

    def read(self) -> dict[int, Any]:
        tokens, self.waiting = [0] * self.waiting, 0
        return {0: type("Output", (), {"generated_ids": tokens})}


class FakeEngine:
    """Prompts end one after the other, as they do in chunks; a request may give fewer tokens than asked for."""

    def __init__(self, missing: int = 0, tells: bool = True) -> None:
        self.handles: list[FakeHandle] = []
        self.missing, self.tells, self.num_steps = missing, tells, 0

    def add(self, request_id: int, ids: np.ndarray, new_tokens: int) -> FakeHandle:
        self.handles.append(FakeHandle(new_tokens - self.missing, begins=len(self.handles) + 1))
        return self.handles[-1]

    def step(self) -> None:
        self.num_steps += 1
        for handle in self.handles:
            if handle.gives and self.num_steps >= handle.begins:
                handle.gives -= 1
                handle.waiting += 1

    def has_unfinished(self) -> bool:
        return any(handle.gives for handle in self.handles)

    def kv_bytes(self) -> int:
        return 10 * sum(handle.gives > 0 for handle in self.handles)

    def storage(self) -> Storage:
        return STORED

    def last_overhead_s(self) -> float | None:
        return self.num_steps * 1e-3

    def last_policy_s(self) -> float | None:
        return self.num_steps * 1e-9 if self.tells else None

    def kept_tokens(self, handle: FakeHandle) -> int | None:
        """Handles have fewer left with every step, so the number tells when it was asked for."""
        return handle.gives if self.tells else None


def test_overhead_counts_the_steps_in_which_all_requests_decode() -> None:
    result = run_once(FakeEngine(), np.zeros((2, 4), np.int64), new_tokens=4)
    assert result.num_steps == 5  # first tokens in steps 1 and 2; both decode in 3 and 4; the second alone in 5
    assert result.num_full_decode_steps == 2
    assert result.overhead_ms_per_step == pytest.approx(3.5)
    assert result.kv_bytes == 20
    # Before the first request ends, in step 3, they have 3 and 2 of their 4 tokens; the last one of each is not cached.
    assert result.kv_bytes_per_token == pytest.approx(20 / (4 + 3 - 1 + 4 + 2 - 1))


def test_policy_work_is_that_of_all_steps_and_kept_tokens_are_those_at_the_first_token() -> None:
    result = run_once(FakeEngine(), np.zeros((2, 4), np.int64), new_tokens=4)
    assert result.policy_ms == pytest.approx(1e3 * (1 + 2 + 3 + 4 + 5) * 1e-9)
    assert result.policy_share is not None
    assert 0 < result.policy_share < 1
    assert result.kept_tokens == 3
    silent = run_once(FakeEngine(tells=False), np.zeros((2, 4), np.int64), new_tokens=4)
    assert (silent.policy_ms, silent.policy_share, silent.kept_tokens) == (None, None, None)


def test_request_that_ends_early_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="request 0 must give 4 tokens, got 3"):
        run_once(FakeEngine(missing=1), np.zeros((1, 4), np.int64), new_tokens=4)


# -- bad input ---------------------------------------------------------------------------------------------------------

BAD_OPTIONS = {
    "unknown engine": (
        ("--against", "genei"),
        "--against must be one of genai, genai-policy, llama.cpp, got 'genei' (did you mean 'genai'?)",
    ),
    "unknown policy": (("--policy", "kvcrash"), "got 'kvcrash' (did you mean 'kvcrush'?)"),
    "recall of too little": (("--recall-tokens", "32"), "recall_tokens must be an integer of at least 64"),
    "recall of attention alone": (
        ("--recall-tokens", "64", "--attention"),
        "--recall-tokens must be left out with --attention",
    ),
    "budget of attention alone": (
        ("--budget", "1/8", "--attention"),
        "--budget must be left out with --attention",
    ),
    "weights of attention alone": (
        ("--weights", "plugin", "--attention"),
        "--weights must be left out with --attention",
    ),
    "unknown weights": (("--weights", "ours"), "--weights must be one of auto, packed, plugin, got 'ours'"),
    "scaling and context": (("--scaling", "64,128", "--context", "64"), "--context must be left out with --scaling"),
    "scaling of attention alone": (
        ("--scaling", "64,128", "--attention"),
        "--scaling must be left out with --attention",
    ),
    "scaling of traffic": (("--scaling", "64,128", "--traffic"), "--scaling must be left out with --traffic"),
    "scaling not a number": (("--scaling", "1k"), "--scaling must be whole numbers separated by commas, got '1k'"),
    "plot of one length": (("--scaling", "64", "--plot", "x.png"), "--plot must have two values of --context"),
    "budget without policy": (("--kept", "0.5"), "--kept must be left out without --policy"),
    "setting without policy": (("--policy-option", "a=1"), "--policy-option must be left out without --policy"),
    "two budgets": (
        ("--policy", "kvcrush", "--kept", "0.5", "--kept-tokens", "64"),
        "only one of kept and kept_tokens can be given, got 0.5 and 64",
    ),
    "budget of none": (
        ("--policy", "none", "--kept", "0.5"),
        "kept must be left out with policy 'none', which keeps everything, got 0.5",
    ),
    "unknown setting": (("--policy", "snapkv", "--policy-option", "windo=8"), "(did you mean 'window'?)"),
    "setting of the wrong type": (
        ("--policy", "snapkv", "--policy-option", "window=8.5"),
        "window must be an integer of at least 1, got 8.5",
    ),
    "policy of attention alone": (("--attention", "--policy", "tova"), "--policy must be left out with --attention"),
    "no policy to compare with": (
        ("--against", "genai-policy", "--policy", "none"),
        "--against genai-policy must come with a --policy that evicts, got none",
    ),
    "too few tokens for openvino_genai": (
        ("--against", "genai-policy", "--policy", "kvcrush", "--kept-tokens", "90"),
        "kept tokens must be at least 96 for openvino_genai's eviction, got 90",
    ),
    "no context": (("--context", "0"), "--context must be at least 1, got 0"),
    "negative context": (("--context", "64,-1"), "--context must be at least 1, got -1"),
    "context not a number": (("--context", "1k"), "--context must be whole numbers separated by commas, got '1k'"),
    "context too long": (
        ("--context", "8190"),
        "--context plus --new-tokens must be at most the model's context of 8192",
    ),
    "no batch": (("--batch", "0"), "--batch must be at least 1, got 0"),
    "batch above a step": (("--batch", "600"), "--batch must be at most --max-num-batched-tokens=512, got 600"),
    "one token": (("--new-tokens", "1"), "--new-tokens must be at least 2, got 1"),
    "no runs": (("--runs", "0"), "--runs must be at least 1, got 0"),
    "no warm-up": (("--warm-up", "0"), "--warm-up must be at least 1, got 0"),
    "no chunk": (("--max-num-batched-tokens", "-1"), "--max-num-batched-tokens must be at least 1, got -1"),
    "property without value": (("--property", "KV_CACHE_PRECISION"), "--property must be KEY=VALUE"),
    "property twice": (
        ("--property", "INFERENCE_PRECISION_HINT=f32", "--inference-precision", "bf16"),
        "property INFERENCE_PRECISION_HINT must be given once, got 'bf16' and 'f32'",
    ),
    "type and property": (
        ("--property", "KV_CACHE_PRECISION=u4", "--key-precision", "u8"),
        "--property KV_CACHE_PRECISION must be left out with --key-precision, got 'u4'",
    ),
    "unknown type": (("--kv-precision", "u99"), "--key-precision must be one of f32, bf16, f16, u8, u4, u2, got 'u99'"),
    "types twice": (("--kv-precision", "u8", "--value-precision", "u4"), "--kv-precision must be left out with"),
    "no store": (("--max-kv-mb", "0"), "--max-kv-mb must be at least 1, got 0"),
    "store too small": (
        ("--max-kv-mb", "2", "--context", "1024"),
        "prompt must fit into the KV store of 2097152 bytes",
    ),
    "threads of a whole model": (("--threads", "1"), "--threads must be left out without --attention"),
    "tokens of attention": (("--attention", "--new-tokens", "4"), "--new-tokens must be left out with --attention"),
    "pace of nothing": (("--max-step-ms", "50"), "--max-step-ms must be left out without --traffic"),
    "tokens of traffic": (("--traffic", "--new-tokens", "4"), "--new-tokens must be left out with --traffic"),
    "long traffic": (
        ("--traffic", "--context", "8190"),
        "--context plus --new-tokens must be at most the model's context",
    ),
    "no threads": (("--attention", "--threads", "0"), "--threads must be at least 1, got 0"),
    "too many threads": (("--attention", "--threads", "99999"), "--threads must be at most the"),
    "too many layers": (("--attention", "--layers", "7"), "--layers must be at most the model's 6, got 7"),
    "threads twice": (("--attention", "--property", "INFERENCE_NUM_THREADS=1"), "use --threads"),
    "more than there is": (("--attention", "--context", "2000000000"), "--context and --batch must fit into"),
    "from alone": (("--from", "x.json"), "--from must come with --plot"),
    "plot of one cell": (("--plot", "x.png"), "--plot must have two values of --context, --batch or --threads"),
    "plot of no picture": (("--plot", "x.txt"), "--plot must be a file that ends in .png, .svg, .pdf, got 'x.txt'"),
    "plot into nowhere": (("--plot", "/nowhere/x.png"), "--plot must be a file that can be written"),
    "json into nowhere": (("--json", "/nowhere/out.json"), "--json must be a file that can be written"),
    "json onto a folder": (("--json", "."), "--json must be a file to write, got the folder"),
    "property value": (("--property", "KV_CACHE_PRECISION=u99", "--context", "8"), "got 'u99'"),
    "property": (("--property", "NO_SUCH_THING=1", "--context", "8"), "NO_SUCH_THING"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_option_is_one_clear_line(case: str, shallow: Path) -> None:
    options, message = BAD_OPTIONS[case]
    done = bench(shallow, *options)
    assert done.exit_code == 2, done.output
    errors = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_missing_model_is_named(tmp_path: Path) -> None:
    done = bench(tmp_path / "nothing")
    assert done.exit_code == 2
    assert str(tmp_path / "nothing") in done.output


def test_numbers_and_properties_are_read_as_written() -> None:
    assert parse_numbers("batch", "8, 1,8") == (8, 1)
    assert parse_properties(["A=1", "B = x=y"], C="u8", D=None) == {"A": 1, "B": "x=y", "C": "u8"}


# -- files -------------------------------------------------------------------------------------------------------------


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_json(path, {"rows": []})
    with pytest.raises(TypeError):
        write_json(path, {"rows": [object()]})
    assert json.loads(path.read_text()) == {"rows": []}
    assert os.listdir(tmp_path) == ["out.json"]


def test_check_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "out.json")
    assert os.listdir(tmp_path) == []


def test_environment_is_json() -> None:
    environment = describe_environment()
    assert json.loads(json.dumps(environment)) == environment
    assert environment["threads"] >= 1


def test_the_job_says_what_is_recalled(shallow: Path) -> None:
    chosen = BenchSettings.for_model(shallow, recall_tokens="512")
    cache, _ = engines._cache_of(chosen.worker_job("crush", Cell(8, 1)))
    assert cache.recall_tokens == 512


def test_prompt_lookup_is_asked_of_each_engine(shallow: Path) -> None:
    chosen = BenchSettings.for_model(shallow, prompt_lookup=True, against="genai")
    for name in chosen.engines:
        assert engines._properties_of(chosen.worker_job(name, Cell(8, 1)))["prompt_lookup"] is True
    assert engines._properties_of(BenchSettings.for_model(shallow).worker_job("crush", Cell(8, 1))) == {}


def test_types_need_the_native_library(monkeypatch: pytest.MonkeyPatch, shallow: Path) -> None:
    monkeypatch.setattr(native, "why_unavailable", lambda: "nobody built it")
    chosen = BenchSettings.for_model(shallow)
    cache, storage = engines._cache_of(chosen.worker_job("crush", Cell(8, 1)))
    assert (cache.attention, storage) == ("paged", Storage("PagedAttention", "u8", "u8"))
    for changes in ({"key_precision": "u4"}, {"value_precision": "u4"}, {"max_kv_mb": 64}, {"policy": build("tova")}):
        with pytest.raises(CrushError, match=r"left out without the native library, got .*: nobody built it"):
            engines.make_engine(replace(chosen, **changes).worker_job("crush", Cell(8, 1)))


# -- processes ---------------------------------------------------------------------------------------------------------


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")


@pytest.fixture
def job(tiny_ir: Callable[[str], Path]) -> dict[str, object]:
    return BenchSettings.for_model(tiny_ir("llama")).worker_job("crush", Cell(64, 1))


def is_running(pid: int) -> bool:
    """Whether the process exists and is more than an entry that its parent has not collected yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_warm_up_reads_the_beginning_of_the_prompts(job: dict[str, object]) -> None:
    lines: SimpleQueue[str] = SimpleQueue()
    for line in (job, {"new_tokens": 2, "prompt_tokens": 16}, {"new_tokens": 2, "prompt_tokens": None}):
        lines.put(json.dumps(line))
    replies = _replies(lines)
    next(replies)
    assert [next(replies)["run"]["kept_tokens"] for _ in range(2)] == [16, 64]


def test_death_of_a_worker_is_an_error_and_no_hang(job: dict[str, object]) -> None:
    with worker("crush") as process:
        process.ask(job)
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="worker of engine crush died, killed by SIGKILL"):
            process.ask({"new_tokens": 4})


def test_last_words_of_a_worker_are_told() -> None:
    with worker("crush") as process, pytest.raises(WorkerError, match=r"engine crush failed: KeyError: 'engine'"):
        process.ask({})


def test_refusal_of_an_engine_is_bad_input(job: dict[str, object]) -> None:
    with worker("genai") as process, pytest.raises(CrushError, match="one that the CPU takes, got: Wrong value u99"):
        process.ask({**job, "engine": "genai", "properties": {"KV_CACHE_PRECISION": "u99"}})


@needs_proc
def test_forked_child_of_a_library_neither_blocks_nor_holds_the_pipes() -> None:
    """Libraries fork with multiprocessing, whose children close sys.stdin: as OpenVINO's telemetry does."""
    code = """
import multiprocessing, sys, threading, time
from queue import SimpleQueue
from ov_kvcrush.bench import worker
questions, answers = worker._take_pipes()
threading.Thread(target=worker._read_lines, args=(questions, SimpleQueue()), daemon=True).start()
time.sleep(0.3)
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
child.start()
quick = multiprocessing.get_context("fork").Process(target=int)
quick.start()
quick.join(20)
print(child.pid, quick.exitcode, file=answers, flush=True)
time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        child, exitcode = process.stdout.readline().split()
        try:
            assert exitcode == "0"
            process.kill()
            assert process.stdout.readline() == ""  # the end, while the forked child still runs
            assert is_running(int(child))
        finally:
            os.kill(int(child), signal.SIGKILL)


@needs_proc
def test_worker_is_gone_after_the_block(job: dict[str, object]) -> None:
    pids = []

    def interrupted() -> None:
        with worker("crush") as process:
            process.ask(job)
            pids.append(process.pid)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not is_running(pids[0])


@pytest.fixture
def running_bench(tiny_ir: Callable[[str], Path], tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A bench that would take very long, in the middle of its first runs."""
    code = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from ov_kvcrush.bench.cli import main; main()"
    options = [str(tiny_ir("llama")), "--context", "64", "--runs", "100000", "--json", str(tmp_path / "out.json")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(sys.path), *options], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "run 2 of" in line:
            break
    yield process
    process.kill()
    process.wait()
    process.stderr.close()


@needs_proc
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_bench(
    end: signal.Signals, running_bench: subprocess.Popen[str], tmp_path: Path
) -> None:
    children = Path(f"/proc/{running_bench.pid}/task/{running_bench.pid}/children").read_text().split()
    assert children
    running_bench.send_signal(end)
    code = running_bench.wait(300)
    assert code == (130 if end == signal.SIGINT else -end)
    for _ in range(300):
        if not any(is_running(int(pid)) for pid in children):
            break
        time.sleep(0.1)
    assert not any(is_running(int(pid)) for pid in children)
    assert os.listdir(tmp_path) == []


def test_traffic_tells_what_others_wait(shallow: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    shape = ("--traffic", "--context", 200, "--batch", "2", "--runs", 1, "--max-step-ms", 50)
    done = bench(shallow, *shape, "--against", "genai", "--json", path)
    assert done.exit_code == 0, done.output
    ours, theirs = json.loads(path.read_text())["traffic"]
    assert [(row["engine"], row["context"], row["batch"]) for row in (ours, theirs)] == [
        ("crush", 200, 2),
        ("genai", 200, 2),
    ]
    assert (ours["max_step_ms"], theirs["max_step_ms"]) == (50, None)
    for row in (ours, theirs):
        assert 0 < row["gap_p50"] <= row["gap_p95"] <= row["gap_p99"] <= row["gap_max"]
        assert min(row["alone"], row["behind"], row["long"]) > 0
        (run,) = row["runs"]
        assert len(run["gaps"]) >= 2
