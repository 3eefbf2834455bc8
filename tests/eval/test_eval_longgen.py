"""Long answers: items are what they say, and every setting writes what a request with its policy writes."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ov_kvcrush import LLMPipeline, SchedulerConfig
from ov_kvcrush.config import CacheConfig
from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.benchmarks.haystack import Haystack
from ov_kvcrush.eval.benchmarks.items import Item, Question, score
from ov_kvcrush.eval.benchmarks.longgen import CONTINUE, TASKS, likelihood, longgen_items, loss_text
from ov_kvcrush.eval.benchmarks.metrics import lines_in_order
from ov_kvcrush.eval.benchmarks.sizing import item_tokens
from ov_kvcrush.eval.benchmarks.suites import SuiteOptions, load_suite
from ov_kvcrush.eval.cli.app import app
from ov_kvcrush.eval.likelihood.perplexity import distributions
from ov_kvcrush.eval.report.likelihood import losses
from ov_kvcrush.eval.runs.answers import Answer
from ov_kvcrush.eval.runs.long_answers import LongRuns, check_long, long_runs
from ov_kvcrush.eval.runs.plan import Planned, PlanOptions, caches_of, make_plan
from ov_kvcrush.eval.runs.prompts import ItemEncoder, ItemPrompts, encode_items
from ov_kvcrush.eval.runs.run_folder import read_run
from ov_kvcrush.model.load import load_model
from ov_kvcrush.model.plugin import open_core
from ov_kvcrush.pipelines.loading import load_tokenizer

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
BUDGET, STRIDE = 96, 24
POLICIES = ("snapkv:window=16", "rkv", "streaming_llm", "random")
LENGTH = 800


def novel(num_sentences: int) -> str:
    rng = random.Random(0)
    words = ("the", "ship", "crew", "saw", "whale", "north", "of", "old", "harbour", "and", "turned", "back", "night")
    return " ".join(f"{' '.join(rng.choices(words, k=9)).capitalize()}." for _ in range(num_sentences))


TEXT = Haystack.of(novel(400))


def words_of(text: str) -> int:
    return len(text.split())


def stock_logprobs(folder: Path, ids: np.ndarray) -> np.ndarray:
    """float64 (S, vocabulary): the distribution after each of the ids by OpenVINO's own attention, in one inference."""
    model = open_core().compile_model(folder / "openvino_model.xml", "CPU", EXACT)
    inputs = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64)}
    inputs |= {"position_ids": np.arange(len(ids))[None], "beam_idx": np.zeros(1, np.int32)}
    logits = model.create_infer_request().infer(inputs)["logits"][0].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def items(task: str, count: int = 2, length: int = 400, seed: int = 1) -> list[Item]:
    return list(longgen_items([task], count, length, words_of, TEXT, seed))


