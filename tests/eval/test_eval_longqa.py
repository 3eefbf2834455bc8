"""Many questions about long texts: files to items, and runs whose every figure is what it would be alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_runs import config, stop_at
from long_texts import TASKS, text, write_lines, write_task, write_tasks
from native_stores import require_native
from typer.testing import CliRunner

from ov_kvcrush.config import CacheConfig
from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.benchmarks.fidelity import load_fidelity
from ov_kvcrush.eval.benchmarks.items import Item, Task, score
from ov_kvcrush.eval.benchmarks.longqa import load_longqa
from ov_kvcrush.eval.calibrate.meter import CacheMeter, CacheVariant
from ov_kvcrush.eval.calibrate.prompts import QUESTION
from ov_kvcrush.eval.cli.app import app
from ov_kvcrush.eval.likelihood.stored_rows import Following
from ov_kvcrush.eval.records import Prediction
from ov_kvcrush.eval.runs import context_rows, crush
from ov_kvcrush.eval.runs.crush import likeliest
from ov_kvcrush.eval.runs.plan import Planned, PlanOptions, make_plan
from ov_kvcrush.eval.runs.prompts import ItemEncoder, ItemPrompts, encode_items
from ov_kvcrush.eval.runs.run_folder import RunFolder
from ov_kvcrush.eval.runs.runner import run_suite
from ov_kvcrush.eval.statistics import ResultRow, result_rows
from ov_kvcrush.model.plugin import open_core
from ov_kvcrush.pipelines.llm import LLMPipeline
from ov_kvcrush.pipelines.loading import load_tokenizer
from ov_kvcrush.policies.registry import build

# Requests that run together give the tokens that each gives alone.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
F32 = (("f32", "f32"),)
ROW_FIELDS = {
    "suite", "task", "engine", "policy", "budget", "kept", "query", "n", "contexts", "score", "full_score",
    "difference", "low", "high", "kl_mean", "kl_median", "top1", "kept_tokens", "bytes_per_prompt_token",
}  # fmt: skip


# -- the files ---------------------------------------------------------------------------------------------------------


def test_items_are_contexts_with_their_questions(tmp_path: Path) -> None:
    items, tasks = load_longqa(write_tasks(tmp_path))
    assert [(item.task, item.id, len(item.questions)) for item in items] == [
        (task, f"c{i}", len(TASKS[task][1])) for task in TASKS for i in range(2)
    ]
    assert set(tasks) == set(TASKS)
    for item in items:
        assert text(int(item.id[1:]) + 2) in item.context
        assert item.chat == (item.task != "labels")
        for question, given in zip(item.questions, TASKS[item.task][1], strict=True):
            assert given["question"] in question.text
            assert question.forced == tuple(given.get("choices", ()))


def test_parts_of_the_data_are_its_first_contexts_and_questions_from_all_over(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "facts", "facts", 3)
    items, _ = load_longqa(folder, contexts=2, questions=2)
    assert [item.id for item in items] == ["c0", "c1"]
    whole = load_longqa(folder)[0][0].questions
    assert items[0].questions == (whole[0], whole[1])
    assert load_longqa(write_tasks(tmp_path), ("picks",))[0][0].task == "picks"
    many = [{"id": str(i), "context_id": "c0", "question": str(i), "answers": ["x"], "metric": "f1"} for i in range(10)]
    write_lines(folder / "items.jsonl", many)
    (item,) = load_longqa(folder, questions=5)[0]
    assert [question.text.split("Question: ")[1].split("\n")[0] for question in item.questions] == list("02468")


@pytest.mark.parametrize(
    ("task", "place", "said", "points"),
    [
        ("facts", 0, "The Miller.", 1.0),
        ("facts", 0, "the old miller", 2 / 3),
        ("facts", 1, "Leith", 0.0),
        ("labels", 0, " Lost card\nquery: another", 1.0),
        ("labels", 0, " lost card payment", 0.0),
        ("picks", 0, "Blue.", 1.0),
        ("picks", 0, "Red as a rose.", 0.0),
        ("picks", 1, "Anna", 1.0),
    ],
)
def test_answers_are_scored_by_their_kind(tmp_path: Path, task: str, place: int, said: str, points: float) -> None:
    (item, *_), tasks = load_longqa(write_task(tmp_path / task, task))
    assert score(tasks[task], said, item.questions[place]) == pytest.approx(points)


def test_summaries_are_scored_by_rouge(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "facts", "facts", 1)
    row = {"id": "1", "context_id": "c0", "question": "What was said?", "answers": ["we sold it"], "metric": "rouge_l"}
    write_lines(folder / "items.jsonl", [row])
    (item,), tasks = load_longqa(folder)
    assert score(tasks["facts"], "we sold it", item.questions[0]) == pytest.approx(1)
    assert 0 < score(tasks["facts"], "they sold it", item.questions[0]) < 1


GOOD = {"id": "1", "context_id": "c0", "question": "Who?", "answers": ["x"], "metric": "f1"}
BAD_ITEMS: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "line must be a JSON object"),
    "no question": ({k: v for k, v in GOOD.items() if k != "question"}, "question must be a non-empty text, got no"),
    "no answer": ({**GOOD, "answers": []}, "answers must be a list with at least one text"),
    "another context": ({**GOOD, "context_id": "c9"}, "context_id must be one of contexts.jsonl, got 'c9'"),
    "another metric": ({**GOOD, "metric": "rouge_l"}, "metric must be 'f1' as in the lines before, got 'rouge_l'"),
    "twice": ({**GOOD, "id": "0"}, "id must be of one line only, got '0' again"),
}
BAD_CHOICES: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({}, "choices must be a list with at least one text, got no such field"),
    "one": ({"choices": ["x"], "answers": ["A"]}, "choices must be at least two, all different"),
    "the same": ({"choices": ["x", "x"], "answers": ["A"]}, "choices must be at least two, all different"),
    "no such letter": ({"choices": ["x", "y"], "answers": ["C"]}, "answers must be among A, B, got C"),
}


@pytest.mark.parametrize("case", BAD_ITEMS)
def test_a_bad_line_is_named(tmp_path: Path, case: str) -> None:
    line, message = BAD_ITEMS[case]
    folder = write_task(tmp_path / "facts", "facts")
    file = write_lines(folder / "items.jsonl", [{**GOOD, "id": "0"}, "", line])
    for load in (load_longqa, load_fidelity):
        with pytest.raises(CrushError) as error:
            load(folder)
        assert str(error.value).startswith(f"{file}:3: {message}")


@pytest.mark.parametrize("case", BAD_CHOICES)
def test_bad_choices_are_named(tmp_path: Path, case: str) -> None:
    changes, message = BAD_CHOICES[case]
    folder = write_task(tmp_path / "picks", "picks")
    file = write_lines(folder / "items.jsonl", [{**GOOD, "metric": "mc_acc", **changes}])
    with pytest.raises(CrushError) as error:
        load_longqa(folder)
    assert str(error.value).startswith(f"{file}:1: {message}")


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CrushError, match=r"--data must be a folder with contexts\.jsonl and items\.jsonl, or"):
        load_longqa(tmp_path)
    with pytest.raises(CrushError, match="--data must be a jsonl file, a text, or a folder"):
        load_fidelity(tmp_path)
    write_tasks(tmp_path)
    with pytest.raises(CrushError, match=r"task must be one of .*did you mean 'facts'"):
        load_longqa(tmp_path, ("fact",))
    write_lines(tmp_path / "facts" / "contexts.jsonl", [{"context_id": "c0", "context": "x"}] * 2)
    with pytest.raises(CrushError, match=r"contexts\.jsonl:2: context_id must be of one line only, got 'c0' again"):
        load_longqa(tmp_path)
    write_lines(tmp_path / "facts" / "items.jsonl", [])
    write_lines(tmp_path / "facts" / "contexts.jsonl", [{"context_id": "c0", "context": "x"}])
    with pytest.raises(CrushError, match=r"items\.jsonl must have at least one line, got none"):
        load_longqa(tmp_path)


def test_fidelity_takes_folders_files_and_texts(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    prompt = "Text: it rains.\nQuestion: Does it?\nType:"
    row = {"_id": "t0", "dataset": "trec", "prompt": prompt, "answers": ["yes"], "all_classes": ["yes", "no"]}
    file = write_lines(tmp_path / "any.jsonl", [row])
    (tmp_path / "b.md").write_text("A text.\n", "utf-8")
    (tmp_path / "a.txt").write_text("Another.", "utf-8")
    items, tasks = load_fidelity(tmp_path)
    assert list(tasks) == [*sorted(TASKS), "any", "texts"]
    assert all(task.is_compared for task in tasks.values())
    forced = {(item.task, item.id): [q.forced for q in item.questions] for item in items}
    assert forced["picks", "c0"] == [("Blue.",)]
    assert forced["any", "t0"] == [("yes",)]
    assert forced["texts", "b.md"] == [()]
    assert next(item for item in items if item.id == "a.txt").questions[0].text == QUESTION
    assert [item.task for item in load_fidelity(file)[0]] == ["any"]
    assert [item.id for item in load_fidelity(tmp_path / "b.md")[0]] == ["b.md"]
    assert len(load_fidelity(tmp_path / "facts", limit=1, questions=2)[0][0].questions) == 2
    bad = write_lines(tmp_path / "bad.jsonl", [{**row, "dataset": "trek"}])
    with pytest.raises(CrushError, match=r"bad\.jsonl:1: dataset must be one of"):
        load_fidelity(bad)
    (tmp_path / "a.txt").write_text(" \n", "utf-8")
    with pytest.raises(CrushError, match=r"text file must hold text, got .*a\.txt"):
        load_fidelity(tmp_path, ("texts",))


# -- the runs ----------------------------------------------------------------------------------------------------------

Load = Callable[..., tuple[list[Item], dict[str, Task]]]
Run = Callable[..., tuple[tuple[Prediction, ...], tuple[ResultRow, ...]]]
PLAN = PlanOptions(
    policies=("snapkv:window=16", "random"), kept=(1.0, 0.3), precisions=F32, queries=("agnostic",), baselines=False
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tiny_ir: Callable[[str], Path]) -> Path:
    require_native()
    return tiny_ir("llama")


@pytest.fixture(scope="module")
def run(model: Path, data: Path) -> Run:
    def made(path: Path, load: Load, options: PlanOptions = PLAN, stop: int | None = None) -> Any:
        items, tasks = load(data)
        plan, prompts = make_plan(options), encoded(model, items)
        suite = load.__name__.removeprefix("load_")
        with RunFolder(path, config([p.setting for p in plan], suite=suite, num_items=len(items))) as folder:
            stop_at(folder, stop)
            done = run_suite(folder, prompts, tasks, plan, model, EXACT)
            return done.predictions, done.rows

    return made


@pytest.fixture(scope="module")
def asked(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[Prediction, ...], tuple[ResultRow, ...]]:
    return run(tmp_path_factory.mktemp("runs") / "longqa", load_longqa)


@pytest.fixture(scope="module")
def compared(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Prediction, ...]:
    return run(tmp_path_factory.mktemp("runs") / "fidelity", load_fidelity)[0]


def encoded(model: Path, items: list[Item]) -> list[ItemPrompts]:
    return encode_items(items, ItemEncoder(load_tokenizer(model, {})), 4096)


def by_place(predictions: tuple[Prediction, ...], planned: Planned) -> dict[tuple[str, str, int], Prediction]:
    key = planned.setting.key
    return {(p.task, p.item_id, p.question_index): p for p in predictions if p.setting_key == key}


def assert_alike(one: tuple[Prediction, ...], other: tuple[Prediction, ...]) -> None:
    """The same answers; what is measured up to rounding."""
    measured = ("kl", "top1", "loss")
    for a, b in zip(sorted(one, key=lambda p: p.key), sorted(other, key=lambda p: p.key), strict=True):
        for name in measured:
            assert getattr(a, name) == pytest.approx(getattr(b, name), abs=1e-4)
        rest = {name: None for name in measured} | {"seconds": 0.0}
        a, b = (replace(p, **rest, score=round(p.score, 4)) for p in (a, b))
        assert a == b


def test_a_cache_that_keeps_all_is_the_full_one(
    asked: tuple[tuple[Prediction, ...], tuple[ResultRow, ...]], compared: tuple[Prediction, ...]
) -> None:
    full, whole, evicted, *_ = make_plan(PLAN)
    assert (whole.setting.kept, evicted.setting.kept) == (1.0, 0.3)
    for made in (asked[0], compared):
        of_full, of_whole, of_evicted = (by_place(made, planned) for planned in (full, whole, evicted))
        for place, one in of_whole.items():
            assert one.kl == pytest.approx(0, abs=1e-5)
            assert one.top1 == 1
            assert one.text == of_full[place].text or made is compared
            assert one.loss == pytest.approx(of_full[place].loss, abs=1e-4)
        assert all(p.kl > 1e-4 for p in of_evicted.values())
        assert np.mean([p.top1 for p in of_evicted.values()]) < 1
    for row in asked[1]:
        if row.kept == 1.0:
            assert (row.difference, row.low, row.high, row.top1) == (0, 0, 0, 1)
        assert row.kl_mean is not None
        assert (row.kl_mean < 1e-5) == (row.kept == 1.0)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    run: Run, asked: tuple[tuple[Prediction, ...], tuple[ResultRow, ...]], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, load_longqa, stop=18)  # within the answers to a context's questions
    again, rows = run(tmp_path, load_longqa)
    assert [replace(p, seconds=0.0) for p in again] == [replace(p, seconds=0.0) for p in asked[0]]
    assert rows == asked[1]


def test_what_runs_together_is_what_runs_alone(
    run: Run, asked: tuple[tuple[Prediction, ...], tuple[ResultRow, ...]], compared: tuple[Prediction, ...],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(context_rows, "ROWS_AT_ONCE", 1)
    monkeypatch.setattr(crush, "BATCH", 1)
    assert_alike(run(tmp_path / "longqa", load_longqa)[0], asked[0])
    assert_alike(run(tmp_path / "fidelity", load_fidelity)[0], compared)


@pytest.mark.parametrize("query", ["agnostic", "aware"])
def test_a_prompt_is_read_once_for_all_settings(
    run: Run, tmp_path: Path, query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []
    compress = LLMPipeline.compress_ids

    def counted(self: Any, ids: np.ndarray, policies: Any, **more: Any) -> Any:
        read.append((len(ids), len(policies)))
        return compress(self, ids, policies, **more)

    monkeypatch.setattr(LLMPipeline, "compress_ids", counted)
    options = replace(PLAN, queries=(query,), budgets=(1 / 4,))
    predictions, _ = run(tmp_path, load_longqa, options)
    num_settings = len(make_plan(options))
    contexts = {(p.task, p.item_id) for p in predictions}
    assert len(read) == (len(contexts) if query == "agnostic" else len(predictions) // num_settings)
    assert {count for _, count in read} == {num_settings}


@pytest.fixture(scope="module")
def meter(model: Path) -> CacheMeter:
    return CacheMeter(model, EXACT, CacheConfig(key_precision="f32", value_precision="f32"))


def test_rows_one_by_one_are_those_at_once(meter: CacheMeter) -> None:
    """Sequences of different lengths, of which different rows are wanted."""
    rng, store = np.random.default_rng(0), meter.cache.store
    tails = [(rng.integers(3, 100, length), skip) for length, skip in ((9, 3), (4, 3), (6, 0))]
    with meter.read(rng.integers(3, 100, 200), 4, build("snapkv"), set()) as read:
        made = read._commit(CacheVariant(meter.uniform("f32", "f32")))
        found = []
        for one_by_one in (False, True):
            forks = [store.fork(made) for _ in tails]
            following = [Following(fork, tail[0], 200, tail[1]) for fork, tail in zip(forks, tails, strict=True)]
            logits = meter._rows.logits(store, following, one_by_one=one_by_one)
            found.append([rows.copy() for rows in logits])
            for fork in forks:
                store.release(fork)
        store.release(made)
    for (ids, skip), at_once, alone in zip(tails, *found, strict=True):
        assert at_once.shape[0] == len(ids) - skip
        np.testing.assert_allclose(alone, at_once, atol=1e-4)


def test_divergences_are_those_of_the_meter(
    meter: CacheMeter, model: Path, data: Path, compared: tuple[Prediction, ...]
) -> None:
    """Which reads a prompt by other code, and has its own full answer."""
    items, _ = load_fidelity(data, ("facts",))
    planned = next(p for p in make_plan(PLAN) if (p.setting.policy, p.setting.kept) == ("snapkv", 0.3))
    found, ends = by_place(compared, planned), LLMPipeline(model, "CPU").get_generation_config()
    for prompts in encoded(model, items):
        (question,) = prompts.asked
        with meter.read(
            prompts.ids, 32, planned.policy, {ends.eos_token_id}, suffix=question.ids, head=prompts.head
        ) as read:
            (one,) = read.measure([CacheVariant(meter.uniform("f32", "f32"), read.select(planned.policy))])
        prediction = found["facts", prompts.item.id, 0]
        assert prediction.kl == prediction.score == pytest.approx(one.kl, rel=1e-3)
        assert (prediction.top1, prediction.bytes) == (one.same_top, one.nbytes)


def test_losses_and_choices_are_what_the_whole_text_says(
    model: Path, data: Path, asked: tuple[tuple[Prediction, ...], tuple[ResultRow, ...]],
    compared: tuple[Prediction, ...],
) -> None:  # fmt: skip
    """By OpenVINO's own attention, over prompt and answer in one inference."""
    compiled = open_core().compile_model(model / "openvino_model.xml", "CPU", EXACT)

    def logprob(before: np.ndarray, answer: np.ndarray) -> float:
        ids = np.concatenate([before, answer])
        inputs = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64)}
        inputs |= {"position_ids": np.arange(len(ids))[None], "beam_idx": np.zeros(1, np.int32)}
        logits = compiled.create_infer_request().infer(inputs)["logits"][0].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return float(logits[len(before) - 1 : -1][np.arange(len(answer)), answer].sum())

    full = make_plan(PLAN)[0]
    chosen, losses = by_place(asked[0], full), by_place(compared, full)
    for prompts in encoded(model, load_longqa(data, ("picks",))[0]):
        for one in prompts.asked:
            before = np.concatenate([prompts.ids, one.ids])
            said = likeliest(one.question.forced, [logprob(before, ids) for ids in one.forced])
            assert chosen["picks", prompts.item.id, one.index].text == said
    for prompts in encoded(model, load_fidelity(data, ("facts", "labels"))[0]):
        (one,) = prompts.asked
        (reference,) = one.forced
        loss = -logprob(np.concatenate([prompts.ids, one.ids]), reference) / len(reference)
        assert losses[prompts.item.task, prompts.item.id, 0].loss == pytest.approx(loss, abs=1e-3)


