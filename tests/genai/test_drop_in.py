"""What openvino_genai's users call gives the same here: both in one process, on the same tiny model, in f32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino_genai as stock
import pytest
from both_libraries import BOTH, PROMPT, Pipes

import ov_kvcrush as ours
from ov_kvcrush.core.perf_metrics import PerfMetrics

# -- figures -----------------------------------------------------------------------------------------------------------


def of_raw(metrics: Any) -> dict[str, tuple[float, float]]:
    """What openvino_genai's statistics are, computed from its raw metrics."""
    raw = metrics.raw_metrics
    lists = {
        "get_tpot": raw.m_durations,
        "get_ttft": raw.m_times_to_first_token,
        "get_ipot": raw.token_infer_durations,
        "get_inference_duration": raw.inference_durations,
        "get_sampling_duration": raw.sampling_durations,
        "get_generate_duration": raw.generate_durations,
    }
    found = {name: (float(np.mean(us)) / 1e3, float(np.std(us)) / 1e3) for name, us in lists.items()}
    mean, std = found["get_tpot"]
    return {**found, "get_throughput": (1000 / mean, 1000 * std / mean**2)}


@pytest.mark.parametrize("lib", BOTH)
def test_statistics_are_those_of_the_raw_metrics(llm: Pipes, lib: Any) -> None:
    metrics = llm[lib].generate(["a"] * 3 + ["bcdef"], max_new_tokens=5, ignore_eos=True).perf_metrics
    raw = metrics.raw_metrics
    for name, (mean, std) in of_raw(metrics).items():
        found = getattr(metrics, name)()
        assert (found.mean, found.std) == pytest.approx((mean, std), rel=1e-3, abs=1e-3), name
    assert sum(raw.m_batch_sizes) == metrics.get_num_generated_tokens() == 20
    assert len(raw.m_durations) == 20 - raw.m_batch_sizes[0]
    moments = raw.m_new_token_times
    steps = [1e3 * (b - a) / n for a, b, n in zip(moments, moments[1:], raw.m_batch_sizes[1:], strict=False)]
    expected = [step for step, n in zip(steps, raw.m_batch_sizes[1:], strict=True) for _ in range(n)]
    assert raw.m_durations == pytest.approx(expected, rel=1e-3, abs=1)
    assert len(raw.m_times_to_first_token) == len(raw.generate_durations) == len(raw.inference_durations) == 1


@pytest.mark.parametrize("lib", BOTH)
def test_metrics_of_calls_add_up(llm: Pipes, lib: Any) -> None:
    first = llm[lib].generate(PROMPT, max_new_tokens=5, ignore_eos=True).perf_metrics
    second = llm[lib].generate(PROMPT, max_new_tokens=4, ignore_eos=True).perf_metrics
    both = first + second
    assert (both.get_num_generated_tokens(), both.get_num_input_tokens()) == (9, 40)
    assert both.get_load_time() == first.get_load_time()
    assert both.raw_metrics.m_batch_sizes == [1] * 9
    assert both.raw_metrics.m_durations == first.raw_metrics.m_durations + second.raw_metrics.m_durations
    mean, std = of_raw(both)["get_tpot"]
    assert (both.get_tpot().mean, both.get_tpot().std) == pytest.approx((mean, std), rel=1e-3, abs=1e-3)
    first += second
    assert first.get_num_generated_tokens() == 9


def test_metrics_of_different_pipelines_do_not_add_up() -> None:
    with pytest.raises(RuntimeError, match="same pipeline"):
        PerfMetrics(1.0) + PerfMetrics(2.0)


@pytest.mark.parametrize("make", [stock.PerfMetrics, PerfMetrics])
def test_metrics_of_nothing(make: Any) -> None:
    found = make()
    assert (found.get_tpot().mean, found.get_throughput().mean, found.get_throughput().std) == (-1, -1000, -1000)
    assert (found.get_grammar_compile_time().mean, found.get_grammar_compiler_init_times()) == (-1, {})


