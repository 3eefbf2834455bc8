"""Forms in which openvino_genai's users make and call pipelines: accepted here, with the same answers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino_genai as stock
import pytest
from both_libraries import EXACT, PROMPT, Pipes

import ov_kvcrush as ours

THREE = stock.GenerationConfig(max_new_tokens=3)


def same(pipes: Pipes, ask: Callable[[Any], Any]) -> Any:
    """What `ask` returns of both pipelines."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found, expected = ask(pipes[ours]), ask(pipes[stock])
    assert found == expected
    return found


def test_forms_of_llm_pipeline(folder: Path, llm: Pipes) -> None:
    tokenizer, scheduler = ours.Tokenizer(folder), stock.SchedulerConfig()
    made = [
        ours.LLMPipeline(folder, tokenizer, "CPU", EXACT),
        ours.LLMPipeline(folder, tokenizer, device="CPU", **EXACT),
        ours.LLMPipeline(folder, "CPU", {"scheduler_config": scheduler, **EXACT}),
        ours.LLMPipeline(folder, "CPU", ATTENTION_BACKEND="SDPA", adapters=stock.AdapterConfig(), **EXACT),
        ours.LLMPipeline(models_path=folder, tokenizer=tokenizer, device="CPU", config=EXACT),
    ]
    expected = llm[stock].generate(PROMPT, THREE).tokens
    assert [pipe.generate(PROMPT, THREE).tokens for pipe in made] == [expected] * len(made)


def test_forms_of_continuous_batching_pipeline(folder: Path, batching: Pipes) -> None:
    tokenizer, scheduler = ours.Tokenizer(folder), stock.SchedulerConfig()
    made = [
        ours.ContinuousBatchingPipeline(folder, tokenizer, scheduler, "CPU", **EXACT),
        ours.ContinuousBatchingPipeline(folder, scheduler, "CPU", {"ATTENTION_BACKEND": "PA", **EXACT}, {}, {}),
        ours.ContinuousBatchingPipeline(
            models_path=folder, tokenizer=tokenizer, scheduler_config=scheduler, device="CPU", **EXACT
        ),
    ]
    expected = batching[stock].generate([PROMPT], [THREE])[0].m_generation_ids
    assert [pipe.generate([PROMPT], [THREE])[0].m_generation_ids for pipe in made] == [expected] * len(made)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ATTENTION_BACKEND": "XX"}, "ATTENTION_BACKEND must be PA or SDPA, got 'XX'"),
        ({"prompt_lookup": 3}, "prompt_lookup must be True or False, got 3"),
        ({"config": {"scheduler_config": {}}, "scheduler_config": {}}, "scheduler_config must be given once"),
    ],
)
def test_bad_properties_are_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ours.CrushError, match=message):
        ours.LLMPipeline(folder, "CPU", **options)


def test_bad_arguments_are_refused(folder: Path) -> None:
    tokenizer = ours.Tokenizer(folder)
    with pytest.raises(TypeError, match="positional"):
        ours.LLMPipeline(folder, "CPU", {}, {})
    with pytest.raises(TypeError, match="multiple values for argument 'device'"):
        ours.LLMPipeline(folder, "CPU", device="CPU")
    with pytest.raises(TypeError, match="multiple values for argument 'tokenizer'"):
        ours.LLMPipeline(folder, tokenizer, "CPU", tokenizer=tokenizer)


def test_names_of_prompts(batching: Pipes, llm: Pipes) -> None:
    history = stock.ChatHistory([{"role": "user", "content": "x"}])
    for asked in (
        {"prompts": ["ab"], "generation_config": [THREE]},
        {"prompt": "ab", "generation_config": THREE},
        {"input_ids": [PROMPT], "generation_config": [THREE]},
        {"histories": [history], "generation_config": [THREE]},
    ):
        same(batching, lambda pipe, asked=asked: pipe.generate(**asked)[0].m_generation_ids)
    same(llm, lambda pipe: pipe.generate(inputs="ab", generation_config=THREE))

    def added(pipe: Any) -> list[list[int]]:
        handles = [pipe.add_request(0, input_ids=PROMPT, generation_config=THREE)]
        handles.append(pipe.add_request(1, prompt="ab", generation_config=THREE))
        while pipe.has_non_finished_requests():
            pipe.step()
        return [handle.read_all()[0].generated_ids for handle in handles]

    same(batching, added)
    with pytest.raises(ours.RequestError, match="prompt, input_ids must be given, got none"):
        batching[ours].add_request(0)


def test_parameters_of_other_modes_are_ignored(llm: Pipes) -> None:
    for options in (
        {"num_assistant_tokens": 0},
        {"num_assistant_tokens": 3},
        {"num_assistant_tokens": 3, "max_ngram_size": 2},
        {"diversity_penalty": 1.0},
        {"num_beam_groups": 2},
        {"no_repeat_ngram_size": 2},
        {"length_penalty": 0.5},
        {"adapters": stock.AdapterConfig()},
    ):
        same(llm, lambda pipe, options=options: pipe.generate(PROMPT, max_new_tokens=3, **options).tokens)