def test_the_likeliest_choice_is_so_by_its_bytes() -> None:
    assert likeliest(("abcd", "a"), (-2.0, -1.0)) == "abcd"
    assert likeliest(("abcd", "a"), (-5.0, -1.0)) == "a"
    assert likeliest(("a", "b"), (-1.0, -1.0)) == "a"


def test_each_question_counts_as_much_and_intervals_draw_contexts() -> None:
    (full, evicted, *_) = [p.setting for p in make_plan(PLAN)]

    def answer(item: str, question: int, setting: Any, points: float, kl: float | None) -> Prediction:
        return Prediction(item, "qa", question, 0, setting.key, "", points, 10.0, 100, 500, 0.0, kl, kl and 0.5)

    sizes = {"a": 9, "b": 1}
    made = [
        answer(item, i, setting, points, kl)
        for item, count in sizes.items()
        for i in range(count)
        for setting, points, kl in ((full, 1.0, 0.0), (evicted, 1.0 if item == "a" else 0.0, i / 10))
    ]
    row = result_rows(made, [full, evicted], "longqa")[1]
    assert (row.n, row.contexts, row.score, row.difference) == (10, 2, 0.9, pytest.approx(-0.1))
    assert (row.low, row.high) == (-1.0, 0.0)  # a draw of the same context twice
    assert row.kl_mean == pytest.approx(np.mean([*np.arange(9) / 10, 0]))
    assert row.kl_median == pytest.approx(0.35)
    other = result_rows(made, [full, evicted], "ruler")[1]
    assert (other.n, other.contexts, other.score) == (2, 2, 0.5)
    unmeasured = [replace(made[0], kl=None, top1=None), *made[1:]]
    assert result_rows(unmeasured, [full, evicted], "longqa")[0].kl_mean is None


