"""Beam search finds what openvino_genai's finds, in any company, and leaves nothing behind."""

from __future__ import annotations

import string
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

ONE_THREAD = EXACT | {"INFERENCE_NUM_THREADS": "1"}  # a step of the tiny model is too short to be shared
NEW_TOKENS = 14
# Tokens that the tiny model likes: with its own end token alone, most of its answers never end.
FEW_ENDS, MANY_ENDS = {36, 142}, {36, 142, 180, 109, 207, 150, 229, 204, 198, 30, 69, 220, 231, 219, 230, 100, 99, 154}
LETTERS = set(string.ascii_letters)
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
    {"num_beams": 4, "stop_token_ids": MANY_ENDS},
    {"num_beams": 3, "stop_token_ids": MANY_ENDS, "stop_criteria": StopCriteria.NEVER},
    {"num_beams": 4, "stop_token_ids": set(), "stop_strings": LETTERS, "include_stop_str_in_output": True},
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
    given = {"max_new_tokens": NEW_TOKENS, "stop_token_ids": FEW_ENDS, **options}
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
    return ContinuousBatchingPipeline(folder, properties=ONE_THREAD)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> stock.ContinuousBatchingPipeline:
    return stock.ContinuousBatchingPipeline(str(folder), stock.SchedulerConfig(), "CPU", ONE_THREAD)


@pytest.fixture(autouse=True)
def nothing_left(pipe: ContinuousBatchingPipeline) -> Iterator[None]:
    yield
    assert pipe.get_metrics().kv_cache_size_in_bytes == 0
    assert pipe.get_metrics().requests == 0


# -- openvino_genai --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(SEARCHES)))  # not by their text: sets have another order in each worker
def test_answers_equal_openvino_genai(
    number: int, pipe: ContinuousBatchingPipeline, theirs: stock.ContinuousBatchingPipeline
) -> None:
    options = SEARCHES[number]
    prompts = [prompt(seed) for seed in range(3 if "stop_strings" in options else 8)]
    configs = [search(**options)] * len(prompts)
    for own, other in zip(found(pipe, prompts, configs), found(theirs, prompts, configs), strict=True):
        equal(own, other)


def test_steps_count_as_tokens(folder: Path) -> None:
    config = search(num_beams=4)
    ours, other = LLMPipeline(folder, "CPU", **ONE_THREAD), stock.LLMPipeline(str(folder), "CPU", **ONE_THREAD)
    own, their = (lib.generate(prompt(1), config) for lib in (ours, other))
    assert own.tokens == their.tokens
    assert own.finish_reasons == their.finish_reasons
    assert own.perf_metrics.get_num_generated_tokens() == their.perf_metrics.get_num_generated_tokens()
    with pytest.raises(RequestError, match="streamer must be None"):
        ours.generate("a", config, lambda text: False)


# -- in company --------------------------------------------------------------------------------------------------------

COMPANY = SEARCHES[:2] + SEARCHES[5:8] + SEARCHES[10:12]


def together(pipe: ContinuousBatchingPipeline, configs: list[GenerationConfig]) -> list[Answer]:
    return found(pipe, [prompt(seed) for seed in range(len(configs))], configs)


def alone(pipe: ContinuousBatchingPipeline, configs: list[GenerationConfig]) -> list[Answer]:
    return [found(pipe, [prompt(seed)], [config])[0] for seed, config in enumerate(configs)]


def test_batch_equals_single(pipe: ContinuousBatchingPipeline) -> None:
    configs = [search(**options) for options in COMPANY]
    configs.insert(2, GenerationConfig(max_new_tokens=NEW_TOKENS, ignore_eos=True))
    for own, single in zip(together(pipe, configs), alone(pipe, configs), strict=True):
        equal(own, single)


@pytest.mark.parametrize("attention", ["crush", "paged"])
@pytest.mark.parametrize("rows", [3, 512])
def test_answers_are_the_same_where_rows_or_memory_are_short(
    attention: str, rows: int, folder: Path, pipe: ContinuousBatchingPipeline
) -> None:
    """rows: of a step; 3 are too few for all beams of a search, so few that requests run one after the other."""
    configs = [search(**options) for options in COMPANY]
    scheduler = SchedulerConfig(num_kv_blocks=18, max_num_batched_tokens=rows)
    tight = ContinuousBatchingPipeline(
        folder, scheduler, cache_config=CacheConfig(attention=attention), properties=ONE_THREAD
    )
    for own, single in zip(together(tight, configs), alone(pipe, configs), strict=True):
        equal(own, single)
    assert rows == 3 or tight.get_metrics().num_preemptions > 0
    assert tight.get_metrics().kv_cache_size_in_bytes == 0


def test_search_that_never_fits_ends_for_want_of_memory(folder: Path) -> None:
    tight = ContinuousBatchingPipeline(folder, SchedulerConfig(num_kv_blocks=4), properties=ONE_THREAD)
    config = search(num_beams=8, max_new_tokens=90, stop_token_ids=set())
    handle = tight.add_request(0, prompt(1), config)
    while tight.has_non_finished_requests():
        tight.step()
    assert handle.get_status() == GenerationStatus.IGNORED
    assert tight.get_metrics().kv_cache_size_in_bytes == 0


