"""Runs of suites: they resume, repeat, and answer as the pipeline does when it is asked by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from eval_runs import config, stop_at
from typer.testing import CliRunner

from ov_kvcrush import LLMPipeline
from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.benchmarks.items import Item, Question, Task
from ov_kvcrush.eval.benchmarks.metrics import string_match_all
from ov_kvcrush.eval.benchmarks.suites import SUITES, SuiteOptions, load_suite
from ov_kvcrush.eval.cli.app import app
from ov_kvcrush.eval.records import Prediction
from ov_kvcrush.eval.runs.genai import GenaiRuns
from ov_kvcrush.eval.runs.plan import Planned, PlanOptions, make_plan, pairs
from ov_kvcrush.eval.runs.prompts import ItemEncoder, ItemPrompts, encode_items
from ov_kvcrush.eval.runs.run_folder import RunFolder, read_run
from ov_kvcrush.eval.runs.runner import run_suite
from ov_kvcrush.pipelines.loading import load_tokenizer

# Requests that run together give the tokens that each gives alone.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
TASK = Task("log", string_match_all)
NEW_TOKENS = 6
POLICIES = ("kvzip", "snapkv:window=16")
KEPT = 0.5


def log(seed: int) -> str:
    return "\n".join(f"On day {i} the {'ship' if i % 3 else 'crew'} saw {seed * i % 11} whales." for i in range(1, 20))


def item(seed: int, **changes: object) -> Item:
    questions = tuple(
        Question(f"How many whales on day {day}?", (str(seed * day % 11),), NEW_TOKENS, " There were")
        for day in (3, 17)
    )
    return replace(Item(f"log-{seed}", TASK.name, log(seed), questions), **changes)


ITEMS = (item(7), item(5, chat=False), item(4, multi_turn=True))


@pytest.fixture(scope="module")
def prompts(shallow: Path) -> list[ItemPrompts]:
    return encode_items(ITEMS, ItemEncoder(load_tokenizer(shallow, {})), 8192)


@pytest.fixture(scope="module")
def plan() -> list[Planned]:
    return make_plan(PlanOptions(policies=POLICIES, kept=(KEPT,), queries=("aware", "agnostic"), baselines=False))


Answer = Callable[..., tuple[Prediction, ...]]


@pytest.fixture(scope="module")
def answer(shallow: Path, prompts: list[ItemPrompts], plan: list[Planned]) -> Answer:
    def run(path: Path, stop: int | None = None) -> tuple[Prediction, ...]:
        settings = [planned.setting for planned in plan]
        with RunFolder(path, config(settings, num_items=len(prompts))) as folder:
            stop_at(folder, stop)
            return run_suite(folder, prompts, {TASK.name: TASK}, plan, shallow, EXACT).predictions

    return run


@pytest.fixture(scope="module")
def whole(answer: Answer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Prediction, ...]:
    return answer(tmp_path_factory.mktemp("runs") / "whole")


def timeless(predictions: tuple[Prediction, ...]) -> list[Prediction]:
    return [replace(prediction, seconds=0.0) for prediction in predictions]


def test_stopped_run_ends_as_one_that_was_not_and_both_repeat(
    answer: Answer, whole: tuple[Prediction, ...], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        answer(tmp_path, 21)  # within the answers to an item's questions
    assert timeless(answer(tmp_path)) == timeless(whole)
    assert timeless(read_run(tmp_path).predictions) == timeless(whole)


def test_every_question_is_answered_under_every_setting(whole: tuple[Prediction, ...], plan: list[Planned]) -> None:
    assert len(plan) == 2 * (1 + len(POLICIES))
    asked = {(p.item_id, p.question_index, p.setting_key) for p in whole}
    assert len(asked) == len(whole) == sum(len(i.questions) for i in ITEMS) * len(plan)
    turns = {(p.item_id, p.question_index, p.turn) for p in whole}
    assert turns == {(i.id, n, n if i.multi_turn else 0) for i in ITEMS for n in range(len(i.questions))}


def test_answers_and_costs_are_those_of_the_pipeline_asked_by_hand(
    whole: tuple[Prediction, ...], plan: list[Planned], prompts: list[ItemPrompts], shallow: Path
) -> None:
    """Contexts are those of compress(); generate() on them, and on the full prompt's ids, says the same."""
    pipe = LLMPipeline(shallow, "CPU", **EXACT)
    first = prompts[0]
    found = {(p.setting_key, p.question_index): p for p in whole if p.item_id == first.item.id}
    tail = pipe.get_tokenizer().encode(first.item.questions[0].answer_prefix, add_special_tokens=False).input_ids.data
    for planned in plan:
        if planned.setting.query == "agnostic":
            context = pipe.compress(first.item.context, policy=planned.policy)
            assert np.array_equal(context.ids, first.ids)
            for asked in first.asked:
                made = found[planned.setting.key, asked.index]
                assert np.array_equal(asked.ids[-tail.shape[1] :], tail[0])
                ids = ov.Tensor(asked.ids[None])
                said = pipe.generate(ids, context=context, max_new_tokens=NEW_TOKENS, do_sample=False).tokens[0]
                assert pipe.get_tokenizer().decode(said) == made.text
                assert (context.kept_tokens, context.nbytes) == (made.kept_tokens, made.bytes)
                assert made.prompt_tokens == len(first.ids) + len(asked.ids)
    full = next(p.setting for p in plan if p.setting.policy == "none" and p.setting.query == "aware")
    for one in prompts[:2]:
        for asked in one.asked:
            ids = ov.Tensor(np.concatenate([one.ids, asked.ids])[None])
            said = pipe.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False).tokens[0]
            (made,) = (
                p for p in whole
                if (p.item_id, p.question_index, p.setting_key) == (one.item.id, asked.index, full.key)
            )  # fmt: skip
            assert pipe.get_tokenizer().decode(said) == made.text


