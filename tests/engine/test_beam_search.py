"""Beam search finds what openvino_genai's finds, in any company, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openvino as ov
import openvino_genai as stock
import pytest
from both_libraries import EXACT
from hypothesis import given
from hypothesis import strategies as st

from ov_kvcrush import (
    CacheConfig,
    ContinuousBatchingPipeline,
    GenerationConfig,
    GenerationFinishReason,
    GenerationStatus,
    LLMPipeline,
    RequestError,
    SchedulerConfig,
    StopCriteria,
)
from ov_kvcrush.core.stop_strings import StopStringTracker
from ov_kvcrush.engine.top_tokens import log_probabilities, repeated_ngrams, top_tokens

NEW_TOKENS = 14
SEARCHES: list[dict[str, Any]] = [
    {"num_beams": 4},
    {"num_beams": 4, "stop_criteria": StopCriteria.EARLY},
    {"num_beams": 3, "stop_criteria": StopCriteria.NEVER, "length_penalty": 1.5},
    {"num_beams": 4, "stop_criteria": StopCriteria.NEVER, "length_penalty": -1.0},
    {"num_beams": 4, "length_penalty": 0.0},
    {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 1.0},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "length_penalty": 0.5},
    {"num_beams": 4, "num_beam_groups": 4, "diversity_penalty": 2.0, "no_repeat_ngram_size": 3},
    {"num_beams": 4, "no_repeat_ngram_size": 1},
    {"num_beams": 5, "no_repeat_ngram_size": 2, "stop_criteria": StopCriteria.EARLY},
]


class Answer(NamedTuple):
    """What one search found."""

    ids: list[list[int]]
    scores: list[float]
    reasons: list[str]


def prompt(seed: int) -> ov.Tensor:
    rng = np.random.default_rng(seed)
    return ov.Tensor(rng.integers(0, 256, (1, int(rng.integers(3, 70)))))


def search(**options: Any) -> GenerationConfig:
    # Two of the tiny model's likeliest end tokens beside its own: most answers of an untrained one never end.
    given = {"max_new_tokens": NEW_TOKENS, "stop_token_ids": {257, 65}, **options}
    return GenerationConfig(num_return_sequences=given["num_beams"], **given)


def answer(result: Any) -> Answer:
    reasons = [reason.name for reason in result.finish_reasons]
    return Answer([list(ids) for ids in result.m_generation_ids], list(result.m_scores), reasons)


def found(pipe: Any, prompts: list[ov.Tensor], configs: list[GenerationConfig]) -> list[Answer]:
    return [answer(result) for result in pipe.generate(prompts, configs)]


def equal(ours: Answer, theirs: Answer) -> None:
    assert (ours.ids, ours.reasons) == (theirs.ids, theirs.reasons)
    np.testing.assert_allclose(ours.scores, theirs.scores, rtol=2e-4, atol=2e-4)


@pytest.fixture(scope="module")
def folder(tiny_ir: Callable[[str], Path]) -> Path:
    return tiny_ir("llama")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> ContinuousBatchingPipeline:
    return ContinuousBatchingPipeline(folder, properties=EXACT)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> stock.ContinuousBatchingPipeline:
    return stock.ContinuousBatchingPipeline(str(folder), stock.SchedulerConfig(), "CPU", EXACT)


@pytest.fixture(autouse=True)
def nothing_left(pipe: ContinuousBatchingPipeline) -> Iterator[None]:
    yield
    assert pipe.get_metrics().kv_cache_size_in_bytes == 0
    assert pipe.get_metrics().requests == 0


# -- openvino_genai --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", SEARCHES, ids=str)
def test_answers_equal_openvino_genai(
    options: dict[str, Any], pipe: ContinuousBatchingPipeline, theirs: stock.ContinuousBatchingPipeline
) -> None:
    prompts = [prompt(seed) for seed in range(20)]
    configs = [search(**options)] * len(prompts)
    for own, other in zip(found(pipe, prompts, configs), found(theirs, prompts, configs), strict=True):
        equal(own, other)
