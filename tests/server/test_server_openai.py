"""The calls of OpenAI's own client against a server with the default model."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import jsonschema
import openai
import pytest
from served import Served, metric, until

from ov_kvcrush.model.default import DEFAULT_MODEL_NAME

MODEL = DEFAULT_MODEL_NAME
ASKED: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 12}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 10}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_the_model_is_listed(alice: openai.OpenAI) -> None:
    assert [model.id for model in alice.models.list()] == [MODEL]
    assert alice.models.retrieve(MODEL).id == MODEL


def test_a_chat_and_its_stream_say_the_same(alice: openai.OpenAI) -> None:
    alice.chat.completions.create(messages=ASKED, **GREEDY)  # leaves its prefix for both
    whole = alice.chat.completions.create(messages=ASKED, **GREEDY)
    assert "Paris" in (whole.choices[0].message.content or "")
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(
        alice.chat.completions.create(messages=ASKED, stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    cost = whole.model_extra["kvcrush"]  # type: ignore[index]
    assert cost["kept_tokens"] <= cost["num_tokens"]
    assert cost["bf16_bytes"] > 0


def test_async_clients_are_answered_together(server: Served) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="key-of-alice", max_retries=0) as client:

            async def one() -> str:
                stream = await client.chat.completions.create(messages=ASKED, stream=True, **GREEDY)
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return list(await asyncio.gather(*(one() for _ in range(6))))

    texts = asyncio.run(run())
    assert all("Paris" in text for text in texts)


def test_n_seed_and_stop(alice: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": ASKED, "max_completion_tokens": 6, "temperature": 1.5}
    first, again = (alice.chat.completions.create(n=3, seed=7, **options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert {choice.message.content for choice in again.choices}
    stopped = alice.chat.completions.create(messages=ASKED, stop=["Par"], **GREEDY)
    assert stopped.choices[0].message.content == "The capital of France is "
    streamed = alice.chat.completions.create(messages=ASKED, stop=["Par"], stream=True, **GREEDY)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == "The capital of France is "


def test_logprobs_and_bias(alice: openai.OpenAI) -> None:
    found = alice.chat.completions.create(messages=ASKED, logprobs=True, top_logprobs=3, **GREEDY)
    scores = found.choices[0].logprobs
    assert scores is not None
    assert scores.content
    for row in scores.content:
        assert len(row.top_logprobs) == 3
        assert row.top_logprobs[0].logprob == pytest.approx(row.logprob, abs=1e-6)
        assert row.bytes is not None
    first = scores.content[0]
    assert bytes(first.bytes or ()).decode() == first.token
    streamed = list(alice.chat.completions.create(messages=ASKED, logprobs=True, stream=True, **GREEDY))
    tokens = [
        row.token for c in streamed for row in (c.choices[0].logprobs.content or () if c.choices[0].logprobs else ())
    ]
    assert tokens == [row.token for row in scores.content]
    plain = alice.completions.create(prompt="The capital of France is", logprobs=2, **GREEDY)
    given = plain.choices[0].logprobs
    assert given is not None
    assert given.top_logprobs
    assert len(given.tokens or ()) == len(given.token_logprobs or ()) == len(given.text_offset or ())


def test_an_answer_fits_its_schema(alice: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    asked: list[Any] = [{"role": "user", "content": "Describe a person."}]
    found = alice.chat.completions.create(model=MODEL, messages=asked, response_format=wanted, max_tokens=60)
    jsonschema.validate(json.loads(found.choices[0].message.content or ""), PERSON)


def test_a_tool_that_must_be_called_is(alice: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "get_weather"}}
    asked: list[Any] = [{"role": "user", "content": "How is the weather in Rome?"}]
    options: dict[str, Any] = {"model": MODEL, "tools": [WEATHER], "max_tokens": 60, "temperature": 0}
    found = alice.chat.completions.create(messages=asked, tool_choice=choice, **options)
    message = found.choices[0].message
    assert found.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls is not None
    call: Any = message.tool_calls[0]
    assert call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city"}

    chunks = list(alice.chat.completions.create(messages=asked, tool_choice="required", stream=True, **options))
    deltas = [d for c in chunks for d in c.choices[0].delta.tool_calls or ()]
    assert [d.function.name for d in deltas if d.function] == ["get_weather"]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(c.choices[0].delta.content for c in chunks)

    result = {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "clear"}'}
    after = alice.chat.completions.create(messages=[*asked, message, result], **options)  # type: ignore[list-item]
    assert after.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_completions_of_several_prompts(alice: openai.OpenAI) -> None:
    prompts = ["The capital of France is", "One, two, three,"]
    found = alice.completions.create(prompt=prompts, **GREEDY)
    alone = [alice.completions.create(prompt=prompt, echo=True, **GREEDY).choices[0].text for prompt in prompts]
    assert [choice.index for choice in found.choices] == [0, 1]
    assert all(text.startswith(prompt) for text, prompt in zip(alone, prompts, strict=True))
    texts = {0: "", 1: ""}
    for chunk in alice.completions.create(prompt=prompts, stream=True, **GREEDY):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert "Paris" in texts[0]
    ids = alice.completions.create(prompt=[504, 3575, 282], **GREEDY)
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 3


def test_responses(alice: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 16}
    found = alice.responses.create(input="What is the capital of France?", instructions="Be brief.", **options)
    assert found.status in ("completed", "incomplete")
    assert found.usage is not None
    events = list(
        alice.responses.create(input="What is the capital of France?", instructions="Be brief.", stream=True, **options)
    )
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == found.output_text
    assert events[-1].type in ("response.completed", "response.incomplete")


@pytest.mark.parametrize(
    ("given", "kind", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"extra_body": {"functions": []}}, openai.BadRequestError, "functions"),
        ({"messages": [{"role": "king", "content": "x"}]}, openai.BadRequestError, "messages.0.role"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"n": 2, "temperature": 0}, openai.BadRequestError, "n"),
        ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs"),
        ({"logit_bias": {"99999999": 1}}, openai.BadRequestError, "logit_bias"),
        ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice"),
        ({"store": True}, openai.BadRequestError, "store"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
            openai.BadRequestError,
            "response_format",
        ),
        ({"messages": [{"role": "user", "content": "a " * 9000}]}, openai.BadRequestError, "prompt"),
    ],
)
def test_what_is_wrong_is_refused_by_its_field(
    alice: openai.OpenAI, given: dict[str, Any], kind: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(kind) as caught:
        alice.chat.completions.create(**{"messages": ASKED, **GREEDY, **given})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id


def test_a_full_queue_is_told(alice: openai.OpenAI, server: Served) -> None:
    until(lambda: server.state.pipeline.get_metrics().requests == 0)
    prompts = [f"Number {i}:" for i in range(128)]
    server.state.pipeline._backend._config = replace(config := server.state.pipeline._backend._config, max_waiting=1)  # type: ignore[attr-defined]
    try:
        with pytest.raises(openai.RateLimitError) as caught:
            alice.completions.create(prompt=prompts, model=MODEL, max_tokens=20)
    finally:
        server.state.pipeline._backend._config = config  # type: ignore[attr-defined]
    assert caught.value.response.headers["retry-after"] == "1"
    assert "Paris" in (alice.chat.completions.create(messages=ASKED, **GREEDY).choices[0].message.content or "")
    assert metric(server.state, "requests_total", end="stop") > 0
