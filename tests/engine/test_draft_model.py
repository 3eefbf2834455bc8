"""A draft model: the answers of one token a step, whatever it guesses, and nothing of it left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from both_libraries import EXACT
from lookahead_runs import NEW_TOKENS, AllIn, accepted, answers, ids_of

from ov_kvcrush import (
    ContinuousBatchingPipeline,
    CrushError,
    GenerationConfig,
    LLMPipeline,
    SchedulerConfig,
    draft_model,
)
from ov_kvcrush.engine.lookahead import drafts


@pytest.fixture(autouse=True)
def _all_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "DraftPace", AllIn)
    monkeypatch.setattr(drafts, "MAX_ROWS", 1000)


@pytest.fixture(scope="module")
def folder(tiny_ir: Callable[[str], Path]) -> Path:
    return tiny_ir("llama")


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[Any]:
    return answers(ContinuousBatchingPipeline(folder, **EXACT), together=False)[0]


def guesser_of(pipe: Any) -> Any:
    return pipe._backend.drafts._guesser


@pytest.mark.parametrize(("kind", "blocks"), [("llama", 0), ("llama", 14), ("qwen2", 0)])
def test_answers_are_those_of_one_token_a_step(
    folder: Path, tiny_ir: Callable[[str], Path], expected: list[Any], kind: str, blocks: int
) -> None:
    """The model as its own draft, and one that guesses nearly all wrong; with memory short."""
    config = SchedulerConfig(num_kv_blocks=blocks, max_step_ms=0)
    pipe = ContinuousBatchingPipeline(folder, config, draft_model=draft_model(tiny_ir(kind)), **EXACT)
    said, handles = answers(pipe, together=True)
    assert said == expected
    num_accepted, num_drafted = accepted(handles)
    assert num_drafted > 3 * NEW_TOKENS
    assert (num_accepted > 0.7 * num_drafted) == (kind == "llama")
    assert (pipe.get_metrics().num_preemptions > 0) == bool(blocks)
    for cache in (pipe._backend.cache, guesser_of(pipe)._cache):
        assert cache.usage().used_bytes == cache.usage().staging_bytes == 0


def test_a_draft_that_is_not_sure_stops(folder: Path) -> None:
    pipe = LLMPipeline(folder, draft_model=draft_model(folder), **EXACT)
    prompt = ov.Tensor(ids_of(40)[None])
    numbers = []
    for threshold in (0.0, 0.01, 0.99):
        handle = pipe._backend.add(
            0,
            ids_of(40),
            GenerationConfig(max_new_tokens=40, ignore_eos=True, assistant_confidence_threshold=threshold),
        )
        handle.drive()
        handle.wait()
        numbers.append(handle.request.num_drafted)
        assert [*handle.outputs()[0].generated_ids] == pipe.generate(prompt, max_new_tokens=40, ignore_eos=True).tokens[
            0
        ]
    assert numbers[0] >= numbers[1] > numbers[2]


def test_a_draft_that_breaks_harms_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = LLMPipeline(folder, draft_model=draft_model(folder), **EXACT)
    prompt = ov.Tensor(ids_of(40)[None])
    asked = {"max_new_tokens": 20, "ignore_eos": True}
    whole = pipe.generate(prompt, **asked).tokens
    guesser = guesser_of(pipe)
    infer = guesser._runner.infer

    def broken() -> np.ndarray:
        if len(guesser._lines) and next(iter(guesser._lines)).num_generated == 7:
            raise RuntimeError("broken")
        return infer()  # type: ignore[no-any-return]

    monkeypatch.setattr(guesser._runner, "infer", broken)
    assert pipe.generate(prompt, **asked).tokens == whole
    assert guesser._cache.usage().used_bytes == 0


def test_what_is_no_draft_is_refused_before_anything_is_loaded(folder: Path, smollm2: Path) -> None:
    for draft, message in (
        (
            draft_model(smollm2),
            "draft_model must have the vocabulary of the model, got .* with 49152 tokens instead of",
        ),
        ("folder", "draft_model must be made by ov_kvcrush.draft_model"),
        (draft_model(folder, "GPU"), "device of draft_model must be CPU"),
        (draft_model("no/such/folder"), "no/such/folder"),
    ):
        with pytest.raises(CrushError, match=message):
            LLMPipeline(folder, draft_model=draft, **EXACT)
    with pytest.raises(CrushError, match="prompt_lookup must be False with a draft_model"):
        LLMPipeline(folder, draft_model=draft_model(folder), prompt_lookup=True, **EXACT)
