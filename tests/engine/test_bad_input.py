"""Bad input is refused at once, by name, and harms nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as ov_genai
import pytest

from ov_kvcrush import (
    ChatHistory,
    ContinuousBatchingPipeline,
    CrushError,
    GenerationConfig,
    LLMPipeline,
    ModelError,
    PerfMetrics,
    RequestError,
    SchedulerConfig,
)
from ov_kvcrush.prompts.encoder import PromptEncoder


@pytest.fixture(scope="module")
def pipe(shallow: Path) -> ContinuousBatchingPipeline:
    return ContinuousBatchingPipeline(shallow, SchedulerConfig(num_kv_blocks=4))


@pytest.fixture
def copy_of_model(shallow: Path, tmp_path: Path) -> Path:
    """A model folder that a test may damage; the weights are a link."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in shallow.iterdir():
        (folder / file.name).symlink_to(file) if file.suffix == ".bin" else shutil.copy(file, folder)
    return folder


# -- models and devices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["crush", "genai"])
@pytest.mark.parametrize(
    "missing", ["openvino_model.xml", "openvino_model.bin", "openvino_tokenizer.xml", "openvino_detokenizer.xml"]
)
def test_missing_file_is_named(copy_of_model: Path, missing: str, engine: str) -> None:
    (copy_of_model / missing).unlink()
    with pytest.raises(ModelError, match=missing):
        LLMPipeline(copy_of_model, engine=engine)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        LLMPipeline(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["openvino_model.xml", "openvino_tokenizer.xml", "generation_config.json"])
def test_damaged_file_is_named(copy_of_model: Path, name: str) -> None:
    (copy_of_model / name).write_text("<?xml version='1.0'?><net")
    with pytest.raises(ModelError, match=name.removesuffix(".xml").removeprefix("openvino_")):
        LLMPipeline(copy_of_model)


def test_truncated_weights_are_refused(copy_of_model: Path) -> None:
    weights = copy_of_model / "openvino_model.bin"
    data = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="openvino_model"):
        LLMPipeline(copy_of_model)


def test_not_an_llm(copy_of_model: Path) -> None:
    import openvino.opset15 as ops

    (copy_of_model / "openvino_model.bin").unlink()  # a link; saving would write through it
    x = ops.parameter(ov.PartialShape([1, -1]), ov.Type.f32)
    ov.save_model(ov.Model([ops.relu(x)], [x]), copy_of_model / "openvino_model.xml")
    with pytest.raises(ModelError, match="must be an LLM"):
        LLMPipeline(copy_of_model)


