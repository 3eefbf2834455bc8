"""`extended_perf_metrics`: what model and draft model took, as openvino_genai tells it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino_genai as stock
import pytest
from both_libraries import BOTH, EXACT, PROMPT, Pipes

import ov_kvcrush as ours

NEW = 24
ASKED = {"max_new_tokens": NEW, "ignore_eos": True, "num_assistant_tokens": 3}


@pytest.fixture(scope="module")
def drafted(folder: Path) -> Pipes:
    """The model as its own draft: it guesses right."""
    return {
        lib: lib.LLMPipeline(folder, "CPU", draft_model=lib.draft_model(folder, "CPU", **EXACT), **EXACT)
        for lib in BOTH
    }


def of_steps(metrics: Any) -> dict[str, tuple[float, float]]:
    """What openvino_genai's statistics are, computed from the steps."""
    raw = metrics.raw_metrics
    us, sizes = np.array(raw.m_durations), np.array(raw.m_batch_sizes)
    lists = {
        "get_ttft": us[:1],
        "get_ttst": us[1:2],
        "get_latency": us[2:],
        "get_tpot": us[2:] / sizes[2 : len(us)],
        "get_generate_duration": us.sum(keepdims=True),
        "get_inference_duration": raw.inference_durations,
    }
    return {name: (float(np.mean(x)) / 1e3, float(np.std(x)) / 1e3) for name, x in lists.items()}


@pytest.mark.parametrize("lib", BOTH, ids=["stock", "ours"])
def test_metrics_of_both_models(drafted: Pipes, lib: Any) -> None:
    result = drafted[lib].generate(PROMPT, **ASKED)
    both = result.extended_perf_metrics
    for metrics in (both.main_model_metrics, both.draft_model_metrics):
        for name, expected in of_steps(metrics).items():
            found = getattr(metrics, name)()
            assert (found.mean, found.std) == pytest.approx(expected, rel=1e-3, abs=2e-3), name
        assert metrics.get_num_generated_tokens() == sum(metrics.raw_metrics.m_batch_sizes)
    main = both.main_model_metrics
    assert main.get_num_generated_tokens() == both.get_num_generated_tokens() == NEW
    assert 0 < len(main.raw_metrics.m_durations) < NEW
    # A step gives one token more than were right; the prompt's gives one. openvino_genai counts fewer at the end.
    num_more = sum(size - 1 for size in main.raw_metrics.m_batch_sizes)
    assert 0 < both.get_num_accepted_tokens() <= num_more
    assert lib is stock or both.get_num_accepted_tokens() == num_more
    assert both.draft_model_metrics.get_num_generated_tokens() >= both.get_num_accepted_tokens()
    assert both.get_num_input_tokens() == result.perf_metrics.get_num_input_tokens() == 20


def test_the_same_answer_and_members(drafted: Pipes) -> None:
    found = {lib: drafted[lib].generate(PROMPT, **ASKED) for lib in BOTH}
    assert found[ours].tokens == found[stock].tokens
    names = [name for name in dir(found[stock].extended_perf_metrics) if name.startswith("get_")]
    both = found[ours].extended_perf_metrics
    assert [name for name in names if not hasattr(both, name)] == []
    assert both.get_num_draft_tokens() == both.get_num_accepted_tokens() + both.get_num_rejected_tokens()
    assert 0 < both.get_draft_acceptance_rate() <= 1
    assert both.get_draft_processed_to_candidate_ratio() > 0
    assert both.get_draft_to_main_inference_duration_ratio() > 0
    metrics = found[ours].perf_metrics
    assert metrics.num_accepted_tokens == both.get_num_accepted_tokens()


@pytest.mark.parametrize("lib", BOTH, ids=["stock", "ours"])
def test_metrics_of_calls_add_up(drafted: Pipes, lib: Any) -> None:
    first, second = (drafted[lib].generate(PROMPT, **ASKED).extended_perf_metrics for _ in range(2))
    both = first + second
    assert both.get_num_accepted_tokens() == first.get_num_accepted_tokens() + second.get_num_accepted_tokens()


@pytest.mark.parametrize("lib", BOTH, ids=["stock", "ours"])
def test_none_without_a_draft_model(llm: Pipes, folder: Path, lib: Any) -> None:
    assert llm[lib].generate(PROMPT, max_new_tokens=2).extended_perf_metrics is None
    lookup = lib.LLMPipeline(folder, "CPU", prompt_lookup=True, **EXACT)
    assert lookup.generate(PROMPT, **ASKED, max_ngram_size=3).extended_perf_metrics is None


def test_of_requests_that_run_together(folder: Path) -> None:
    pipe = ours.ContinuousBatchingPipeline(folder, device="CPU", draft_model=ours.draft_model(folder), properties=EXACT)
    configs = [ours.GenerationConfig(**ASKED)] * 2
    results = pipe.generate([PROMPT, PROMPT], configs)
    both = results[0].extended_perf_metrics
    assert both is results[1].extended_perf_metrics
    assert both.main_model_metrics.get_num_generated_tokens() == 2 * NEW
    assert 0 < both.get_num_accepted_tokens() <= both.get_num_draft_tokens()
    text = pipe.generate("ab", ours.GenerationConfig(**ASKED))[0]
    assert text.extended_perf_metrics.get_num_accepted_tokens() >= 0
