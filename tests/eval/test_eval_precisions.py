"""Runs of several precisions: each context is read once for all, and every answer is that of a run of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from eval_runs import config, stop_at

from ov_kvcrush import LLMPipeline
from ov_kvcrush.eval.benchmarks.items import Item, Question, Task
from ov_kvcrush.eval.benchmarks.metrics import string_match_all
from ov_kvcrush.eval.records import Prediction
from ov_kvcrush.eval.runs.plan import Planned, PlanOptions, make_plan
from ov_kvcrush.eval.runs.prompts import ItemEncoder, ItemPrompts, encode_items
from ov_kvcrush.eval.runs.run_folder import Run, RunFolder
from ov_kvcrush.eval.runs.runner import run_suite
from ov_kvcrush.pipelines.loading import load_tokenizer
from ov_kvcrush.pipelines.request_loop import RequestLoop

TASK = Task("boats", string_match_all)
PRECISIONS = (("u8", "u8"), ("u4", "u4"), ("bf16", "u2"))
QUERIES = ("aware", "agnostic")
ITEMS = tuple(
    Item(
        f"boats-{i}",
        TASK.name,
        f"In the harbour of Anstruther lie {i + 3} boats. " * 6 + "The red one is called Reaper.",
        tuple(Question(text, ("Reaper",), new) for text, new in (("What is it called?", 9), ("How many?", 5))),
    )
    for i in range(2)
)


@pytest.fixture(scope="module")
def model(tiny_ir: Callable[[str], Path]) -> Path:
    return tiny_ir("llama")


@pytest.fixture(scope="module")
def prompts(model: Path) -> list[ItemPrompts]:
    return encode_items(ITEMS, ItemEncoder(load_tokenizer(model, {})), 4096)


def plan_of(*precisions: tuple[str, str]) -> list[Planned]:
    policies = ("kvzip:chunk=64", "snapkv:window=16", "kvzip:chunk=64;sample=0.5")
    return make_plan(
        PlanOptions(policies=policies, kept=(0.3,), precisions=precisions, queries=QUERIES, baselines=False)
    )


Answer = Callable[..., Run]


@pytest.fixture(scope="module")
def answer(model: Path, prompts: list[ItemPrompts]) -> Answer:
    def run(path: Path, plan: list[Planned], stop: int | None = None) -> Run:
        with RunFolder(path, config([planned.setting for planned in plan], num_items=len(prompts))) as folder:
            stop_at(folder, stop)
            return run_suite(folder, prompts, {TASK.name: TASK}, plan, model, {})

    return run


@pytest.fixture(scope="module")
def together(answer: Answer, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return answer(tmp_path_factory.mktemp("runs") / "together", plan_of(*PRECISIONS))


def timeless(run: Run) -> list[Prediction]:
    """Without what depends on the full cache of most bits that runs beside, too."""
    return [replace(prediction, seconds=0.0, kl=None, top1=None) for prediction in run.predictions]


def test_precisions_together_are_answered_as_one_by_one(answer: Answer, together: Run, tmp_path: Path) -> None:
    alone = [answer(tmp_path / "-".join(pair), plan_of(pair)) for pair in PRECISIONS]
    expected = {made.key: made for run in alone for made in timeless(run)}
    assert {made.key: made for made in timeless(together)} == expected
    assert len(together.predictions) == len(expected)
    # And not because precisions did not matter.
    assert len({tuple(p.text for p in timeless(run)) for run in alone}) == len(PRECISIONS)
    assert len({p.bytes for p in together.predictions}) > len(PRECISIONS)


def test_rows_and_answers_are_in_the_order_of_the_plan(together: Run) -> None:
    settings = [planned.setting for planned in plan_of(*PRECISIONS)]
    for row, setting in zip(together.rows, settings, strict=False):
        assert (row.precisions, row.query, row.policy) == (setting.precisions, setting.query, setting.policy)
    places = {setting.key: place for place, setting in enumerate(settings)}
    order = [
        (
            [one.id for one in ITEMS].index(p.item_id),
            QUERIES.index(settings[places[p.setting_key]].query),
            # With the question in view there is a context for each.
            p.question_index if settings[places[p.setting_key]].query == "aware" else 0,
            places[p.setting_key],
            p.question_index,
        )
        for p in together.predictions
    ]
    assert order == sorted(order)
    assert len(order) == len(settings) * sum(len(one.questions) for one in ITEMS)


def test_stopped_run_of_precisions_ends_as_one_that_was_not(answer: Answer, together: Run, tmp_path: Path) -> None:
    plan = plan_of(*PRECISIONS)
    for stop in (7, 35):  # within the answers to an item, of one precision and of another
        with pytest.raises(KeyboardInterrupt):
            answer(tmp_path, plan, stop)
    assert timeless(answer(tmp_path, plan)) == timeless(together)


def test_each_context_is_read_once_for_all_precisions(answer: Answer, tmp_path: Path) -> None:
    """Policies that want another second reading have one of their own; one more is shared by questions they see."""
    reads: list[int] = []
    then: Any = RequestLoop.prefill
    loads: list[Path] = []
    init: Any = LLMPipeline.__init__

    def read(self: Any, ids: Any, params: Any, progress: Any) -> Any:
        reads.append(len(params.fan_out))
        return then(self, ids, params, progress)

    def load(self: Any, path: Path, *args: Any, **options: Any) -> None:
        loads.append(path)
        init(self, path, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RequestLoop, "prefill", read)
        patch.setattr(LLMPipeline, "__init__", load)
        answer(tmp_path, plan_of(*PRECISIONS))
    contexts = sum(len(item.questions) + 1 for item in ITEMS)
    assert [read for read in reads if read] == [3 * len(PRECISIONS), len(PRECISIONS)] * contexts
    assert reads.count(0) == sum(len(item.questions) > 1 for item in ITEMS) > 0
    assert len(loads) == 1
