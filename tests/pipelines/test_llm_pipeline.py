"""LLMPipeline on a real model: what goes in, what comes out, chats, streams, and what is left behind."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as ov_genai
import pytest
from covering import rarely
from many_users import resident_bytes

from ov_kvcrush import (
    ChatHistory,
    ContinuousBatchingPipeline,
    DecodedResults,
    EncodedResults,
    GenerationConfig,
    GenerationFinishReason,
    GenerationStatus,
    LLMPipeline,
    RequestError,
    SchedulerConfig,
    StreamerBase,
    StreamingStatus,
    TextStreamer,
)
from ov_kvcrush.model.plugin import capped_properties

QUESTION = "What is the capital of France? Answer in one sentence."
F32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


@pytest.fixture(scope="module")
def pipe(shallow: Path) -> LLMPipeline:
    return LLMPipeline(shallow)


@pytest.fixture(params=["crush", "genai"], scope="module")
def any_pipe(request: pytest.FixtureRequest, shallow: Path) -> LLMPipeline:
    return LLMPipeline(shallow, engine=request.param, **F32)


@pytest.fixture(scope="module")
def whole() -> LLMPipeline:
    """The default model with all its layers, where answers must make sense and end."""
    return LLMPipeline()


@pytest.fixture(autouse=True)
def nothing_left(pipe: LLMPipeline) -> Iterator[None]:
    yield
    pipe.finish_chat()
    assert pipe.get_metrics().num_used_blocks == 0
    assert pipe.get_metrics().requests == 0


# -- in and out ------------------------------------------------------------------------------------------------------


def test_default_model_answers_with_paris(whole: LLMPipeline) -> None:
    assert whole.engine == "crush"
    assert "Paris" in whole(QUESTION, max_new_tokens=40)


def test_every_kind_of_input_gives_the_same_answer(any_pipe: LLMPipeline) -> None:
    text = any_pipe.generate(QUESTION, max_new_tokens=20)
    assert isinstance(text, str)
    decoded = any_pipe.generate([QUESTION, "Hi"], max_new_tokens=20)
    assert isinstance(decoded, DecodedResults)
    assert decoded.texts[0] == text
    assert len(decoded.scores) == len(decoded.finish_reasons) == 2
    history = ChatHistory([{"role": "user", "content": QUESTION}])
    assert any_pipe.generate(history, max_new_tokens=20).texts == [text]
    tokenizer = any_pipe.get_tokenizer()
    rendered = tokenizer.apply_chat_template(history, add_generation_prompt=True)
    tokens = tokenizer.encode(rendered, add_special_tokens=False)
    for ids in (tokens, tokens.input_ids):
        encoded = any_pipe.generate(ids, GenerationConfig(max_new_tokens=20))
        assert isinstance(encoded, EncodedResults)
        assert tokenizer.decode(encoded.tokens[0]) == text
    assert any_pipe.generate(rendered, max_new_tokens=20, apply_chat_template=False) == text


def test_padding_is_not_part_of_a_prompt(shallow: Path) -> None:
    pipe = LLMPipeline(shallow, **F32)
    tokenizer = pipe.get_tokenizer()
    both = tokenizer.encode(["one two three four five six", "one"])
    results = pipe.generate(both, max_new_tokens=8, ignore_eos=True)
    alone = pipe.generate(tokenizer.encode("one"), max_new_tokens=8, ignore_eos=True)
    assert results.tokens[1] == alone.tokens[0]


def test_metrics_count_tokens(any_pipe: LLMPipeline) -> None:
    results = any_pipe.generate([QUESTION], max_new_tokens=9, ignore_eos=True)
    metrics = results.perf_metrics
    assert metrics.get_num_generated_tokens() == 9
    assert metrics.get_num_input_tokens() > 10
    assert metrics.kv_bytes > 0
    assert 0 < metrics.get_ttft().mean <= metrics.get_generate_duration().mean
    assert metrics.get_tpot().mean > 0
    assert metrics.get_throughput().mean > 0


def test_echo_and_several_sequences(pipe: LLMPipeline) -> None:
    results = pipe.generate(
        ["Tell me a story."],
        do_sample=True,
        temperature=1.2,
        num_return_sequences=3,
        max_new_tokens=12,
        echo=True,
        logprobs=1,
    )
    assert len(results.texts) == 3
    assert len(set(results.texts)) == 3
    assert all("Tell me a story." in text for text in results.texts)
    assert all(score < 0 for score in results.scores)
    assert results.finish_reasons == [GenerationFinishReason.LENGTH] * 3


def test_each_sequence_equals_a_request_with_the_same_draws(shallow: Path) -> None:
    pipe = LLMPipeline(shallow, **F32)
    options = {"do_sample": True, "temperature": 0.8, "rng_seed": 3, "max_new_tokens": 20}
    one = pipe.generate(["Tell me a story."], **options).texts
    three = pipe.generate(["Tell me a story."], num_return_sequences=3, **options).texts
    assert three[0] == one[0]


def test_min_and_max_new_tokens_and_ends(whole: LLMPipeline) -> None:
    pipe = whole
    tokenizer = pipe.get_tokenizer()
    ids = tokenizer.encode("What is 2+2?")
    ended = pipe.generate(ids, max_new_tokens=20)
    assert ended.finish_reasons == [GenerationFinishReason.STOP]
    first = len(ended.tokens[0])
    longer = pipe.generate(ids, max_new_tokens=20, min_new_tokens=first + 3)
    assert len(longer.tokens[0]) >= first + 3
    ignored = pipe.generate(ids, max_new_tokens=20, ignore_eos=True)
    assert len(ignored.tokens[0]) == 20
    assert ignored.finish_reasons == [GenerationFinishReason.LENGTH]
    stopped = pipe.generate(ids, max_new_tokens=20, ignore_eos=True, stop_token_ids={ignored.tokens[0][7]})
    assert stopped.tokens[0] == ignored.tokens[0][: ignored.tokens[0].index(ignored.tokens[0][7]) + 1]


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_cuts_text_and_stream_alike(pipe: LLMPipeline, include: bool) -> None:
    whole = pipe.generate(QUESTION, max_new_tokens=30, ignore_eos=True)
    stop = whole[12:19]  # begins and ends inside tokens
    end = whole.index(stop) + (len(stop) if include else 0)
    streamed: list[str] = []
    text = pipe.generate(
        QUESTION, max_new_tokens=30, ignore_eos=True, stop_strings={stop}, include_stop_str_in_output=include,
        streamer=streamed.append,
    )  # fmt: skip
    assert text == whole[:end]
    assert "".join(streamed) == text


def test_logprobs_are_openvino_genais(tiny_ir: Callable[[str], Path]) -> None:
    folder = tiny_ir("llama")
    stock = ov_genai.LLMPipeline(str(folder), "CPU", **{**capped_properties(), **F32})
    ids = stock.get_tokenizer().encode(QUESTION).input_ids
    config = GenerationConfig(max_new_tokens=8, ignore_eos=True, logprobs=1)
    expected = stock.generate(ids, config)
    del stock
    ours = LLMPipeline(folder, **F32).generate(ids, config)
    assert ours.tokens == expected.tokens
    np.testing.assert_allclose(ours.scores, expected.scores, atol=1e-3)


def test_properties_reach_the_compiler(shallow: Path) -> None:
    """With OpenVINO's own blocks; what the store makes of them is in test_crush_engine.py."""
    paged = {"attention": "paged"}
    half = {"KV_CACHE_PRECISION": "f16", "INFERENCE_PRECISION_HINT": "f32"}  # on any processor
    all_properties: dict[str, dict[str, str]] = {"u8": {"KV_CACHE_PRECISION": "u8"}, "f16": half, "f32": F32}
    used = {
        precision: LLMPipeline(shallow, cache_config=paged, **properties)
        .generate(["Hi"], max_new_tokens=2)
        .perf_metrics.kv_bytes
        for precision, properties in all_properties.items()
    }
    # 6 layers, 3 KV heads of 64; a block of 32 tokens; keys and values. u8 adds scales and zero points.
    per_token = {p: n / (n_blocks(p, used) * 32) for p, n in used.items()}
    assert per_token["f32"] == 6 * 3 * 64 * 2 * 4
    assert per_token["f16"] == 6 * 3 * 64 * 2 * 2
    assert 1 < per_token["u8"] / (6 * 3 * 64 * 2) < 1.3


