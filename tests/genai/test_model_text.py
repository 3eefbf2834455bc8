"""Models that lie in no folder: the text of their IR and their weights, as openvino_genai takes them."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as stock
import pytest
from both_libraries import BOTH, EXACT, PROMPT, Pipes

import ov_kvcrush as ours
from ov_kvcrush.model.fingerprints import model_fingerprint
from ov_kvcrush.model.source import ModelText

SIX = stock.GenerationConfig(max_new_tokens=6, ignore_eos=True)
IR = ("openvino_model", "openvino_tokenizer", "openvino_detokenizer")


def read(folder: Path, name: str) -> tuple[str, ov.Tensor]:
    return (folder / f"{name}.xml").read_text(), ov.Tensor(np.fromfile(folder / f"{name}.bin", np.uint8))


@pytest.fixture(scope="module")
def text(folder: Path) -> tuple[str, ov.Tensor]:
    return read(folder, IR[0])


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return stock.Tokenizer(*read(folder, IR[1]), *read(folder, IR[2]))


@pytest.fixture(scope="module")
def from_text(text: tuple[str, ov.Tensor], tokenizer: Any) -> Pipes:
    return {lib: lib.LLMPipeline(*text, tokenizer, "CPU", SIX, **EXACT) for lib in BOTH}


def test_answers_are_those_of_the_folder(llm: Pipes, from_text: Pipes) -> None:
    expected = llm[stock].generate(PROMPT, SIX).tokens
    assert [from_text[lib].generate(PROMPT).tokens for lib in BOTH] == [expected] * 2
    said = {lib: from_text[lib].generate("Name a river.") for lib in BOTH}
    assert said[ours] == said[stock] == llm[stock].generate("Name a river.", SIX)


def test_the_given_config_holds_where_there_is_no_other(text: Any, tokenizer: Any, from_text: Pipes) -> None:
    for lib in BOTH:
        config = from_text[lib].get_generation_config()
        assert (config.max_new_tokens, config.ignore_eos) == (6, True)
        assert config.eos_token_id == tokenizer.get_eos_token_id()


def test_a_chat(from_text: Pipes, llm: Pipes) -> None:
    said = []
    for pipe in (from_text[ours], llm[ours], from_text[stock]):
        pipe.start_chat("You are brief.")
        said.append([pipe.generate(question, SIX) for question in ("Name a river.", "And a lake.")])
        pipe.finish_chat()
    assert said[0] == said[1]
    assert said[0][0] == said[2][0]


def test_by_name_and_in_continuous_batching(llm: Pipes, text: Any, tokenizer: Any) -> None:
    expected = llm[ours].generate(PROMPT, SIX).tokens
    named = ours.LLMPipeline(model=text[0], weights=text[1], tokenizer=tokenizer, device="CPU", **EXACT)
    assert named.generate(PROMPT, SIX).tokens == expected
    scheduler = stock.SchedulerConfig()
    batching = ours.ContinuousBatchingPipeline(*text, tokenizer, scheduler, "CPU", EXACT, SIX)
    assert batching.get_config().max_new_tokens == 6
    assert batching.generate([PROMPT], [SIX])[0].m_generation_ids == expected
    handle = batching.add_request(0, PROMPT, SIX)
    while batching.has_non_finished_requests():
        batching.step()
    assert [handle.read_all()[0].generated_ids] == expected


def test_what_reads_the_tokenizer_works(text: Any, tokenizer: Any, from_text: Pipes) -> None:
    config = ours.GenerationConfig(max_new_tokens=9)
    config.structured_output_config = ours.StructuredOutputConfig(regex="(yes|no)")
    assert from_text[ours].generate("Well?", config) in ("yes", "no")
    lookup = ours.LLMPipeline(*text, tokenizer, "CPU", prompt_lookup=True, **EXACT)
    assert lookup.generate(PROMPT, SIX).tokens == from_text[ours].generate(PROMPT, SIX).tokens


def test_a_model_cache_is_left_alone(llm: Pipes, text: Any, tokenizer: Any, tmp_path: Path) -> None:
    """As encrypted_model_causal_lm gives one. A graph that was rewritten cannot be written."""
    cache = {"CACHE_DIR": str(tmp_path), "CACHE_ENCRYPTION_CALLBACKS": [base64.b64encode, base64.b64decode]}
    for _ in range(2):
        pipe = ours.LLMPipeline(*text, tokenizer, "CPU", **cache, **EXACT)
        assert pipe.generate(PROMPT, SIX).tokens == llm[stock].generate(PROMPT, SIX).tokens
    assert list(tmp_path.iterdir()) == []


def test_contexts_in_files(text: Any, tokenizer: Any, from_text: Pipes, llm: Pipes, tmp_path: Path) -> None:
    """They belong to this text and these weights."""
    path = tmp_path / "context.kvc"
    pipe = from_text[ours]
    context = pipe.compress("The harbour master has a list of boats.", policy="none")
    context.save(path)
    again = ours.Context.load(path, pipe)
    asked = {"max_new_tokens": 4, "ignore_eos": True}
    assert pipe.generate("Who?", context=again, **asked) == pipe.generate("Who?", context=context, **asked)
    with pytest.raises(ours.ContextFileError, match="model"):
        ours.Context.load(path, llm[ours])


def test_fingerprints_follow_text_and_weights(text: Any) -> None:
    xml, weights = text
    other = np.array(weights.data)
    other[0] ^= 1
    found = {model_fingerprint(ModelText(*x)) for x in (text, (f"{xml} ", weights), (xml, ov.Tensor(other)))}
    assert len(found) == 3
    assert model_fingerprint(ModelText(xml, ov.Tensor(np.array(weights.data)))) in found


def test_what_cannot_be_run_is_refused_by_name(text: Any, tokenizer: Any) -> None:
    xml, weights = text
    short = ov.Tensor(np.array(weights.data)[:-1].copy())
    for args, error, message in (
        ((xml, short, tokenizer, "CPU"), ours.ModelError, "weights must have at least"),
        ((xml[:-20], weights, tokenizer, "CPU"), ours.ModelError, "the model's text must be a complete OpenVINO model"),
        ((f"<net>{xml}", weights, tokenizer, "CPU"), ours.ModelError, "a model given as text must be a readable"),
        ((xml, weights, "CPU"), ours.CrushError, "tokenizer must be an openvino_genai.Tokenizer"),
        ((xml,), ours.CrushError, "weights must be given with a model's text"),
        ((None, weights, tokenizer), ours.CrushError, "model must be the text of an IR"),
    ):
        with pytest.raises(error, match=message):
            ours.LLMPipeline(*args)
    for options, message in (
        ({"engine": "genai"}, "models_path must be a folder with engine='genai', got a model given as text"),
        ({"cache_config": {"budget": 0.3, "profile": "no.json"}}, "profile must be of a model in a folder"),
    ):
        with pytest.raises(ours.CrushError, match=message):
            ours.LLMPipeline(xml, weights, tokenizer, "CPU", **options)
    with pytest.raises(ours.CrushError, match=r"weights must be an openvino.Tensor"):
        ours.LLMPipeline(xml, weights=b"", tokenizer=tokenizer)
    with pytest.raises(TypeError, match="multiple values for argument 'model'"):
        ours.LLMPipeline(xml, weights, tokenizer, model=xml)