def test_wrong_device_lists_those_there_are(shallow: Path) -> None:
    for engine in (None, "genai"):
        with pytest.raises(CrushError, match=r"one of .*CPU.*got 'GPU.7'"):
            LLMPipeline(shallow, "GPU.7", engine=engine)
    with pytest.raises(CrushError, match="engine='genai'"):
        LLMPipeline(shallow, "GPU", engine="crush")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "crash"}, "crush"),
        ({"schedular_config": None}, "did you mean 'scheduler_config'"),
        ({"INFERENCE_NUM_THREAD": 1}, "did you mean 'INFERENCE_NUM_THREADS'"),
        ({"KV_CACHE_PRECISION": "u99"}, "u99"),
        ({"scheduler_config": {"num_kv_block": 3}}, "did you mean 'num_kv_blocks'"),
        ({"scheduler_config": {"num_kv_blocks": -3}}, "num_kv_blocks must be an integer of at least 0"),
        ({"scheduler_config": {"max_num_batched_tokens": 0}}, "max_num_batched_tokens"),
        ({"scheduler_config": {"cache_size": -1}}, "cache_size"),
        ({"scheduler_config": 5}, "scheduler_config must be"),
    ],
)
def test_wrong_option_names_the_nearest(shallow: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(CrushError, match=message):
        LLMPipeline(shallow, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_block": 3}, "did you mean 'num_kv_blocks'"),
        ({"cache_size": 0.5}, "cache_size must be of the type of 0 with engine='genai', got 0.5"),
        ({"max_num_seqs": "many"}, "max_num_seqs must be"),
    ],
)
def test_what_openvino_genai_cannot_express_is_named(shallow: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(CrushError, match=message):
        ContinuousBatchingPipeline(shallow, options, engine="genai")


def test_sparse_attention_is_for_the_other_engine(shallow: Path) -> None:
    config = ov_genai.SchedulerConfig()
    config.use_sparse_attention = True
    with pytest.raises(CrushError, match="use_sparse_attention must be False"):
        ContinuousBatchingPipeline(shallow, config)


# -- requests --------------------------------------------------------------------------------------------------------


def ids(*tokens: int) -> ov.Tensor:
    return ov.Tensor(np.array([tokens], np.int64))


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt must have at least one token"),
        (ov.Tensor(np.zeros((1, 0), np.int64)), {}, "at least one token"),
        (ids(1, 49152), {}, r"0\.\.49151, got 49152"),
        (ids(1, -1), {}, "got -1"),
        (ov.Tensor(np.ones((1, 3), np.float32)), {}, "integer"),
        (ov.Tensor(np.ones((2, 3), np.int64)), {}, "one row"),
        (ov.Tensor(np.ones((1, 128), np.int64)), {}, r"fit into the KV .*got 128 tokens"),
        (ov.Tensor(np.ones((1, 9000), np.int64)), {}, r"context of 8192 tokens, got 9000"),
        (ids(1), {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        (ids(1), {"max_new_tokens": -4}, "max_new_tokens must be at least 0, got -4"),
        (ids(1), {"temperature": -0.5}, "temperature"),
        (ids(1), {"top_p": 0.0}, "top_p"),
        (ids(1), {"top_p": 1.5}, "top_p"),
        (ids(1), {"max_new_token": 4}, "did you mean 'max_new_tokens'"),
        (ids(1), {"num_beams": 3, "num_beam_groups": 2, "diversity_penalty": 1.0}, "divisible by num_beam_groups=2"),
        (ids(1), {"num_return_sequences": 2}, "num_return_sequences"),
    ],
)
def test_bad_request_is_refused_and_harms_nobody(
    pipe: ContinuousBatchingPipeline, prompt: object, options: dict[str, object], message: str
) -> None:
    good = GenerationConfig(max_new_tokens=4, ignore_eos=True)
    bystander = pipe.add_request(1, ids(504, 2988), good)
    pipe.step()
    with pytest.raises(RequestError, match=message):
        pipe.add_request(2, prompt, **options)
    while pipe.has_non_finished_requests():
        pipe.step()
    assert len(bystander.outputs()[0].generated_ids) == 4
    assert pipe.get_metrics().num_used_blocks == 0


def test_request_ids_are_unique_while_they_run(pipe: ContinuousBatchingPipeline) -> None:
    config = GenerationConfig(max_new_tokens=2, ignore_eos=True)
    first = pipe.add_request(7, ids(1), config)
    for bad in (7, -1, 1.5, None):
        with pytest.raises(RequestError, match="request_id"):
            pipe.add_request(bad, ids(1), config)  # type: ignore[arg-type]
    while pipe.has_non_finished_requests():
        pipe.step()
    again = pipe.add_request(7, ids(1), config)
    while pipe.has_non_finished_requests():
        pipe.step()
    assert first.outputs() == again.read_all()


def test_one_bad_prompt_in_a_list_runs_none(pipe: ContinuousBatchingPipeline) -> None:
    with pytest.raises(RequestError, match="at least one token"):
        pipe.generate(["good", ""], GenerationConfig(max_new_tokens=2, apply_chat_template=False))
    with pytest.raises(RequestError, match="valid Unicode"):
        pipe.generate(["good", "\ud800"], GenerationConfig(max_new_tokens=2))
    with pytest.raises(RequestError, match="context of"):
        pipe.generate([ids(1), ov.Tensor(np.ones((1, 9000), np.int64))], GenerationConfig(max_new_tokens=2))
    assert not pipe.has_non_finished_requests()
    assert pipe.get_metrics().num_used_blocks == 0


@pytest.fixture(scope="module")
def llm(shallow: Path) -> LLMPipeline:
    return LLMPipeline(shallow)


@pytest.mark.parametrize("bad", [None, 5, [], ["a", 3], [None], ChatHistory()])
def test_inputs_of_a_wrong_kind(llm: LLMPipeline, bad: object) -> None:
    with pytest.raises(RequestError):
        llm.generate(bad, max_new_tokens=2)


def test_a_text_that_the_tokenizer_cuts_is_refused() -> None:
    """Some tokenizers cut long texts without a word, and the end of the prompt, where the question is, is lost."""

    class Cutting:
        def encode(self, text: str, add_special_tokens: bool) -> ov_genai.TokenizedInputs:
            data = np.frombuffer(text.encode()[:200], np.uint8).astype(np.int64)[None]
            return ov_genai.TokenizedInputs(ov.Tensor(data), ov.Tensor(np.ones_like(data)))

    encoder = PromptEncoder(Cutting())
    assert len(encoder.encode("x" * 150, PerfMetrics())) == 150
    with pytest.raises(RequestError, match=r"shorter than the 200 tokens .* got about 350 tokens"):
        encoder.encode("x" * 4150, PerfMetrics())


def test_a_text_longer_than_the_context_says_both_numbers(llm: LLMPipeline) -> None:
    with pytest.raises(RequestError, match=r"8192 tokens .* context, got about 20\d\d\d tokens"):
        llm.generate("one " * 20_000, max_new_tokens=2)


def test_text_without_an_encoding_is_refused(llm: LLMPipeline) -> None:
    with pytest.raises(RequestError, match="lone surrogates"):
        llm.generate("a\ud800b", max_new_tokens=2)


def test_a_history_that_the_template_refuses() -> None:
    class Strict:
        def apply_chat_template(self, history: object, add_generation_prompt: bool) -> str:
            raise RuntimeError("Check failed\nSystem role not supported")

    with pytest.raises(RequestError, match="must fit the model's chat template, got: System role not supported"):
        PromptEncoder(Strict()).render([], PerfMetrics())


def test_wrong_streamers(pipe: ContinuousBatchingPipeline) -> None:
    config = GenerationConfig(max_new_tokens=2)
    with pytest.raises(RequestError, match="streamer must be a callable"):
        pipe.generate("Hi", config, streamer=5)
    with pytest.raises(RequestError, match="more than one sequence"):
        pipe.generate(["Hi", "Ho"], config, streamer=print)


def test_prompt_without_splitting_must_fit_a_step(shallow: Path) -> None:
    pipe = ContinuousBatchingPipeline(shallow, SchedulerConfig(max_num_batched_tokens=8, dynamic_split_fuse=False))
    with pytest.raises(RequestError, match="max_num_batched_tokens=8"):
        pipe.add_request(0, ov.Tensor(np.ones((1, 9), np.int64)))
    handle = pipe.add_request(0, ov.Tensor(np.ones((1, 8), np.int64)), max_new_tokens=2, ignore_eos=True)
    while pipe.has_non_finished_requests():
        pipe.step()
    assert len(handle.outputs()[0].generated_ids) == 2