def n_blocks(precision: str, used: dict[str, int]) -> int:
    """Blocks of the prompt of 31 tokens and its answer: the same for all precisions."""
    return round(used["f32"] / (6 * 3 * 64 * 2 * 4 * 32))


# -- streams ---------------------------------------------------------------------------------------------------------


class Collector(StreamerBase):
    def __init__(self, limit: int = 10**9, status: StreamingStatus = StreamingStatus.STOP) -> None:
        super().__init__()
        self.tokens: list[int] = []
        self.ended = 0
        self.limit, self.status = limit, status

    def write(self, token: int) -> StreamingStatus:
        self.tokens.append(token)
        return self.status if len(self.tokens) >= self.limit else StreamingStatus.RUNNING

    def end(self) -> None:
        self.ended += 1


def test_streams_equal_the_answer(any_pipe: LLMPipeline) -> None:
    pieces: list[str] = []
    text = any_pipe.generate(QUESTION, max_new_tokens=25, streamer=pieces.append)
    assert "".join(pieces) == text
    assert len(pieces) > 3
    collector = Collector()
    assert any_pipe.generate(QUESTION, max_new_tokens=25, streamer=collector) == text
    assert any_pipe.get_tokenizer().decode(collector.tokens) == text
    assert collector.ended == 1
    again: list[str] = []
    any_pipe.generate(
        QUESTION, max_new_tokens=25, streamer=TextStreamer(any_pipe.get_tokenizer(), lambda s: bool(again.append(s)))
    )
    assert "".join(again) == text


