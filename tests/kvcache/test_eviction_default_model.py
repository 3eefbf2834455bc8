"""Policies on layers of the default model: prompts near the budget, two sequences, long answers, repetition, chat."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as ov_genai
import pytest
from eviction_runs import F32

from ov_kvcrush import LLMPipeline

GREEDY_TWICE = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
TIGHT = {"name": "kvcrush", "kept_tokens": 32, "sink_tokens": 4, "recent_tokens": 8, "min_tokens": 32, "stride": 16}


@pytest.fixture(scope="module")
def pipe_of(shallow: Path) -> Callable[[bool], LLMPipeline]:
    """In float32: in bf16 OpenVINO multiplies two rows by other kernels than one, and near ties fall either way."""
    return cache(
        lambda prefixes: LLMPipeline(
            shallow, "CPU", F32, cache_config={"policy": TIGHT}, scheduler_config={"enable_prefix_caching": prefixes}
        )
    )


def text_of(pipe: LLMPipeline, num_tokens: int) -> np.ndarray:
    text = " ".join(f"On day {i} the {'ship' if i % 3 else 'crew'} saw {7 * i % 11} whales." for i in range(100))
    return pipe.get_tokenizer().encode(text).input_ids.data[:, :num_tokens].copy()


def answers(pipe: LLMPipeline, num_tokens: int, **options: Any) -> list[list[int]]:
    ids = text_of(pipe, num_tokens)
    assert ids.shape[1] == num_tokens
    found = pipe.generate(ov.Tensor(ids), **{"max_new_tokens": 12, "ignore_eos": True, **options}).tokens
    pipe._backend.clear_prefixes()
    assert pipe.get_metrics().kv_cache_size_in_bytes == 0
    return found


@pytest.mark.parametrize("num_tokens", range(33, 40))
def test_short_prompts_near_the_budget(num_tokens: int, pipe_of: Callable[[bool], LLMPipeline]) -> None:
    assert len(answers(pipe_of(False), num_tokens)[0]) == 12


def test_two_sequences_of_a_real_model(pipe_of: Callable[[bool], LLMPipeline]) -> None:
    pipe = pipe_of(False)
    assert answers(pipe, 100, **GREEDY_TWICE) == 2 * answers(pipe, 100)


def test_prompt_of_600_tokens(pipe_of: Callable[[bool], LLMPipeline]) -> None:
    pipe = pipe_of(False)
    default = answers(pipe, 600, policy="kvcrush")
    assert len(default[0]) == 12
    assert default != answers(pipe, 600, policy={**TIGHT, "name": "random"})


def test_long_answer_from_a_short_prompt_is_really_evicted_from(pipe_of: Callable[[bool], LLMPipeline]) -> None:
    pipe = pipe_of(False)
    whole = answers(pipe, 20, max_new_tokens=100, policy="none")
    crushed = answers(pipe, 20, max_new_tokens=100)
    assert whole[0][:12] == crushed[0][:12], "nothing has gone yet"
    assert whole != crushed


def test_budget_above_the_text_changes_nothing(pipe_of: Callable[[bool], LLMPipeline]) -> None:
    pipe = pipe_of(False)
    plain = answers(pipe, 200, policy="none")
    for policy in (
        {"name": "kvcrush", "kept": 1.0},
        {"name": "kvcrush", "kept_tokens": 300},
        {"name": "h2o", "min_tokens": 300},
    ):
        assert answers(pipe, 200, policy=policy) == plain


@pytest.mark.parametrize("prefixes", [False, True])
def test_same_request_twice_gives_the_same_answer(prefixes: bool, pipe_of: Callable[[bool], LLMPipeline]) -> None:
    pipe = pipe_of(prefixes)
    ids = ov.Tensor(text_of(pipe, 150))
    first, second, third = (pipe.generate(ids, max_new_tokens=40, ignore_eos=True).tokens for _ in range(3))
    assert first == second == third
    pipe._backend.clear_prefixes()


def test_chat_goes_on_from_its_crushed_history(pipe_of: Callable[[bool], LLMPipeline]) -> None:
    """No turn reads again what an earlier one has read; the system prompt stays; what is left is within the budget."""
    pipe = pipe_of(False)
    memory: Any = pipe._backend.cache  # type: ignore[attr-defined]
    history = ov_genai.ChatHistory()
    history.append({"role": "system", "content": "You answer in one short sentence."})
    known = 0
    for question in ("What is the capital of France?", "What is it known for?", "Which river runs through it?"):
        history.append({"role": "user", "content": question})
        results = pipe.generate(history, max_new_tokens=40)
        metrics = results.perf_metrics
        assert metrics.num_reused_tokens == known
        known = metrics.num_input_tokens + metrics.num_generated_tokens - 1
        history.append({"role": "assistant", "content": results.texts[0]})
        kept = memory.prefixes.kept()[0]
        assert 32 <= kept.num_tokens - kept.state.num_evicted <= 32 + 16
        assert set(range(3, 10)) <= set(memory.store.positions(kept.store_id, 0, 0)), "the system prompt's words"
    assert known > 3 * 32
    pipe.finish_chat()