def test_policies_keep_what_was_asked_of_what_they_saw(
    whole: tuple[Prediction, ...], plan: list[Planned], prompts: list[ItemPrompts]
) -> None:
    settings = {planned.setting.key: planned for planned in plan}
    by_id = {one.item.id: one for one in prompts}
    for made in whole:
        setting, one = settings[made.setting_key].setting, by_id[made.item_id]
        seen = made.prompt_tokens - 1 if setting.query == "aware" else len(one.ids)
        budget = settings[made.setting_key].policy.budget.tokens(seen)
        assert made.kept_tokens == budget
        assert (made.kept_tokens < seen) == (setting.policy != "none")


def test_questions_of_a_conversation_see_the_references_before_them(prompts: list[ItemPrompts], shallow: Path) -> None:
    turns = prompts[2]
    tokenizer = load_tokenizer(shallow, {})
    texts = [tokenizer.decode(np.concatenate([turns.ids, asked.ids]).tolist()) for asked in turns.asked]
    first, second = turns.item.questions
    assert second.text not in texts[0]
    assert f"There were{first.answers[0]}" in texts[1].replace("There were ", "There were")
    assert texts[1].index(first.text) < texts[1].index(second.text)


def test_long_prompts_are_cut_in_their_middle(shallow: Path) -> None:
    encoder = ItemEncoder(load_tokenizer(shallow, {}))
    long = item(7, context="\n".join(f"{i}: {log(i)}" for i in range(80)))
    (whole,) = encode_items([item(7)], encoder, 8192, 1000)
    (cut,) = encode_items([long], encoder, 8192, 1000)
    assert whole.num_tokens < 1000
    assert cut.num_tokens == 1000
    assert np.array_equal(cut.asked[0].ids, whole.asked[0].ids)
    assert cut.head == whole.head
    text = load_tokenizer(shallow, {}).decode(cut.ids.tolist())
    assert "0: On day 1 " in text
    assert text.rstrip().endswith(long.context[-200:])
    with pytest.raises(CrushError, match="--length must be more than the"):
        encoder.encode(long, 40)