def test_stream_never_shows_half_a_character(pipe: LLMPipeline) -> None:
    """The tokens of emoji come in several pieces each; a stream of them shows whole characters only."""
    tokenizer = pipe.get_tokenizer()
    text = "🦊 naïve 😀 日本"
    ids = tokenizer.encode(text).input_ids.data[0].tolist()
    assert any(tokenizer.decode([token]) == "" for token in ids), "some token must be a part of a character"

    pieces: list[str] = []
    sink = TextStreamer(tokenizer, lambda s: bool(pieces.append(s)))
    for token in ids:
        sink.write(token)
    sink.end()
    assert "".join(pieces) == text
    assert not any("\ufffd" in p for p in pieces)


@pytest.mark.parametrize("answer", [True, StreamingStatus.STOP, StreamingStatus.CANCEL])
def test_a_streamer_stops_its_request(any_pipe: LLMPipeline, answer: object) -> None:
    pieces: list[str] = []

    def three(piece: str) -> object:
        pieces.append(piece)
        return answer if len(pieces) == 3 else None

    text = any_pipe.generate(QUESTION, max_new_tokens=200, ignore_eos=True, streamer=three)
    assert text.startswith("".join(pieces[:3]))
    assert len(text) < 80


def test_an_exception_in_a_streamer_reaches_the_caller_and_harms_nobody(shallow: Path) -> None:
    pipe = ContinuousBatchingPipeline(shallow, properties=F32)
    config = GenerationConfig(max_new_tokens=12, ignore_eos=True)
    expected = pipe.generate(["Count to ten."], config)[0].m_generation_ids
    tokenizer = pipe.get_tokenizer()
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Count to ten."}], add_generation_prompt=True)
    bystander = pipe.add_request(5, tokenizer.encode(prompt, add_special_tokens=False).input_ids, config)

    def broken(piece: str) -> None:
        raise KeyError(piece)

    with pytest.raises(KeyError):
        pipe.generate("Hello", config, broken)
    assert bystander.get_status() == GenerationStatus.RUNNING
    while pipe.has_non_finished_requests():
        pipe.step()
    assert [tokenizer.decode(bystander.outputs()[0].generated_ids)] == expected
    assert pipe.get_metrics().num_used_blocks == 0


def test_stop_from_another_thread(pipe: LLMPipeline) -> None:
    started = threading.Event()
    done: list[str] = []
    worker = threading.Thread(
        target=lambda: done.append(
            pipe.generate(QUESTION, max_new_tokens=4000, ignore_eos=True, streamer=lambda s: started.set())
        )
    )
    worker.start()
    assert started.wait(60)
    pipe.stop()
    worker.join(60)
    assert not worker.is_alive()
    assert 0 < len(done[0]) < 8000


# -- chat ------------------------------------------------------------------------------------------------------------


def test_second_turn_prefills_only_what_is_new(pipe: LLMPipeline) -> None:
    history = ChatHistory([{"role": "user", "content": "Name three colours."}])
    first = pipe.generate(history, max_new_tokens=30)
    history.append({"role": "assistant", "content": first.texts[0]})
    history.append({"role": "user", "content": "And three animals."})
    second = pipe.generate(history, max_new_tokens=5)
    # All tokens of the first turn have KV but the last one generated, whose turn to be run never came.
    had = first.perf_metrics.get_num_input_tokens() + first.perf_metrics.get_num_generated_tokens() - 1
    assert second.perf_metrics.num_reused_tokens == had
    new_text = "\nuser And three animals.\nassistant\n"
    new = second.perf_metrics.get_num_input_tokens() - had
    assert new <= len(pipe.get_tokenizer().encode(new_text).input_ids.data[0]) + 8


