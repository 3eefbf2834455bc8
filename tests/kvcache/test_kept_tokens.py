"""What a caller is told of the tokens that a policy left in the cache, and of the time that took."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import pytest

from ov_kvcrush import ContinuousBatchingPipeline, LLMPipeline
from ov_kvcrush.policies.registry import build

# Which tokens these are is known: the first 4 and the last 60 of the prompt, and then the whole answer.
POLICY = build("streaming_llm", kept_tokens=64, min_tokens=64)
LENGTH, NEW = 200, 6
EXPECTED = [*range(4), *range(LENGTH - 60, LENGTH + NEW - 1)]
IDS = ov.Tensor(np.random.default_rng(0).integers(0, 1000, (1, LENGTH)))
GREEDY = {"max_new_tokens": NEW, "ignore_eos": True}


@pytest.fixture(scope="module")
def pipe(shallow: Path) -> ContinuousBatchingPipeline:
    return ContinuousBatchingPipeline(shallow, {"max_num_batched_tokens": 128})


def test_positions_and_counts_while_it_runs_and_after_its_end(pipe: ContinuousBatchingPipeline) -> None:
    handle = pipe.add_request(0, IDS, policy=POLICY, **GREEDY)
    counts = []
    while pipe.has_non_finished_requests():
        pipe.step()
        counts.append(handle.get_stats().kept_tokens)
    # Two chunks of the prompt, of which the second one also gives the first token; the last token is never run.
    assert counts == [128, *range(64, 64 + NEW)]
    assert handle.kept_positions is not None
    assert {tuple(head.tolist()) for layer in handle.kept_positions for head in layer} == {tuple(EXPECTED)}
    assert handle.representative_positions is None


def test_representatives_are_among_the_kept(pipe: ContinuousBatchingPipeline) -> None:
    handle = pipe.add_request(0, IDS, policy=build("kvcrush", kept_tokens=64, share=0.25), **GREEDY)
    while pipe.has_non_finished_requests():
        pipe.step()
    assert handle.kept_positions is not None
    assert handle.representative_positions is not None
    for kept, representatives in zip(handle.kept_positions, handle.representative_positions, strict=True):
        for some, few in zip(kept, representatives, strict=True):
            assert len(some) == 64 + NEW - 1
            assert len(few) == 16
            assert np.isin(few, some).all()


def test_time_of_a_policy_is_told_in_the_step_that_had_one(pipe: ContinuousBatchingPipeline) -> None:
    held = pipe.add_request(0, IDS, policy=POLICY, **GREEDY)
    chose = []
    while pipe.has_non_finished_requests():
        pipe.step()
        step = pipe.get_last_step()
        chose.append(step.policy > 0)
        assert 0 <= step.policy <= step.overhead
    assert chose == [False, True, *[False] * (NEW - 1)]
    assert len(held.outputs()[0].generated_ids) == NEW


def test_results_of_prompts_tell_what_each_kept(shallow: Path) -> None:
    pipe = LLMPipeline(shallow)
    results = pipe.generate(ov.Tensor(np.repeat(IDS.data, 2, axis=0)), policy=POLICY, **GREEDY)
    assert len(results.kept) == 2
    for kept in results.kept:
        assert kept is not None
        assert kept.ids.tolist() == IDS.data[0].tolist()
        assert kept.positions[0][0].tolist() == EXPECTED
    assert results.perf_metrics.kept_tokens == 2 * len(EXPECTED)
    whole = pipe.generate(IDS, **GREEDY)
    assert whole.kept == [None]
    assert whole.perf_metrics.kept_tokens == LENGTH + NEW - 1
