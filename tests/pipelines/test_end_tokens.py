"""What ends an answer, through whole pipelines: end tokens add up, none is lost, none lies outside the vocabulary."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest

from ov_kvcrush import (
    ContinuousBatchingPipeline,
    GenerationConfig,
    GenerationFinishReason,
    GenerationStatus,
    LLMPipeline,
    RequestError,
)

PROMPT = ov.Tensor(np.arange(40, 60)[None])
ENGINES = ["crush", "genai"]
# Both write the same where neither rounds.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def with_end_tokens(source: Path, out: Path, ends: int | list[int]) -> Path:
    """A copy of a model folder with these end tokens in its generation config."""
    shutil.copytree(source, out)
    path = out / "generation_config.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, "eos_token_id": ends}))
    return out


@pytest.fixture(scope="module")
def written(tiny_ir: Callable[[str], Path]) -> list[int]:
    """What the tiny model writes when nothing ends it."""
    tokens: list[int] = (
        LLMPipeline(tiny_ir("llama"), "CPU", EXACT).generate(PROMPT, max_new_tokens=12, ignore_eos=True).tokens[0]
    )
    return tokens


@pytest.fixture(scope="module", params=ENGINES)
def pipe(
    request: pytest.FixtureRequest,
    written: list[int],
    tiny_ir: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> LLMPipeline:
    """A model with two end tokens: one that it never writes, listed first, and the fifth that it writes."""
    never = next(token for token in range(288) if token not in written)
    folder = with_end_tokens(tiny_ir("llama"), tmp_path_factory.mktemp("ends") / request.param, [never, written[4]])
    return LLMPipeline(folder, "CPU", EXACT, engine=request.param)


def answer(pipe: LLMPipeline, config: GenerationConfig | None = None, **options: object) -> list[int]:
    tokens: list[int] = pipe.generate(PROMPT, config, **{"max_new_tokens": 12, **options}).tokens[0]
    return tokens


def until(written: list[int], token: int) -> list[int]:
    return written[: written.index(token) + 1]


def test_all_end_tokens_of_the_model_end_an_answer(pipe: LLMPipeline, written: list[int]) -> None:
    own = pipe.get_generation_config()
    end = until(written, written[4])
    unused = next(token for token in range(287, 0, -1) if token not in written)
    assert answer(pipe) == end
    assert answer(pipe, GenerationConfig()) == end
    assert answer(pipe, GenerationConfig(eos_token_id=own.eos_token_id)) == end
    assert answer(pipe, GenerationConfig(stop_token_ids={unused})) == end
    assert answer(pipe, stop_token_ids={unused}) == end


def test_stop_tokens_add_to_the_end_tokens(pipe: LLMPipeline, written: list[int]) -> None:
    early = until(written, written[2])
    assert answer(pipe, GenerationConfig(stop_token_ids={written[2]})) == early
    assert answer(pipe, stop_token_ids={written[2]}, ignore_eos=True) == early


def test_ignore_eos_ignores_all_end_tokens_of_the_model(pipe: LLMPipeline, written: list[int]) -> None:
    assert answer(pipe, ignore_eos=True) == written
    assert answer(pipe, GenerationConfig(ignore_eos=True)) == written
    last = until(written, written[-1])
    assert answer(pipe, ignore_eos=True, stop_token_ids={written[-1]}) == last


def test_end_tokens_stay_after_set_generation_config(pipe: LLMPipeline, written: list[int]) -> None:
    own = pipe.get_generation_config()
    try:
        for config in (GenerationConfig(), GenerationConfig(eos_token_id=own.eos_token_id), own):
            pipe.set_generation_config(config)
            assert pipe.get_generation_config().stop_token_ids == own.stop_token_ids
            assert answer(pipe) == until(written, written[4])
            assert answer(pipe, ignore_eos=True) == written
    finally:
        pipe.set_generation_config(own)


@pytest.mark.parametrize("options", [{"stop_token_ids": {10**6}}, {"eos_token_id": 288}, {"stop_token_ids": {-2}}])
def test_end_tokens_outside_the_vocabulary_are_refused(pipe: LLMPipeline, options: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=next(iter(options))):
        answer(pipe, min_new_tokens=1, **options)
    assert answer(pipe)


@pytest.mark.parametrize("token", [288, 10**6, -1])
def test_prompts_outside_the_vocabulary_are_refused(pipe: LLMPipeline, token: int) -> None:
    with pytest.raises(RequestError, match=rf"token ids must be in 0\.\.287, got {token}"):
        pipe.generate(ov.Tensor(np.array([[40, token]])), max_new_tokens=2)
    assert answer(pipe)


@pytest.mark.parametrize("engine", ENGINES)
def test_end_tokens_of_a_model_outside_its_vocabulary_are_left_out(
    tiny_ir: Callable[[str], Path], tmp_path: Path, written: list[int], engine: str
) -> None:
    folder = with_end_tokens(tiny_ir("llama"), tmp_path / "m", [written[4], 5000])
    with pytest.warns(UserWarning, match=r"got \[5000\]"):
        pipe = LLMPipeline(folder, "CPU", EXACT, engine=engine)
    assert answer(pipe, min_new_tokens=1) == until(written, written[4])


def test_a_bad_request_harms_no_other(tiny_ir: Callable[[str], Path], written: list[int]) -> None:
    pipe = ContinuousBatchingPipeline(tiny_ir("llama"), properties=EXACT)
    good = GenerationConfig(max_new_tokens=12, ignore_eos=True, logprobs=3)
    handle = pipe.add_request(1, PROMPT, good)
    with pytest.raises(RequestError, match="stop_token_ids"):
        pipe.add_request(2, PROMPT, GenerationConfig(max_new_tokens=9, min_new_tokens=1, stop_token_ids={10**6}))
    while pipe.has_non_finished_requests():
        pipe.step()
    output = handle.outputs()[0]
    assert (handle.get_status(), output.finish_reason) == (GenerationStatus.FINISHED, GenerationFinishReason.LENGTH)
    assert output.generated_ids == written
    assert output.top_logprobs is not None
    assert [next(iter(top)) for top in output.top_logprobs] == written
    assert [top[token] for top, token in zip(output.top_logprobs, written, strict=True)] == output.generated_log_probs