def test_chat_equals_computing_everything_again(shallow: Path) -> None:
    questions = ["My name is Ada. Who are you?", "What is my name?", "Write one line about rivers."]
    pipe = LLMPipeline(shallow, **F32)
    pipe.start_chat("You are brief.")
    answers = [pipe.generate(q, max_new_tokens=24) for q in questions]
    assert pipe.get_metrics().num_used_blocks > 0
    pipe.finish_chat()
    assert pipe.get_metrics().num_used_blocks == 0

    history = ChatHistory([{"role": "system", "content": "You are brief."}])
    for question, answer in zip(questions, answers, strict=True):
        history.append({"role": "user", "content": question})
        pipe.finish_chat()  # nothing to reuse
        result = pipe.generate(history, max_new_tokens=24)
        assert result.perf_metrics.num_reused_tokens == 0
        assert result.texts[0] == answer
        history.append({"role": "assistant", "content": answer})


def test_a_failed_or_cancelled_turn_leaves_the_chat_as_it_was(shallow: Path) -> None:
    pipe = LLMPipeline(shallow, **F32)
    pipe.start_chat()
    pipe.generate("My name is Ada.", max_new_tokens=16)
    with pytest.raises(RequestError):
        pipe.generate("\ud800")
    with pytest.raises(ZeroDivisionError):
        pipe.generate("Who?", max_new_tokens=9, streamer=lambda s: 1 / 0)
    pipe.generate("What?", max_new_tokens=9, streamer=lambda s: StreamingStatus.CANCEL)
    after = pipe.generate("What is my name?", max_new_tokens=16)
    pipe.finish_chat()
    pipe.start_chat()
    pipe.generate("My name is Ada.", max_new_tokens=16)
    assert pipe.generate("What is my name?", max_new_tokens=16) == after


def test_prefix_caching_reuses_prompts_exactly(shallow: Path) -> None:
    """It is on where nobody gives a scheduler config, as in openvino_genai."""
    pipe = LLMPipeline(shallow, **F32)
    first = pipe.generate([QUESTION], max_new_tokens=16)
    again = pipe.generate([QUESTION], max_new_tokens=16)
    assert again.texts == first.texts
    assert again.perf_metrics.num_reused_tokens == first.perf_metrics.get_num_input_tokens() - 1
    off = LLMPipeline(shallow, scheduler_config=SchedulerConfig(), **F32)
    for _ in range(2):
        fresh = off.generate([QUESTION], max_new_tokens=16)
        assert (fresh.texts, fresh.perf_metrics.num_reused_tokens) == (first.texts, 0)
    assert off.get_metrics().kv_cache_size_in_bytes == 0


# -- nothing left ----------------------------------------------------------------------------------------------------


def test_memory_goes_with_the_pipeline(shallow: Path) -> None:
    """With its last reference, without the garbage collector, whatever the caller still has of its requests."""
    pipe = ContinuousBatchingPipeline(shallow)
    handle = pipe.add_request(0, "One, two,", GenerationConfig(max_new_tokens=4))
    while pipe.has_non_finished_requests():
        pipe.step()
    cache = weakref.ref(pipe._backend.cache)  # type: ignore[attr-defined]
    gc.collect()
    gc.disable()
    try:
        del pipe
        assert cache() is None
    finally:
        gc.enable()
    assert len(handle.outputs()[0].generated_ids) == 4
    assert handle.kept_positions is None


@pytest.mark.parametrize("num_requests", [40, *rarely(200)])
def test_many_short_requests_leave_nothing(num_requests: int, shallow: Path) -> None:
    pipe = ContinuousBatchingPipeline(shallow)

    def round_of(count: int) -> None:
        rng = np.random.default_rng(0)
        for i in range(count):
            ids = ov.Tensor(rng.integers(0, 40_000, (1, int(rng.integers(1, 40)))))
            handle = pipe.add_request(i, ids, GenerationConfig(max_new_tokens=int(rng.integers(1, 6)), ignore_eos=True))
            if i % 3 == 0:
                pipe.step()
            if i % 5 == 0:
                handle.cancel()
            elif i % 7 == 0:
                handle.stop()
        while pipe.has_non_finished_requests():
            pipe.step()

    # The plugin keeps a compiled kernel for each number of rows it has seen, so all rounds have the same ones. In a
    # process of GBs the allocator may keep some MB in a round, but not in each; what is left behind would be there
    # in each.
    sizes = []
    for _ in range(4):
        round_of(num_requests)
        sizes.append(resident_bytes())
    assert pipe.get_metrics().num_used_blocks == 0
    assert pipe.get_metrics().requests == 0
    # The KV of 40 such requests is about 18 MB in f32 and 4.5 MB in u8.
    assert min(np.diff(sizes)) < 1 << 20