class TestItems:
    @pytest.mark.parametrize("task", TASKS)
    def test_items_fill_the_length_and_depend_on_the_seed_alone(self, task: str) -> None:
        first, second = items(task)
        assert items(task, 3)[:2] == [first, second]
        assert first.context != second.context
        assert items(task, seed=2)[0].context != first.context
        for item in (first, second):
            assert 0.9 * 400 < item_tokens(item, words_of) <= 400
            (asked,) = item.questions
            assert asked.max_new_tokens >= words_of("\n".join(asked.answers))
            assert 0.3 < asked.max_new_tokens / 400 < 0.7

    @pytest.mark.parametrize("task", ["copy", "list"])
    def test_answers_are_the_lines_of_the_prompt_without_the_one_that_is_given(self, task: str) -> None:
        for item in items(task):
            (asked,) = item.questions
            lines = [asked.answer_prefix.rstrip("\n"), *asked.answers]
            shown = item.context.splitlines()[2:-1]
            assert len(set(lines)) == len(lines)
            if task == "copy":
                assert shown == lines
                assert len({line.split()[0] for line in lines}) == len(lines)
            else:
                assert sorted(shown) == lines != shown
                first = int(lines[0].split(":")[0])
                assert [int(line.split(":")[0]) for line in lines] == list(range(first, first + len(lines)))
            assert score(TASKS[task], "\n".join(asked.answers), asked) == 1

    def test_what_is_continued_stands_in_the_text(self) -> None:
        for item in items(CONTINUE):
            (asked,) = item.questions
            whole = f"{item.context}{asked.text}{asked.answers[0]}"
            assert whole in " ".join([*TEXT.sentences, *TEXT.sentences])
            assert not item.chat
            assert abs(words_of(item.context + asked.text) - words_of(asked.answers[0])) <= 1

    def test_what_cannot_be_made_is_refused_by_name(self) -> None:
        with pytest.raises(CrushError, match="task must be one of copy, list, continue, got 'cpy'"):
            longgen_items(["cpy"], 1, 400, words_of)
        with pytest.raises(CrushError, match="--haystack must be given for continue, got none"):
            longgen_items(["continue"], 1, 400, words_of)
        with pytest.raises(CrushError, match="length must be at most 90 for continue-400-0, there is no more to fill"):
            list(longgen_items(["continue"], 1, 400, words_of, Haystack.of(novel(10))))
        with pytest.raises(CrushError, match="length must be at least"):
            list(longgen_items(["copy"], 1, 20, words_of))

    def test_without_a_text_there_is_nothing_to_continue(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("ov_kvcrush.eval.benchmarks.haystack.ESSAY_PACKAGE", "no-such-package")
        options = {"lengths": (400,), "limit": 1}
        suite = load_suite("longgen", SuiteOptions(**options), words_of, 1000)  # type: ignore[arg-type]
        assert [item.task for item in suite.items] == ["copy", "list"]
        with pytest.raises(CrushError, match="--haystack must be given"):
            load_suite("longgen", SuiteOptions(**options, tasks=("continue",)), words_of, 1000)  # type: ignore[arg-type]
        (tmp_path / "novel.txt").write_text(novel(400))
        own = SuiteOptions(**options, haystack=tmp_path / "novel.txt")  # type: ignore[arg-type]
        assert [item.task for item in load_suite("longgen", own, words_of, 1000).items] == [*TASKS]


class TestScores:
    @given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=8), st.lists(st.sampled_from("abcd "), max_size=8))
    def test_lines_in_order_are_the_longest_common_subsequence(self, answers: list[str], lines: list[str]) -> None:
        said = [line for line in lines if line.strip()]

        def longest(i: int, j: int) -> int:
            if i == len(answers) or j == len(said):
                return 0
            skipped = max(longest(i + 1, j), longest(i, j + 1))
            return max(skipped, 1 + longest(i + 1, j + 1)) if answers[i] == said[j] else skipped

        question = Question("?", tuple(answers), 8)
        assert lines_in_order("\n".join(lines), question) == longest(0, 0) / len(answers)

    @given(st.floats(0, 40))
    def test_a_loss_is_read_as_it_was_written(self, loss: float) -> None:
        question = Question("?", ("x",), 8)
        assert -math.log(likelihood(loss_text(loss, 5), question)) == pytest.approx(loss, abs=1e-8)
        with pytest.raises(CrushError, match="must tell a loss, got 'abc'"):
            likelihood("abc", question)


@pytest.fixture(scope="module")
def folder(tiny_ir: Callable[[str], Path]) -> Path:
    return tiny_ir("llama")


@pytest.fixture(scope="module")
def prompts(folder: Path) -> dict[str, ItemPrompts]:
    encoder = ItemEncoder(load_tokenizer(folder, {}))
    made = longgen_items(tuple(TASKS), 1, LENGTH, encoder.count, TEXT)
    return {one.item.task: one for one in encode_items(made, encoder, 4096)}


@pytest.fixture(scope="module")
def plan() -> list[Planned]:
    options = {"policies": POLICIES, "policy_options": (f"stride={STRIDE}",), "kept_tokens": (BUDGET,)}
    return make_plan(PlanOptions(**options, precisions=(("f32", "f32"), ("u8", "u4"))))  # type: ignore[arg-type]


Answers = dict[str, list[Answer]]


