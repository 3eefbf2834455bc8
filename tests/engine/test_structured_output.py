"""Structured output in the engine: with everything else that a request can ask for, and beside other requests."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import openvino as ov
import openvino_genai as stock
import pytest
from both_libraries import EXACT
from random_schemas import random_schema, text_of

import ov_kvcrush as ours
from ov_kvcrush import ContinuousBatchingPipeline, GenerationConfig, LLMPipeline, RequestError, SchedulerConfig

C = stock.StructuredOutputConfig
STOP, LENGTH = stock.GenerationFinishReason.STOP, stock.GenerationFinishReason.LENGTH
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TINY_CACHE = SchedulerConfig(num_kv_blocks=12, max_step_ms=0)  # three of six answers


@pytest.fixture(scope="module")
def folder(tiny_ir: Callable[[str], Path]) -> Path:
    return tiny_ir("llama")


@pytest.fixture(scope="module")
def batching(folder: Path) -> ContinuousBatchingPipeline:
    return ContinuousBatchingPipeline(folder, **EXACT)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLMPipeline:
    return LLMPipeline(folder, **EXACT)


def config(max_new_tokens: int = 400, **options: Any) -> GenerationConfig:
    """Grammars among the options are those of StructuredOutputConfig."""
    kinds = {name: options.pop(name) for name in list(options) if hasattr(C, name)}
    made = GenerationConfig(max_new_tokens=max_new_tokens, **options)
    if kinds:
        made.structured_output_config = C(**kinds)
    return made


def run(pipe: Any, *configs: GenerationConfig) -> list[Any]:
    prompts = [ov.Tensor(np.arange(40 + i, 60 + i)[None]) for i in range(len(configs))]
    return pipe.generate(prompts, list(configs))


def texts(pipe: Any, result: Any) -> list[str]:
    return [pipe.get_tokenizer().decode(ids) for ids in result.m_generation_ids]


def valid(text: str, schema: Any) -> bool:
    try:
        answer = json.loads(text)
    except ValueError:
        return False
    return jsonschema.Draft202012Validator(schema).is_valid(answer)


def mixed() -> list[GenerationConfig]:
    """Six grammars and two requests without one."""
    sampled = {"do_sample": True, "rng_seed": 3}
    return [
        config(json_schema=text_of(PERSON), **sampled),
        config(12),
        config(regex="[a-c]{5,30}x"),
        config(grammar='root ::= "(" root ")" | [0-9]{2}', **sampled),
        config(20, **sampled),
        config(json_schema=text_of({"enum": ["yes", "no", None]})),
        config(compound_grammar=C.ConstString("<") + C.Regex("[0-9]{3}") + C.ConstString(">"), **sampled),
        config(regex="(ab|cd){10}", repetition_penalty=1.2, presence_penalty=0.5),
    ]


def test_requests_of_a_batch_follow_each_its_grammar(batching: ContinuousBatchingPipeline) -> None:
    together = run(batching, *mixed())
    person, _, letters, nested, _, choice, tagged, pairs = [texts(batching, result)[0] for result in together]
    assert valid(person, PERSON)
    assert re.fullmatch("[a-c]{5,30}x", letters)
    assert re.fullmatch(r"\(*\d\d\)*", nested)
    assert nested.count("(") == nested.count(")")
    assert json.loads(choice) in ("yes", "no", None)
    assert re.fullmatch(r"<\d{3}>", tagged)
    assert re.fullmatch("(ab|cd){10}", pairs)
    assert all(result.finish_reasons == [STOP] for i, result in enumerate(together) if i not in (1, 4))


def test_a_request_gets_the_tokens_that_it_gets_alone(batching: ContinuousBatchingPipeline) -> None:
    together = run(batching, *mixed())
    for i, one in enumerate(mixed()):
        alone = batching.generate([ov.Tensor(np.arange(40 + i, 60 + i)[None])], [one])[0]
        assert together[i].m_generation_ids == alone.m_generation_ids, i


def test_what_is_computed_again_goes_on_where_it_was(folder: Path, batching: ContinuousBatchingPipeline) -> None:
    small = ContinuousBatchingPipeline(folder, TINY_CACHE, **EXACT)
    configs = [config(120, regex="([a-m]{3}[n-z]{3}){20}", do_sample=True, rng_seed=seed) for seed in range(6)]
    expected = [result.m_generation_ids for result in run(batching, *configs)]
    assert [result.m_generation_ids for result in run(small, *configs)] == expected
    assert small.get_metrics().num_preemptions


def test_sequences_of_a_request_go_on_by_themselves(llm: LLMPipeline) -> None:
    made = config(json_schema=text_of(PERSON), do_sample=True, num_return_sequences=5, rng_seed=1)
    answers = llm.generate(["tell"], made).texts
    assert all(valid(text, PERSON) for text in answers)
    assert len(set(answers)) > 1


@pytest.mark.parametrize(
    ("options", "text", "reason"),
    [
        ({"regex": "ab", "min_new_tokens": 20}, "ab", STOP),  # nothing can follow
        ({"regex": "a{3,9}", "min_new_tokens": 6, "logit_bias": {257: 90.0}}, "aaaaaa", STOP),
        ({"regex": "a{3,9}", "min_new_tokens": 6, "max_new_tokens": 7, "logit_bias": {97: 90.0}}, "a" * 7, LENGTH),
        ({"regex": "[a-c]{9}", "logit_bias": {98: 90.0}, "stop_strings": {"bbb"}}, "", STOP),
        ({"regex": "[a-c]{3}", "logit_bias": {98: 90.0, 120: 100.0}}, "bbb", STOP),
        ({"regex": "[ab]{4}", "logit_bias": {98: 5.0}, "frequency_penalty": 2.0, "presence_penalty": 2.0}, None, STOP),
        ({"regex": "ab", "ignore_eos": True}, "ab", STOP),
        ({"regex": "ab*", "ignore_eos": True, "max_new_tokens": 6}, "abbbbb", LENGTH),
        ({"regex": "abc[0-9]", "stop_token_ids": {98}}, "ab", STOP),
    ],
)
def test_beside_other_options(
    llm: LLMPipeline, options: dict[str, Any], text: str | None, reason: stock.GenerationFinishReason
) -> None:
    bias = {token_id(llm, token): value for token, value in options.get("logit_bias", {}).items()}
    rest = {name: value for name, value in options.items() if name != "logit_bias"}
    if "stop_token_ids" in rest:
        rest["stop_token_ids"] = {token_id(llm, token) for token in rest["stop_token_ids"]}
    result = llm.generate(["tell"], config(**rest), logit_bias=bias)
    assert result.finish_reasons == [reason]
    if text is not None:
        assert result.texts == [text]
    else:
        assert re.fullmatch(options["regex"], result.texts[0])


def token_id(llm: LLMPipeline, byte: int) -> int:
    """The token of a byte; 257 = the end token."""
    tokenizer = llm.get_tokenizer()
    return tokenizer.get_eos_token_id() if byte == 257 else int(tokenizer.encode(chr(byte)).input_ids.data[0, -1])


def test_log_probabilities_are_among_what_the_grammar_allows(batching: ContinuousBatchingPipeline) -> None:
    handle = batching.add_request(1, "tell", config(regex="[ab]", logprobs=5))
    while batching.has_non_finished_requests():
        batching.step()
    tops = handle.read_all()[0].top_logprobs
    assert tops is not None
    assert len(tops[0]) == 2
    assert sum(map(math.exp, tops[0].values())) == pytest.approx(1, abs=1e-5)


def test_a_ban_of_all_that_the_grammar_allows_is_an_error(llm: LLMPipeline) -> None:
    with pytest.raises(ours.CrushError, match="logit_bias must leave a token that the grammar allows"):
        llm.generate(["tell"], config(regex="a"), logit_bias={token_id(llm, 97): -math.inf})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"json_schema": '{"type": "strin"}'}, "json_schema must be a JSON schema"),
        ({"regex": "(a"}, "regex must be a regular expression"),
        ({"regex": "(a{999}){999}"}, "regex must be a regular expression"),
        ({"regex": "a", "num_beams": 2}, "num_beams must be 1"),
    ],
)
def test_bad_grammars_are_refused_before_anything_runs(
    batching: ContinuousBatchingPipeline, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        batching.add_request(7, "tell", config(**options))
    assert not batching.has_non_finished_requests()
    assert batching.get_metrics().requests == 0


def test_handles_and_steps(batching: ContinuousBatchingPipeline) -> None:
    handle = batching.add_request(1, "tell", config(regex="[ab]{6}"))
    while batching.has_non_finished_requests():
        batching.step()
    (answer,) = handle.read_all()
    assert re.fullmatch("[ab]{6}", batching.get_tokenizer().decode(answer.generated_ids))


def test_pipelines_on_one_model_share_their_grammars(llm: LLMPipeline) -> None:
    beside = llm.with_cache({"key_precision": "u8", "value_precision": "u8"})
    made = config(json_schema=text_of(PERSON))
    assert valid(beside.generate(["tell"], made).texts[0], PERSON)


def test_both_libraries_give_valid_answers(folder: Path, batching: ContinuousBatchingPipeline) -> None:
    theirs = stock.ContinuousBatchingPipeline(str(folder), stock.SchedulerConfig(), "CPU", EXACT)
    tags = stock.StructuralTagsConfig(
        structural_tags=[stock.StructuralTagItem(begin="<f>", schema='{"enum": [1, 2]}', end="</f>")], triggers=["<f"]
    )
    cases: list[tuple[GenerationConfig, str]] = [
        (config(regex="[a-c]{2,5}x"), "[a-c]{2,5}x"),
        (config(grammar='root ::= "a" b\nb ::= [0-9]{3}'), r"a\d{3}"),
        (config(json_schema='{"type": "boolean"}'), "true|false"),
        (config(json_schema='{"enum": ["x", 12]}'), '"x"|12'),
        (config(compound_grammar=C.Regex("a|b") + C.ConstString("-") + C.EBNF('root ::= "z"')), "[ab]-z"),
        (config(compound_grammar=C.Regex("yes") | C.ConstString("no")), "yes|no"),
        (config(structural_tags_config=C.TriggeredTags(["<t"], [C.Tag("<t>", C.Regex("[0-9]"), "</t>")], True, True)),
         r"<t>\d</t>"),
        (config(30, structural_tags_config=tags), r"(?s)((?!<f).)*(<f>[12]</f>((?!<f).)*)*(<f?>?[12]?<?/?f?)?"),
    ]  # fmt: skip
    for pipe in (batching, theirs):
        for (_, pattern), result in zip(cases, run(pipe, *(made for made, _ in cases)), strict=True):
            assert re.fullmatch(pattern, texts(pipe, result)[0]), (pipe, pattern)


def check_schemas(pipe: ContinuousBatchingPipeline, seeds: range, max_new_tokens: int) -> None:
    schemas = [random_schema(seed) for seed in seeds]
    configs = [
        config(max_new_tokens, json_schema=text_of(schema), do_sample=bool(i % 2), rng_seed=i)
        for i, schema in zip(seeds, schemas, strict=True)
    ]
    prompts = [f"Answer in JSON that fits this schema: {text_of(schema)}"[:400] for schema in schemas]
    for seed, schema, result in zip(seeds, schemas, pipe.generate(prompts, configs), strict=True):
        text = result.m_generation_ids[0]
        assert result.finish_reasons == [STOP], (seed, schema, text)
        assert valid(text, schema), (seed, schema, text)


def test_answers_fit_random_schemas(batching: ContinuousBatchingPipeline) -> None:
    check_schemas(batching, range(12), 4000)


@pytest.mark.exhaustive
def test_answers_of_a_random_model_fit_200_schemas(batching: ContinuousBatchingPipeline) -> None:
    check_schemas(batching, range(200), 4000)


@pytest.fixture(scope="module")
def trained(smollm2: Path) -> ContinuousBatchingPipeline:
    return ContinuousBatchingPipeline(smollm2)


def test_answers_of_the_default_model_fit_their_schema(trained: ContinuousBatchingPipeline) -> None:
    check_schemas(trained, range(3), 600)


@pytest.mark.exhaustive
def test_answers_of_the_default_model_fit_200_schemas(trained: ContinuousBatchingPipeline) -> None:
    check_schemas(trained, range(200), 1500)