# -- the commands ------------------------------------------------------------------------------------------------------


def test_commands_write_rows(model: Path, data: Path, tmp_path: Path) -> None:
    shared = ["--policy", "snapkv", "--kept", "0.5", "--budget", "1/3", "--no-floors", "--limit", "1"]
    files = {}
    for suite, more in (("longqa", ["--tasks", "facts,picks", "--questions", "2", "--query", "agnostic"]),
                        ("fidelity", ["--task", "facts"])):  # fmt: skip
        file = tmp_path / f"{suite}.json"
        line = [suite, str(model), "--data", str(data), "--length", "2000", *shared, *more, "--json", str(file)]
        done = CliRunner().invoke(app, line)
        assert done.exit_code == 0, done.output
        assert (tmp_path / f"{suite}.json.run" / "metrics.json").exists()
        files[suite] = json.loads(file.read_text())
    rows = files["longqa"]["rows"]
    assert {(row["task"], row["n"], row["contexts"]) for row in rows} == {
        ("facts", 2, 1), ("picks", 2, 1), ("average", 4, 2),
    }  # fmt: skip
    assert [row["budget"] for row in rows[:3]] == [None, None, "1/3"]
    of_fidelity = files["fidelity"]["rows"]
    assert [(row["policy"], row["precisions"]) for row in of_fidelity[:2]] == [("none", "f32/f32"), ("none", "u8/u8")]
    for row in (*rows, *of_fidelity):
        assert ROW_FIELDS | {"precisions", "settings"} <= set(row)
        assert row["kl_mean"] is not None
    for row in of_fidelity:
        assert row["kl_low"] <= row["score"] == row["kl_mean"] <= row["kl_high"]
        assert math.isclose(row["loss"] - row["full_loss"], row["loss_difference"], abs_tol=1e-9)


def test_comparisons_are_of_our_engine(data: Path, model: Path, tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["fidelity", str(model), "--data", str(data), "--engine", "crush,genai"])
    assert told.exit_code == 2
    assert "--engine must be crush to compare caches" in told.output.replace("\n", " ")