@pytest.fixture(scope="module")
def answers(folder: Path, prompts: dict[str, ItemPrompts], plan: list[Planned]) -> Answers:
    runs = long_runs(folder, plan, EXACT)
    return {task: list(runs.answer(prompts[task], TASKS[task], plan)) for task in TASKS}


def whole(one: ItemPrompts) -> np.ndarray:
    return np.concatenate([one.ids, one.asked[0].ids])


class TestRuns:
    def test_answers_are_those_of_requests_with_the_policies(
        self, answers: Answers, prompts: dict[str, ItemPrompts], folder: Path
    ) -> None:
        cache = CacheConfig(key_precision="f32", value_precision="f32")
        pipe = LLMPipeline(folder, "CPU", dict(EXACT), cache_config=cache, scheduler_config=SchedulerConfig())
        for task in ("copy", "list"):
            ids, asked = whole(prompts[task]), prompts[task].asked[0].question
            exact = [answer for answer in answers[task] if answer.planned.setting.precisions == "f32/f32"]
            for answer in exact:
                said = pipe.generate(
                    ov.Tensor(ids[None]),
                    policy=answer.planned.policy,
                    max_new_tokens=asked.max_new_tokens,
                    do_sample=False,
                )
                assert pipe.get_tokenizer().decode(said.tokens[0]) == answer.text
                assert answer.prompt_tokens == len(ids) + len(said.tokens[0])
                assert answer.kept_tokens == said.perf_metrics.kept_tokens
                assert answer.num_bytes == said.perf_metrics.kv_bytes

    def test_every_setting_is_answered_once_and_keeps_its_budget_to_the_end(
        self, answers: Answers, plan: list[Planned]
    ) -> None:
        for replies in answers.values():
            assert sorted(r.planned.setting.key for r in replies) == sorted(p.setting.key for p in plan)
            for answer in replies:
                if answer.planned.policy.evicts:
                    assert BUDGET <= answer.kept_tokens <= BUDGET + STRIDE
                else:
                    assert answer.kept_tokens == answer.prompt_tokens - 1  # the last token of an answer is not run
            full = [r.num_bytes for r in replies if not r.planned.policy.evicts]
            for answer in (r for r in replies if r.planned.policy.evicts):
                assert answer.num_bytes < full[answer.planned.setting.precisions != "f32/f32"]

    def test_loss_of_the_full_cache_is_that_of_the_text_read_token_by_token(
        self, answers: Answers, prompts: dict[str, ItemPrompts], folder: Path
    ) -> None:
        one = prompts[CONTINUE]
        context = whole(one)
        text = one.asked[0].question.answers[0]
        ids = load_tokenizer(folder, {}).encode(text, add_special_tokens=False).input_ids.data[0]
        assert len(ids) == one.asked[0].question.max_new_tokens
        cache = CacheConfig(key_precision="f32", value_precision="f32", attention="crush")
        model = load_model(folder, "CPU", dict(EXACT), "crush")
        text_ids = np.concatenate([context, ids])
        logprobs = distributions(model, cache, text_ids, len(context)).logprobs
        np.testing.assert_allclose(logprobs, stock_logprobs(folder, text_ids)[len(context) - 1 : -1], atol=1e-3)
        expected = float(-logprobs[np.arange(len(ids)), ids].mean())
        found = {
            r.planned.setting.policy: self.loss(r)
            for r in answers[CONTINUE]
            if r.planned.setting.key_precision == "f32"
        }
        assert found["none"] == pytest.approx(expected, abs=1e-3)
        # What a policy drops is missed.
        assert len({round(loss, 4) for loss in found.values()}) == len(found)

    @staticmethod
    def loss(answer: Answer) -> float:
        return -math.log(likelihood(answer.text, answer.asked.question))

    def test_a_budget_that_holds_everything_is_the_full_cache(
        self, prompts: dict[str, ItemPrompts], folder: Path
    ) -> None:
        plan = make_plan(
            PlanOptions(policies=("snapkv",), kept_tokens=(4000,), precisions=(("f32", "f32"),), baselines=False)
        )
        runs = LongRuns(folder, caches_of(plan), EXACT)
        for task in ("list", CONTINUE):
            full, snapkv = runs.answer(prompts[task], TASKS[task], plan)
            assert (full.text, full.kept_tokens) == (snapkv.text, snapkv.kept_tokens)
            # Beside the tokens the queries of its window are held.
            assert 0 < snapkv.num_bytes - full.num_bytes < full.num_bytes / 20

    def test_openvino_genai_evicts_while_it_writes(self, prompts: dict[str, ItemPrompts], folder: Path) -> None:
        one, kept = prompts["list"], len(whole(prompts["list"])) // 32 * 32 + 64
        plan = make_plan(PlanOptions(policies=("snapkv",), kept_tokens=(kept,), engines=("genai",)))
        # Where the tiny model would end its answer depends on how a processor rounds.
        task = replace(TASKS["list"], min_new_tokens=one.asked[0].question.max_new_tokens)
        full, evicting = (next(iter(long_runs(folder, [p], EXACT).answer(one, task, [p]))) for p in plan)
        assert len(whole(one)) < kept < evicting.prompt_tokens
        assert full.kept_tokens == full.prompt_tokens
        assert evicting.kept_tokens == kept
        blocks = -(-full.prompt_tokens // 32)
        assert evicting.num_bytes / full.num_bytes == pytest.approx((kept // 32 + 1) / blocks, rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": ("aware", "agnostic")}, "--query must be aware for longgen, whose policies see all of a prompt"),
        ({"engines": ("genai",), "kept_tokens": (256,)}, "--task must be copy,list for openvino_genai, which cannot"),
    ],
)
def test_what_long_answers_cannot_be_asked_for_is_refused(options: dict[str, object], message: str) -> None:
    plan = make_plan(PlanOptions(policies=("snapkv",), **options))  # type: ignore[arg-type]
    with pytest.raises(CrushError, match=message):
        check_long(plan, [*TASKS, *TASKS])


def test_openvino_genai_needs_a_number_of_tokens() -> None:
    options = {"policies": ("snapkv",), "engines": ("crush", "genai")}
    with pytest.raises(
        CrushError, match="--kept-tokens must be given in place of --kept for openvino_genai in longgen"
    ):
        check_long(make_plan(PlanOptions(**options, kept=(0.5,))), ["copy"])  # type: ignore[arg-type]
    check_long(make_plan(PlanOptions(**options, kept_tokens=(256,))), ["copy", "list"])  # type: ignore[arg-type]


def test_a_command_writes_a_run_with_losses(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "novel.txt").write_text(novel(400))
    out, report, page = tmp_path / "run", tmp_path / "run.json", tmp_path / "page.md"
    line = ["longgen", str(folder), "--text", str(tmp_path / "novel.txt"), "--length", "700", "--limit", "1"]
    line += ["--policy", "rkv", "--kept-tokens", "96", "--policy-option", f"stride={STRIDE}"]
    done = CliRunner().invoke(app, [*line, "--out", str(out), "--json", str(report)])
    assert done.exit_code == 0, done.output
    assert "next-token loss of continue, nats" in done.output
    run = read_run(out)
    assert {row["task"] for row in json.loads(report.read_text())["rows"]} == {*TASKS, "average"}
    told = {row.policy: row for row in losses(run) if row.task == CONTINUE}
    assert sorted(told) == ["none", "random", "rkv", "streaming_llm"]
    shares = {row.policy: row.score for row in run.rows if row.task == CONTINUE}
    for policy, row in told.items():
        assert row.score == pytest.approx(-math.log(shares[policy]))
        assert row.difference == pytest.approx(row.score - told["none"].score)
    assert CliRunner().invoke(app, ["results", str(out), "--out", str(page)]).exit_code == 0
    assert "Next-token loss of `continue`" in (tmp_path / "page" / "run.md").read_text()
    refused = CliRunner().invoke(app, [*line, "--query", "agnostic"])
    assert (refused.exit_code, "--query must be aware" in refused.output) == (2, True)