def test_beams_share_tiles_and_evict(folder: Path) -> None:
    cache = CacheConfig(policy={"name": "snapkv", "kept_tokens": 48})
    pipe = ContinuousBatchingPipeline(folder, cache_config=cache, properties=ONE_THREAD)
    handle = pipe.add_request(0, ov.Tensor(np.arange(200)[None]), search(num_beams=4, max_new_tokens=40))
    while pipe.has_non_finished_requests():
        pipe.step()
    kept = handle.get_stats().kept_tokens
    assert len(handle.outputs()) == 4
    assert kept is not None
    assert kept < 200
    assert pipe.get_metrics().kv_cache_size_in_bytes == 0


# -- ends --------------------------------------------------------------------------------------------------------------


def test_stopped_search_gives_what_it_has(pipe: ContinuousBatchingPipeline) -> None:
    handle = pipe.add_request(0, prompt(1), search(num_beams=4, stop_token_ids=set()))
    for _ in range(5):
        pipe.step()
    assert not handle.can_read()
    handle.stop()
    pipe.step()
    assert [len(output.generated_ids) for output in handle.outputs()] == [5] * 4
    assert handle.get_status() == GenerationStatus.STOP


def test_cancelled_and_late_searches_leave_nothing(pipe: ContinuousBatchingPipeline) -> None:
    cancelled = pipe.add_request(0, prompt(1), search(num_beams=4))
    late = pipe.add_request(1, prompt(2), search(num_beams=4, max_new_tokens=1000), timeout_s=0.2)
    for _ in range(3):
        pipe.step()
    cancelled.cancel()
    while pipe.has_non_finished_requests():
        pipe.step()
    assert cancelled.get_status() == late.get_status() == GenerationStatus.CANCEL


def test_answer_ends_before_its_stop_string_and_not_too_early(pipe: ContinuousBatchingPipeline) -> None:
    """openvino_genai removes the token before the stop string and keeps the string; it does not know min_new_tokens."""
    config = search(num_beams=4, stop_strings=LETTERS, stop_token_ids=set())
    result = pipe.generate([prompt(3)], [config])[0]
    assert GenerationFinishReason.STOP in result.finish_reasons
    letters = {token for token in range(256) if pipe.get_tokenizer().decode([token]) in LETTERS}
    assert not letters & {token for ids in result.m_generation_ids for token in ids}
    config = search(num_beams=4, stop_token_ids=MANY_ENDS, min_new_tokens=8)
    assert all(len(ids) > 8 for ids in pipe.generate([prompt(3)], [config])[0].m_generation_ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1.0}, "num_beams must be divisible by"),
        ({"num_beams": 4, "num_beam_groups": 0}, "num_beam_groups must be at least 1"),
        ({"num_beams": 4, "num_beam_groups": 2}, "diversity_penalty must be other than 0"),
        ({"num_beams": 4, "diversity_penalty": 1.0}, "diversity_penalty must be 0"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences must be at most num_beams=2, got 3"),
        ({"num_beams": 2, "do_sample": True}, "do_sample must be False"),
        ({"num_beams": 2, "repetition_penalty": 1.2}, "repetition_penalty must be 1.0"),
        ({"num_beams": 2, "presence_penalty": 1.2}, "presence_penalty must be 0.0"),
        ({"num_beams": 2, "frequency_penalty": 1.2}, "frequency_penalty must be 0.0"),
        ({"num_beams": 2, "no_repeat_ngram_size": 0}, "no_repeat_ngram_size must be at least 1"),
        ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty must be a finite number"),
        ({"num_beams": 1000}, "num_beams must be at most max_num_seqs"),
    ],
)
def test_bad_combinations_are_refused_by_field(
    pipe: ContinuousBatchingPipeline, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        pipe.add_request(0, prompt(1), GenerationConfig(max_new_tokens=4, **options))


# -- parts -------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 20000), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_top_tokens_are_those_of_a_sort(size: int, count: int, seed: int) -> None:
    logits = np.random.default_rng(seed).integers(-30, 30, size).astype(np.float32)  # with ties
    logits[1::3] = -np.inf
    logprobs = log_probabilities(logits)
    assert abs(np.exp(logprobs.astype(np.float64)).sum() - 1) < 1e-5
    order = [int(t) for t in np.argsort(-logprobs, kind="stable")[:count] if logprobs[t] > -np.inf]
    assert [token for token, _ in top_tokens(logprobs, count)] == order


def test_logits_without_a_finite_maximum_are_an_error() -> None:
    for bad in (np.full(4, np.nan, np.float32), np.full(4, -np.inf, np.float32)):
        with pytest.raises(FloatingPointError, match="finite maximum"):
            log_probabilities(bad)


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5))
def test_repeated_ngrams_are_those_that_would_stand_twice(ids: list[int], size: int) -> None:
    def grams(text: list[int]) -> list[tuple[int, ...]]:
        return [tuple(text[i : i + size]) for i in range(len(text) - size + 1)]

    banned = set(repeated_ngrams(np.array(ids, np.int64), size).tolist())
    if len(ids) >= max(size, 2):
        assert banned == {t for t in range(4) if grams([*ids, t])[-1] in grams(ids)}


def test_stop_string_tracker_copies_go_their_own_ways() -> None:
    tracker = StopStringTracker(("ab",), lambda ids: "".join(map(chr, ids)))
    tracker.add(ord("a"))
    twin = tracker.copy()
    assert twin.add(ord("b"))
    assert not tracker.add(ord("c"))
    assert (twin.text, tracker.text) == ("ab", "ac")