@pytest.mark.parametrize("lib", BOTH)
def test_a_handle_tells_its_metrics(batching: Pipes, lib: Any) -> None:
    handle = batching[lib].add_request(0, PROMPT, stock.GenerationConfig(max_new_tokens=3, ignore_eos=True))
    while batching[lib].has_non_finished_requests():
        batching[lib].step()
    metrics = handle.get_perf_metrics()
    assert (metrics.get_num_generated_tokens(), metrics.get_num_input_tokens()) == (3, 20)
    assert metrics.raw_metrics.m_batch_sizes == [1, 1, 1]


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 3},
        {"temperature": 0.7, "top_p": 0.6},
        {"temperature": 0.7, "min_p": 0.2},
        {"temperature": 1.0, "top_k": 5, "top_p": 0.7},
        {"temperature": 0.7, "top_p": 0.6, "logprobs": 1},
        {"temperature": 0.7, "top_k": 1},
    ],
)
def test_scores_of_sampled_sequences(llm: Pipes, options: dict[str, Any]) -> None:
    scores: Pipes = {lib: {} for lib in BOTH}
    for lib in BOTH:
        for seed in range(8):
            config = stock.GenerationConfig(
                max_new_tokens=1, ignore_eos=True, do_sample=True, rng_seed=seed, num_return_sequences=4, **options
            )
            found = llm[lib].generate(PROMPT, config)
            scores[lib] |= {tokens[0]: score for tokens, score in zip(found.tokens, found.scores, strict=True)}
    common = scores[stock].keys() & scores[ours].keys()
    assert common
    for token in common:
        assert scores[ours][token] == pytest.approx(scores[stock][token], abs=1e-4)


def test_read_all_hands_out_each_token_once(batching: Pipes) -> None:
    def run(lib: Any) -> list[Any]:
        config = stock.GenerationConfig(max_new_tokens=4, ignore_eos=True, logprobs=1)
        handle = batching[lib].add_request(0, PROMPT, config)
        batching[lib].step()
        found = [handle.read()[0].generated_ids]
        while batching[lib].has_non_finished_requests():
            batching[lib].step()
        (rest,) = handle.read_all()
        assert rest.score == pytest.approx(-6.1857, abs=1e-3)
        return [*found, rest.generated_ids, len(rest.generated_log_probs), handle.read_all(), handle.can_read()]

    assert run(ours) == run(stock)


def test_read_all_waits_for_the_end(batching: Pipes) -> None:
    handle = batching[ours].add_request(0, PROMPT, stock.GenerationConfig(max_new_tokens=4, ignore_eos=True))
    (answer,) = handle.read_all()
    assert (len(answer.generated_ids), answer.finish_reason.name) == (4, "LENGTH")
    assert handle.outputs() == [answer]


@pytest.mark.parametrize("status", ["CANCEL", "STOP"])
def test_finish_reason_of_a_streamer_that_ends_it(llm: Pipes, status: str) -> None:
    def run(lib: Any) -> list[str]:
        told = getattr(stock.StreamingStatus, status)
        found = llm[lib].generate(PROMPT, max_new_tokens=30, ignore_eos=True, streamer=lambda _: told)
        return [reason.name for reason in found.finish_reasons]

    assert run(ours) == run(stock) == [{"CANCEL": "NONE", "STOP": "STOP"}[status]]


def test_finish_reason_of_a_cancelled_handle(batching: Pipes) -> None:
    for lib in BOTH:
        handle = batching[lib].add_request(0, PROMPT, stock.GenerationConfig(max_new_tokens=9, ignore_eos=True))
        for _ in range(3):
            batching[lib].step()
        handle.cancel()
        batching[lib].step()
        assert [output.finish_reason.name for output in handle.read_all()] == ["NONE"]


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lib", BOTH)
def test_errors_are_runtime_errors(llm: Pipes, lib: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="model"):
        lib.LLMPipeline(tmp_path / "none", "CPU")
    with pytest.raises(RuntimeError, match="max_new_tokens"):
        llm[lib].generate(PROMPT, max_new_tokens=0)
    assert issubclass(ours.CrushError, ValueError)