def test_echo_without_an_answer(llm: Pipes) -> None:
    def encoded(pipe: Any) -> Any:
        found = pipe.generate(PROMPT, max_new_tokens=0, echo=True)
        return found.tokens, found.scores, found.finish_reasons

    assert same(llm, encoded)[0] == [list(range(40, 60))]
    text = same(llm, lambda pipe: pipe.generate("hi", max_new_tokens=0, echo=True, apply_chat_template=False))
    assert text == "hi"


def test_an_empty_text_where_a_template_makes_a_prompt(llm: Pipes) -> None:
    same(llm, lambda pipe: pipe.generate("", max_new_tokens=3))
    for pipe in llm.values():
        with pytest.raises(RuntimeError):
            pipe.generate("", max_new_tokens=3, apply_chat_template=False)


@pytest.mark.parametrize(
    ("options", "is_valid"),
    [
        ({"temperature": -1.0, "do_sample": True}, False),
        ({"num_return_sequences": 3}, False),
        ({"max_new_tokens": 0}, False),
        ({"top_p": 2.0, "do_sample": True}, False),
        ({"min_new_tokens": 5, "max_new_tokens": 2}, False),
        ({"repetition_penalty": -1.0}, False),
        ({"max_new_tokens": 4, "num_assistant_tokens": 3}, True),
    ],
)
def test_a_config_is_checked_when_it_is_set(llm: Pipes, options: dict[str, Any], is_valid: bool) -> None:
    for pipe in llm.values():
        before = pipe.get_generation_config()
        try:
            if is_valid:
                pipe.set_generation_config(stock.GenerationConfig(**options))
            else:
                with pytest.raises(RuntimeError):
                    pipe.set_generation_config(stock.GenerationConfig(**options))
                if pipe is llm[ours]:  # openvino_genai keeps what it has just refused
                    assert pipe.get_generation_config().max_new_tokens == before.max_new_tokens
        finally:
            pipe.set_generation_config(before)


class Upper(stock.IncrementalParser):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def parse(self, message: dict[str, str], text: str, tokens: list[int] | None = None) -> str:
        self.calls.append(text)
        message["seen"] = "yes"
        return text.upper()

    def reset(self) -> None:
        self.calls = []


class Messages(ours.TextParserStreamer):
    def __init__(self, tokenizer: Any, parsers: list[Any]) -> None:
        super().__init__(tokenizer, parsers)
        self.got: list[dict[str, str]] = []

    def write(self, message: dict[str, str]) -> Any:
        self.got.append(dict(message))
        return stock.StreamingStatus.RUNNING


def test_a_parser_streamer_gets_messages(llm: Pipes) -> None:
    def run(pipe: Any) -> Any:
        parser = Upper()
        streamer = Messages(pipe.get_tokenizer(), [parser])
        text = pipe.generate("ab", max_new_tokens=6, ignore_eos=True, streamer=streamer)
        return text, streamer.got, "".join(parser.calls), streamer.get_parsed_message()

    _, messages, _, _ = same(llm, run)
    assert messages


class Length(stock.Parser):
    def parse(self, message: dict[str, str]) -> None:
        message["length"] = str(len(message["content"]))


def test_parsers_of_a_config(llm: Pipes) -> None:
    parser = Length()

    def run(pipe: Any) -> Any:
        config = stock.GenerationConfig(max_new_tokens=4, parsers=[parser])
        return pipe.generate(["ab", "c"], config).parsed, pipe.generate(["ab"], max_new_tokens=2).parsed

    parsed, without = same(llm, run)
    assert [message["length"] for message in parsed]
    assert without == []


def test_a_chat_of_continuous_batching(batching: Pipes) -> None:
    def run(pipe: Any) -> list[list[str]]:
        pipe.start_chat("be short")
        answers = [pipe.generate([text], [THREE])[0].m_generation_ids for text in ("ab", "cd")]
        pipe.finish_chat()
        return [*answers, pipe.generate(["cd"], [THREE])[0].m_generation_ids]

    same(batching, run)
    batching[ours].start_chat()
    with pytest.raises(RuntimeError, match="one in a chat"):
        batching[ours].generate(["a", "b"], [THREE, THREE])
    batching[ours].finish_chat()


def test_members() -> None:
    text = stock.SchedulerConfig().to_string().splitlines()
    own = ours.SchedulerConfig(max_num_batched_tokens=256).to_string().splitlines()
    names = ("max_num_batched_tokens", "num_kv_blocks", "cache_size", "dynamic_split_fuse", "enable_prefix_caching")
    for name in names:
        (line,) = (line for line in text if line.startswith(f"  {name}:"))
        assert line in own
    for name in ("TokenizedInputs", "StopCriteria", "StructuredOutputConfig", "CacheEvictionConfig"):
        assert getattr(ours, name) is getattr(stock, name)
