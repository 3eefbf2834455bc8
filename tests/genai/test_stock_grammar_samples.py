"""What openvino_genai's samples structural_tags_generation and compound_grammar_generation call, with both libraries.

The model is random, so strings and lists are bounded, and what begins a call of a tool is a character that it writes.
"""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar

import openvino_genai as stock
import pytest
from both_libraries import BOTH, Pipes
from pydantic import BaseModel, Field

QUESTION = "What is the weather in London, and how many pounds are 100 euros?"
SYSTEM = "You call tools where that helps."
IDS = ["stock", "ours"]
LETTERS = "etaoinsrhlETAOINSRHL"


class Tool(BaseModel, extra="forbid"):
    """No more than is named: the model would write on."""


class Weather(Tool):
    name: ClassVar[str] = "get_weather"

    city: str = Field(description="City name", max_length=6)
    date: str = Field(pattern=r"2\d\d\d-[0-1]\d-[0-3]\d", description="Date in YYYY-MM-DD format")


class Exchange(Tool):
    name: ClassVar[str] = "get_currency_exchange"

    to_currency: str = Field(description="Currency to convert to", max_length=3)
    amount: int = Field(description="Amount to convert", ge=0, le=99)


TOOLS = {tool.name: tool for tool in (Weather, Exchange)}


@pytest.mark.parametrize("lib", BOTH, ids=IDS)
def test_structural_tags_sample(llm: Pipes, lib: Any) -> None:
    """Free text, until something says that a call of a tool begins: then that, by its schema, and free text again."""
    pipe, said = llm[lib], []
    for use_structural_tags in (False, True):
        config = lib.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = 200, True, True
        pipe.start_chat(SYSTEM)
        if use_structural_tags:
            config.structured_output_config = lib.StructuredOutputConfig(
                structural_tags_config=lib.StructuralTagsConfig(
                    structural_tags=[
                        lib.StructuralTagItem(
                            begin=f'{letter}<function="{name}">',
                            schema=json.dumps(tool.model_json_schema()),
                            end="</function>",
                        )
                        for name, tool in TOOLS.items()
                        for letter in LETTERS
                    ],
                    triggers=[*LETTERS],
                )
            )
        heard: list[str] = []

        def streamer(text: str, heard: list[str] = heard) -> Any:
            heard.append(text)
            return lib.StreamingStatus.RUNNING

        answer = pipe.generate(QUESTION, config, streamer=streamer)
        pipe.finish_chat()
        assert "".join(heard) == answer
        said.append(answer)
    calls = re.findall(r'<function="([^"]+)">({.*?})</function>', said[1], re.DOTALL)
    assert calls
    before = said[1].partition("<function=")[0]
    assert [letter for letter in before if letter in LETTERS] == [before[-1]]  # no free text goes on behind one
    assert all(TOOLS[name].model_validate(json.loads(arguments, strict=False)) for name, arguments in calls)


class Flight(Tool):
    origin_airport_code: str = Field(max_length=3)
    departure_date: str = Field(max_length=4)


class Hotel(Tool):
    destination: str = Field(max_length=5)


def array_of_calls() -> str:
    one_of = [
        {
            "type": "object",
            "properties": {"name": {"type": "string", "enum": [tool.__name__]}, "arguments": tool.model_json_schema()},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in (Flight, Hotel)
    ]
    return json.dumps({"type": "array", "items": {"anyOf": one_of}, "minItems": 1, "maxItems": 2})


class ToolCalls(stock.Parser):
    """Of answers that say functools and a list."""

    def parse(self, message: dict[str, Any]) -> None:
        head, found, calls = message.get("content", "").partition("functools")
        if found and not head:
            message["tool_calls"] = json.loads(calls, strict=False)  # openvino_genai lets control characters through


@pytest.mark.parametrize("lib", BOTH, ids=IDS)
def test_compound_grammar_sample(llm: Pipes, lib: Any) -> None:
    """A yes or a no, then a word with a list of calls behind it: grammars joined by | and +, in one config."""
    grammars = lib.StructuredOutputConfig
    pipe, tokenizer = llm[lib], llm[lib].get_tokenizer()
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Do dolphins have fingers?"}]
    tools = [{"name": tool.__name__, "arguments": tool.model_json_schema()} for tool in (Flight, Hotel)]
    config = lib.GenerationConfig()
    config.max_new_tokens, config.do_sample = 300, True
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tools=tools)
    config.structured_output_config = grammars(
        structural_tags_config=grammars.ConstString("yes") | grammars.ConstString("no")
    )
    answer = pipe.generate(prompt, config, streamer=lambda text: lib.StreamingStatus.RUNNING)
    assert answer in ("yes", "no")
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Book a flight and a hotel."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tools=tools)
    config.structured_output_config.structural_tags_config = grammars.ConstString("functools") + grammars.JSONSchema(
        array_of_calls()
    )
    result = pipe.generate([prompt], config, parsers=[ToolCalls()])
    calls = result.parsed[0]["tool_calls"]
    assert 1 <= len(calls) <= 2
    for call in calls:
        {"Flight": Flight, "Hotel": Hotel}[call["name"]].model_validate(call["arguments"])
