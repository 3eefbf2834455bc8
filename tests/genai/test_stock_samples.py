"""What openvino_genai's samples, llm_bench and whowhatbench call, with the import changed."""

from __future__ import annotations

import json
import queue
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.properties.hint as hints
import openvino_genai as stock
import pytest
from both_libraries import BOTH, EXACT, Pipes

import ov_kvcrush as ours

QUESTIONS = ("Name three rivers.", "And three lakes?", "Which one is the longest of them all?")
WEATHER = {"type": "object", "properties": {"warm": {"type": "boolean"}}, "required": ["warm"]}
CITY = {"type": "object", "properties": {"city": {"enum": ["Bonn", "Ulm"]}}, "required": ["city"]}


def test_chat_sample(llm: Pipes) -> None:
    """A history that the caller keeps, with a streamer that says RUNNING."""
    said: dict[Any, list[str]] = {}
    for lib in BOTH:
        config = lib.GenerationConfig()
        config.max_new_tokens = 12
        config.ignore_eos = True
        history = lib.ChatHistory()
        history.append({"role": "system", "content": "You are brief."})
        answers = []
        for question in QUESTIONS:
            history.append({"role": "user", "content": question})
            heard: list[str] = []

            def streamer(text: str, lib: Any = lib, heard: list[str] = heard) -> Any:
                heard.append(text)
                return lib.StreamingStatus.RUNNING

            answer = llm[lib].generate(history, config, streamer).texts[0]
            assert "".join(heard) == answer
            history.append({"role": "assistant", "content": answer})
            answers.append(answer)
        said[lib] = answers
    assert said[ours] == said[stock]


def test_greedy_sample(llm: Pipes) -> None:
    answers = {lib: llm[lib].generate(QUESTIONS[0], max_new_tokens=12, ignore_eos=True) for lib in BOTH}
    assert isinstance(answers[ours], str)
    assert answers[ours] == answers[stock]


@pytest.mark.parametrize("lib", BOTH, ids=["stock", "ours"])
def test_multinomial_sample(llm: Pipes, lib: Any) -> None:
    """A StreamerBase of the caller's whose texts another thread reads."""

    class Words(lib.StreamerBase):  # type: ignore[misc]
        def __init__(self, tokenizer: Any) -> None:
            super().__init__()
            self.tokenizer = tokenizer
            self.ids: list[int] = []
            self.words: queue.Queue[str | None] = queue.Queue()

        def write(self, token: int | list[int]) -> Any:
            self.ids += token if isinstance(token, list) else [token]
            self.words.put(self.tokenizer.decode(self.ids[-1:]))
            return lib.StreamingStatus.RUNNING

        def end(self) -> None:
            self.words.put(None)

    streamer = Words(llm[lib].get_tokenizer())
    heard: list[str] = []
    thread = threading.Thread(target=lambda: heard.extend(iter(streamer.words.get, None)))  # type: ignore[arg-type]
    thread.start()
    config = lib.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.top_p, config.top_k = 10, True, 0.9, 30
    config.ignore_eos = True
    llm[lib].generate(QUESTIONS[0], config, streamer)
    thread.join(60)
    assert not thread.is_alive()
    assert (len(streamer.ids), len(heard)) == (10, 10)


def test_beam_search_sample(llm: Pipes) -> None:
    found = {}
    for lib in BOTH:
        config = lib.GenerationConfig()
        config.max_new_tokens, config.num_beam_groups, config.num_beams = 6, 3, 6
        config.diversity_penalty, config.num_return_sequences = 1, 6
        found[lib] = llm[lib].generate(list(QUESTIONS[:2]), config)
        assert all(text in str(found[lib]) for text in found[lib].texts)
    assert found[ours].texts == found[stock].texts
    np.testing.assert_allclose(found[ours].scores, found[stock].scores, atol=1e-3)


def test_structured_output_sample(llm: Pipes) -> None:
    """One config whose schema changes between calls, and a history that is cleared."""
    pipe, config, history = llm[ours], ours.GenerationConfig(), ours.ChatHistory()
    config.max_new_tokens = 40
    for schema, keys in ((WEATHER, {"warm"}), (CITY, {"city"})):
        history.clear()
        history.append({"role": "user", "content": QUESTIONS[0]})
        config.structured_output_config = ours.StructuredOutputConfig(json_schema=json.dumps(schema))
        assert json.loads(pipe.generate(history, config).texts[0]).keys() == keys