def test_plan_has_everything_once_and_a_full_cache_of_each_kind() -> None:
    made = make_plan(
        PlanOptions(
            policies=("kvcrush:scorer=kvzip;split=global", "snapkv", "none", "snapkv", "keydiff"),
            kept=(0.5, 0.25),
            kept_tokens=(512,),
            precisions=(("u8", "u8"), ("u4", "u2")),
            queries=("agnostic",),
            engines=("crush", "genai"),
            baselines=False,
        )
    )
    settings = [planned.setting for planned in made]
    assert len({s.key for s in settings}) == len(settings)
    ours = [s for s in settings if s.engine == "crush"]
    theirs = [s for s in settings if s.engine == "genai"]
    assert len(ours) == 2 * (1 + 3 * 3)
    assert {(s.policy, s.query, s.precisions) for s in theirs} == {
        (name, "aware", "u8/u8") for name in ("none", "kvcrush", "snapkv")
    }
    assert [s.precisions for s in ours if s.policy == "none"] == ["u8/u8", "u4/u2"]
    assert {planned.policy.budget.kept_tokens for planned in made} == {None, 512}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policies": ("kvzp",)}, "--policy must be one of .*did you mean 'kvzip'"),
        ({"policies": ("snapkv:windw=3",)}, "windw.*did you mean 'window'"),
        ({"policies": ("snapkv:window",)}, "must be KEY=VALUE, got 'window'"),
        ({"policies": ("snapkv",), "policy_options": ("share=0.5",)}, "share"),
        ({"policies": ("none:kept=1",)}, "kept"),
        ({"kept": (1.5,)}, r"--kept must be a fraction in \(0, 1\], got 1.5"),
        ({"queries": ("both",)}, "--query must be one of aware, agnostic, got 'both'"),
        ({"engines": ("vllm",)}, "--engine must be one of crush, genai, got 'vllm'"),
        ({"precisions": (("u8", "u3"),)}, "--value-precision must be one of"),
        ({"precisions": (("u2", "u2"),), "engines": ("genai",)}, "must be u8 or u4 for openvino_genai, got u2/u2"),
    ],
)
def test_bad_plans_are_refused_by_name(options: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(CrushError, match=message):
        make_plan(PlanOptions(**options))  # type: ignore[arg-type]


def test_precisions_are_pairs() -> None:
    assert pairs(("u8", "u4"), ("u4", "u2")) == (("u8", "u4"), ("u4", "u2"))
    assert pairs(("u8",), ("u4", "u2")) == (("u8", "u4"), ("u8", "u2"))
    with pytest.raises(CrushError, match="equally many, or one of either, got 2 and 3"):
        pairs(("u8", "u4"), ("u8", "u4", "u2"))


@pytest.mark.parametrize(
    ("suite", "options", "message"),
    [
        ("rulr", {}, "suite must be one of .*did you mean 'ruler'"),
        ("ruler", {"tasks": ("vtt",)}, "task must be one of .*did you mean 'vt'"),
        ("scbench", {"tasks": ("passkeys",)}, "task must be one of .*did you mean 'passkey'"),
        ("longbench", {"tasks": ("trek",)}, "task must be one of .*did you mean 'trec'"),
        ("longbench", {}, "--data must be a folder .*huggingface.co/datasets"),
        ("longbench", {"data": Path("/nowhere")}, "data must be a folder with files .*huggingface.co/datasets"),
        ("ruler", {"lengths": (9000,)}, "--length must be at most 8192, the model's context, got 9000"),
        ("ruler", {"lengths": (1000, 2000)}, "--length must be one number but for the suite needle, got 2"),
        ("needles", {"haystack": Path("/nowhere.txt")}, "--haystack must be readable UTF-8 text, got '/nowhere.txt'"),
        ("ruler", {"tasks": ("vt",), "lengths": (20,)}, "length must be at least"),
    ],
)
def test_bad_suites_are_refused_by_name(suite: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(CrushError, match=message):
        load_suite(suite, SuiteOptions(**options), lambda text: len(text.split()), 8192)  # type: ignore[arg-type]


def test_prompt_longer_than_the_model_is_refused_by_its_item(shallow: Path) -> None:
    encoder = ItemEncoder(load_tokenizer(shallow, {}))
    with pytest.raises(CrushError, match=r"model must have a context of at least .* for item 'log-7'.*got 200; lower"):
        encode_items([item(7)], encoder, 200)


def test_commands_of_every_suite_teach_with_examples() -> None:
    for suite in SUITES:
        told = CliRunner().invoke(app, [suite, "--help"], env={"COLUMNS": "200"})
        assert told.exit_code == 0
        assert f"ov_kvcrush-eval {suite} my-model" in told.output
        for option in ("--policy", "--kept", "--key-precision", "--query", "--out", "--json"):
            assert option in told.output


def test_a_command_writes_a_run_and_a_page(shallow: Path, tmp_path: Path) -> None:
    folder, page, report = tmp_path / "run", tmp_path / "results.md", tmp_path / "run.json"
    line = ["scbench", str(shallow), "--task", "passkey", "--length", "500", "--limit", "1", "--policy", "knorm,random"]
    line += ["--kept", "0.5", "--query", "agnostic", "--out", str(folder), "--json", str(report)]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    rows = json.loads(report.read_text())["rows"]
    assert {(row["task"], row["policy"]) for row in rows} == {
        (task, policy) for task in ("passkey", "average") for policy in ("none", "knorm", "random", "streaming_llm")
    }
    again = CliRunner().invoke(app, line)
    assert again.exit_code == 2
    assert "holds this run, finished" in again.output.replace("\n", " ")
    written = CliRunner().invoke(app, ["results", str(folder), "--out", str(page)])
    assert written.exit_code == 0, written.output
    assert "# scbench" in (tmp_path / "results" / "run.md").read_text()
    wrong = CliRunner().invoke(app, ["ruler", str(tmp_path / "none"), "--policy", "kvzip"])
    assert wrong.exit_code == 2
    assert "Traceback" not in wrong.output


def test_openvino_genai_is_asked_the_same_and_holds_fewer_bytes_where_it_evicts(
    prompts: list[ItemPrompts], shallow: Path
) -> None:
    full, evicting = make_plan(PlanOptions(policies=("snapkv",), kept=(KEPT,), engines=("genai",)))
    runs = GenaiRuns(shallow, "u8", "u8", {})
    (whole, _), (less, _) = (list(runs.answer(prompts[0], TASK, [planned])) for planned in (full, evicting))
    num_tokens = len(prompts[0].ids) + len(prompts[0].asked[0].ids)
    assert whole.prompt_tokens == less.prompt_tokens == whole.kept_tokens == num_tokens
    assert less.kept_tokens == int(KEPT * num_tokens + 1) // 32 * 32
    assert less.num_bytes / whole.num_bytes == pytest.approx((less.kept_tokens // 32 + 1) / -(-num_tokens // 32))