def test_react_sample(llm: Pipes) -> None:
    """The prompt is rendered by the caller, the answer is put behind it, and the pipeline's own config is used."""
    said = {}
    for lib in BOTH:
        pipe, before = llm[lib], llm[lib].get_generation_config()
        config = lib.GenerationConfig()
        config.max_new_tokens = 8
        pipe.set_generation_config(config)
        messages = [{"role": "system", "content": "You use tools."}, {"role": "user", "content": QUESTIONS[1]}]
        text = pipe.get_tokenizer().apply_chat_template(messages, add_generation_prompt=True)
        for _ in range(2):
            text += pipe.generate(text, pipe.get_generation_config(), lambda word: None) + "\nObservation: none"
        said[lib] = text
        pipe.set_generation_config(before)
    assert said[ours] == said[stock]


def test_benchmark_genai(folder: Path) -> None:
    counts = {}
    for lib in BOTH:
        scheduler = lib.SchedulerConfig() if lib is stock else stock.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = sys.maxsize
        pipe = lib.LLMPipeline(str(folder), "CPU", scheduler_config=scheduler, **EXACT)
        config = lib.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = 5, True
        prompt = [QUESTIONS[0]]
        size = pipe.get_tokenizer().encode(prompt).input_ids.get_shape()[1]
        metrics = pipe.generate(prompt, config).perf_metrics
        metrics += pipe.generate(prompt, config).perf_metrics
        for name in ("generate_duration", "tokenization_duration", "detokenization_duration", "ttft", "tpot"):
            pair = getattr(metrics, f"get_{name}")()
            assert pair.mean >= 0, name
            assert pair.std >= 0, name
        assert metrics.get_throughput().mean > 0
        assert metrics.get_load_time() > 0
        counts[lib] = size, metrics.get_num_generated_tokens()
    assert counts[ours] == counts[stock]


def test_limit_checker(folder: Path) -> None:
    """Answers grow until the cache is used up, which ends them and shows as 100 %."""
    scheduler = stock.SchedulerConfig()
    scheduler.num_kv_blocks, scheduler.max_num_batched_tokens = 4, 128
    scheduler.dynamic_split_fuse, scheduler.max_num_seqs, scheduler.use_cache_eviction = True, 256, False
    properties = {hints.inference_precision: ov.Type.f32}
    for lib in BOTH:
        pipe = lib.ContinuousBatchingPipeline(folder, scheduler, "CPU", {}, properties)
        usages = []
        for length in (8, 400):
            config = lib.GenerationConfig()
            config.max_new_tokens, config.apply_chat_template, config.ignore_eos = length, False, True
            result = pipe.generate([QUESTIONS[0]], generation_config=[config])[0]
            assert len(result.m_generation_ids[0]) > 0
            assert 0 < pipe.get_metrics().avg_cache_usage <= 100
            usages.append(pipe.get_metrics().max_cache_usage)
        assert usages[0] < 100, lib
        assert usages[1] == pytest.approx(100), lib


def test_llm_bench(llm: Pipes) -> None:
    """Token ids of a batch whose first ones were changed, one length for all answers, and the raw metrics."""
    found = {}
    for lib in BOTH:
        pipe = llm[lib]
        tokenizer = pipe.get_tokenizer()
        encoded = tokenizer.encode([QUESTIONS[0]] * 2)
        ids = encoded.input_ids.data
        ids[:, 0] = 5
        inputs = lib.TokenizedInputs(input_ids=ov.Tensor(ids), attention_mask=encoded.attention_mask)
        config = pipe.get_generation_config()
        config.max_new_tokens, config.max_length, config.ignore_eos = 6, 2**64 - 1, True
        config.rng_seed, config.num_beams, config.do_sample, config.apply_chat_template = 42, 1, False, False
        result = pipe.generate(inputs, config)
        raw = result.perf_metrics.raw_metrics
        assert len(raw.m_new_token_times) == len(raw.token_infer_durations) == len(raw.m_batch_sizes) == 6
        assert raw.m_durations
        assert np.all(np.diff(raw.m_new_token_times) >= 0)
        usage = pipe.get_metrics() if hasattr(pipe, "get_metrics") else None
        assert usage is None or usage.max_cache_usage > 0
        found[lib] = np.array(result.tokens).tolist(), tokenizer.decode(result.tokens)
    assert found[ours] == found[stock]


def test_whowhatbench(folder: Path) -> None:
    """No adapters, a scheduler config whose fields were set by name, and options instead of a config."""
    said = {}
    for lib in BOTH:
        scheduler = stock.SchedulerConfig()
        for name, value in {"cache_size": 1, "max_num_seqs": 4}.items():
            setattr(scheduler, name, value)
        pipe = lib.LLMPipeline(folder, device="CPU", adapters=lib.AdapterConfig(), scheduler_config=scheduler, **EXACT)
        said[lib] = pipe.generate(QUESTIONS[0], do_sample=False, max_new_tokens=8, apply_chat_template=False)
    assert said[ours] == said[stock]
