"""Exported attention scores: those of Hugging Face's eager attention, over the weights file of the plain model."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset15 as ops
import pytest
from eager_attention import eager_attentions
from sample_runs import run_sample
from tiny_gguf import tiny_gguf
from tiny_models import NUM_HEADS, kinds
from typer.testing import CliRunner

from model_export import export_model, pipeline
from model_export.checks import check_hf_folder, needed_bytes
from model_export.cli import app
from model_export.options import WeightOptions
from model_export.scores import write_scores_model
from ov_kvcrush.errors import CrushError, ExportError, ModelError
from ov_kvcrush.model.folder import check_model_folder
from ov_kvcrush.model.graph.score_outputs import add_score_outputs, read_scores_model
from ov_kvcrush.model.info import ModelInfo
from ov_kvcrush.model.plugin import capped_properties, open_core

Build = Callable[[str], Path]
Outputs = dict[str, np.ndarray]
W = 8
TOKENS = 75  # more than four sliding windows
F32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
# Rows of each step: at once; two steps, the second attends to cached tokens; fewer rows than W; a single first token.
STEPS = ((75,), (40, 35), (70, 5), (1, 73, 1))


@pytest.fixture(scope="module")
def with_scores(tiny_ir: Build, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Return a function from a kind to its exported folder with scores added, once per module."""
    folders: dict[str, Path] = {}

    def build(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("scores") / kind
            shutil.copytree(tiny_ir(kind), folders[kind])
            write_scores_model(folders[kind], W)
        return folders[kind]

    return build


@pytest.fixture(scope="module")
def exported(tiny_hf: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole export of the llama with scores."""
    folder = tmp_path_factory.mktemp("exported") / "llama"
    export_model(tiny_hf("llama"), folder, "fp32", attention_scores=W)
    return folder


def tokens(batch: int = 1) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (batch, TOKENS))


def request_of(model: ov.Model) -> ov.InferRequest:
    return open_core().compile_model(model, "CPU", F32).create_infer_request()


def plain(folder: Path) -> ov.InferRequest:
    return request_of(ov.Core().read_model(folder / "openvino_model.xml"))


def scored(folder: Path) -> ov.InferRequest:
    return request_of(read_scores_model(folder))


def run_steps(request: ov.InferRequest, ids: np.ndarray, steps: Sequence[int]) -> list[Outputs]:
    """All outputs of each step of a new sequence, by name. ids: (batch, tokens)."""
    request.reset_state()
    outputs, end = [], 0
    for rows in steps:
        begin, end = end, end + rows
        results = request.infer(
            {
                "input_ids": ids[:, begin:end],
                "attention_mask": np.ones((len(ids), end), np.int64),
                "position_ids": np.tile(np.arange(begin, end), (len(ids), 1)),
                "beam_idx": np.arange(len(ids), dtype=np.int32),
            }
        )
        outputs.append({port.any_name: np.array(value) for port, value in results.items()})
    return outputs


def assert_scores_are_means(outputs: list[Outputs], steps: Sequence[int], attentions: list[np.ndarray]) -> None:
    """attentions: of each layer (heads, tokens, tokens)."""
    for output, rows, end in zip(outputs, steps, np.cumsum(steps), strict=True):
        assert len(output) == 1 + len(attentions)
        for layer, attention in enumerate(attentions):
            expected = attention[:, end - min(W, rows) : end, :end].mean(axis=1)
            np.testing.assert_allclose(output[f"attention_scores.{layer}"][0], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", kinds())
def test_scores_equal_eager_attention(kind: str, tiny_hf: Build, with_scores: Build) -> None:
    ids = tokens()
    attentions, request = eager_attentions(tiny_hf(kind), ids[0]), scored(with_scores(kind))
    for steps in STEPS:
        assert_scores_are_means(run_steps(request, ids, steps), steps, attentions)


@pytest.mark.parametrize("kind", kinds())
def test_plain_model_is_not_touched(kind: str, tiny_ir: Build, with_scores: Build) -> None:
    before, after = tiny_ir(kind), with_scores(kind)
    names = {file.name for file in before.iterdir()}
    assert {file.name for file in after.iterdir()} == names | {"openvino_model_scores.xml"}
    for name in names - {"openvino_model.bin"}:
        assert (after / name).read_bytes() == (before / name).read_bytes(), name
    old, new = ((folder / "openvino_model.bin").read_bytes() for folder in (before, after))
    assert new.startswith(old)
    assert len(new) < len(old) + 1024


def test_logits_are_the_same_with_and_without(exported: Path, tiny_ir: Build) -> None:
    requests = plain(tiny_ir("llama")), plain(exported), scored(exported)
    for steps in STEPS:
        for a, b, c in zip(*(run_steps(request, tokens(), steps) for request in requests), strict=True):
            assert list(b) == ["logits"]
            assert next(iter(c)) == "logits"
            np.testing.assert_allclose(b["logits"], a["logits"], atol=1e-6, rtol=0)
            np.testing.assert_allclose(c["logits"], a["logits"], atol=1e-3, rtol=0)


def test_export_writes_one_weights_file_and_says_so(exported: Path, tiny_ir: Build) -> None:
    check_model_folder(exported)
    weights = exported / "openvino_model.bin"
    assert len(list(exported.glob("openvino_model*.bin"))) == 1
    assert weights.stat().st_size < (tiny_ir("llama") / "openvino_model.bin").stat().st_size + 1024
    info, without = ModelInfo.read(exported), ModelInfo.read(tiny_ir("llama"))
    assert info is not None
    assert without is not None
    assert (info.attention_scores, without.attention_scores) == (W, None)
    assert info.source_sha256 == without.source_sha256
    with pytest.raises(ModelError, match=r"attention_scores must be a whole number of at least 1, got 0"):
        ModelInfo.from_json({**info.to_json(), "attention_scores": 0})


def test_folder_loads_everywhere_as_before(exported: Path, tiny_ir: Build) -> None:
    import openvino_genai
    from optimum.intel import OVModelForCausalLM

    from ov_kvcrush import CacheConfig, LLMPipeline

    config = openvino_genai.GenerationConfig(max_new_tokens=8, ignore_eos=True)
    cache = CacheConfig("f32", "f32")
    texts = []
    for folder in (exported, tiny_ir("llama")):
        stock = openvino_genai.LLMPipeline(folder, "CPU", **{**capped_properties(), **F32})
        ours = LLMPipeline(folder, "CPU", cache_config=cache, INFERENCE_PRECISION_HINT="f32")
        texts.append((stock.generate("hello", config), ours.generate("hello", config)))
    assert texts[0] == texts[1]

    import torch

    ids = tokens()
    model = OVModelForCausalLM.from_pretrained(exported, ov_config=F32)
    logits = model(torch.from_numpy(ids), attention_mask=torch.ones(1, TOKENS, dtype=torch.int64)).logits
    (expected,) = run_steps(plain(exported), ids, (TOKENS,))
    np.testing.assert_allclose(logits.numpy(), expected["logits"], atol=1e-4, rtol=0)


def test_requests_of_a_batch_have_their_own_scores(with_scores: Build) -> None:
    ids, request = tokens(batch=3), scored(with_scores("llama"))
    (together,) = run_steps(request, ids, (TOKENS,))
    for i in range(3):
        (alone,) = run_steps(request, ids[i : i + 1], (TOKENS,))
        for name in ("attention_scores.0", "attention_scores.1"):
            assert together[name].shape == (3, NUM_HEADS, TOKENS)
            np.testing.assert_allclose(together[name][i], alone[name][0], atol=1e-5, rtol=0)


def test_a_gguf_has_the_scores_of_its_own_weights(tiny_hf: Build, tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "m.gguf", tiny_hf("llama"), "Q8_0")
    info = export_model(tmp_path / "m.gguf", tmp_path / "out", attention_scores=W)
    assert info.attention_scores == W
    attentions = eager_attentions(tmp_path, tokens()[0], gguf_file="m.gguf")
    request = scored(tmp_path / "out")
    for steps in STEPS:
        assert_scores_are_means(run_steps(request, tokens(), steps), steps, attentions)


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_compressed_weights_are_shared_too(weight_format: str, tiny_ir: Build, tmp_path: Path) -> None:
    folder = tmp_path / "ir"
    shutil.copytree(tiny_ir("qwen2"), folder)
    pipeline.compress(folder, WeightOptions(weight_format), lambda _: None)
    size = (folder / "openvino_model.bin").stat().st_size
    write_scores_model(folder, W)
    assert (folder / "openvino_model.bin").stat().st_size < size + 1024
    steps = (40, 35)
    for a, b in zip(*(run_steps(request(folder), tokens(), steps) for request in (plain, scored)), strict=True):
        np.testing.assert_allclose(b["logits"], a["logits"], atol=1e-3, rtol=0)
        np.testing.assert_allclose(b["attention_scores.0"].sum(axis=-1), 1, atol=1e-5)


def attention_model(mask_type: ov.Type, causal: bool = False, sinks: bool = False) -> ov.Model:
    """One attention operation by itself, with inputs q, k, v, mask: 4 heads of 16 channels."""
    tensors = [ops.parameter(ov.PartialShape([-1, 4, -1, 16]), ov.Type.f32, name=name) for name in "qkv"]
    mask = ops.parameter(ov.PartialShape([-1, -1]), mask_type, name="mask")
    more = [ops.constant(np.float32(1)), ops.constant(np.zeros((1, 4, 1, 1), np.float32))] if sinks else []
    if sinks:
        from openvino.utils.node_factory import NodeFactory

        inputs = [node.output(0) for node in (*tensors, mask, *more)]
        attention = NodeFactory("opset13").create("ScaledDotProductAttention", inputs, {"causal": causal})
    else:
        attention = ops.scaled_dot_product_attention(*tensors, mask, causal=causal)
    return ov.Model([attention], [*tensors, mask])


@pytest.mark.parametrize("mask_type", [ov.Type.boolean, ov.Type.f32])
def test_scores_of_one_operation_are_masked_softmax(mask_type: ov.Type) -> None:
    model = attention_model(mask_type)
    assert add_score_outputs(model, 3) == 1
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 4, rows, 16)).astype(np.float32) for rows in (5, 9, 9))
    seen = rng.random((5, 9)) < 0.6
    seen[:, 0] = True
    mask = seen if mask_type == ov.Type.boolean else np.where(seen, 0, -np.inf).astype(np.float32)
    scores = open_core().compile_model(model, "CPU", F32)([q, k, v, mask])["attention_scores.0"]
    logits = np.where(seen, q @ k.transpose(0, 1, 3, 2) / 4, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    expected = (weights / weights.sum(axis=-1, keepdims=True))[:, :, -3:].mean(axis=2)
    np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=0)


def test_attention_whose_scores_cannot_be_told_is_refused() -> None:
    with pytest.raises(ModelError, match="must be given its mask"):
        add_score_outputs(attention_model(ov.Type.f32, causal=True), W)
    with pytest.raises(ModelError, match="must be without sinks"):
        add_score_outputs(attention_model(ov.Type.f32, sinks=True), W)
    node = ops.parameter(ov.PartialShape([1]), ov.Type.f32)
    with pytest.raises(ModelError, match="must use ScaledDotProductAttention"):
        add_score_outputs(ov.Model([ops.relu(node)], [node]), W)
    with pytest.raises(CrushError, match="window must be an integer of at least 1, got 0"):
        add_score_outputs(attention_model(ov.Type.f32), 0)


@pytest.mark.parametrize("window", [0, -1, 1.5, True, "8"])
def test_wrong_window_is_refused_before_anything_else(
    window: Any, tiny_hf: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model_export.export.check_hf_folder", lambda *_: pytest.fail("the source was read"))
    message = rf"attention_scores must be an integer of at least 1, got {window!r}"
    with pytest.raises(ExportError, match=re.escape(message)):
        export_model(tiny_hf("llama"), tmp_path / "out", attention_scores=window)
    assert list(tmp_path.iterdir()) == []


def test_command_line_explains_and_refuses(tiny_hf: Build, tmp_path: Path) -> None:
    runner = CliRunner()
    text = " ".join(runner.invoke(app, ["--help"]).output.split())
    assert "--attention-scores" in text
    assert "openvino_model_scores.xml" in text
    for value, words in (("0", "attention_scores must be an integer"), ("x", "--attention-scores"), ("1.5", "integer")):
        done = runner.invoke(app, [str(tiny_hf("llama")), str(tmp_path / "out"), "--attention-scores", value])
        assert done.exit_code == 2
        assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_disk_estimate_has_room_for_the_second_copy(tiny_hf: Build, tmp_path: Path) -> None:
    source = check_hf_folder(tiny_hf("llama"))
    for weight_format in ("fp32", "fp16"):
        options = WeightOptions(weight_format)
        size = source.num_weights * (4 if weight_format == "fp32" else 2)
        assert needed_bytes(source, options, with_scores=True) == needed_bytes(source, options) + size


def test_damaged_scores_are_refused(with_scores: Build, tiny_ir: Build, tmp_path: Path) -> None:
    folder = tmp_path / "short"
    shutil.copytree(with_scores("llama"), folder)
    check_model_folder(folder)
    size = (folder / "openvino_model.bin").stat().st_size
    with open(folder / "openvino_model.bin", "r+b") as file:
        file.truncate(size - 1)  # still whole for the plain model
    with pytest.raises(ModelError, match=rf"must have at least {size} bytes, got {size - 1}"):
        check_model_folder(folder)
    (folder / "openvino_model_scores.xml").write_text("<net")
    with pytest.raises(ModelError, match="stops early"):
        check_model_folder(folder)
    with pytest.raises(ModelError, match="must be a readable OpenVINO model"):
        read_scores_model(folder)
    with pytest.raises(ModelError, match="export it with --attention-scores W"):
        read_scores_model(tiny_ir("llama"))


def test_failure_midway_leaves_nothing(
    tiny_hf: Build, tiny_ir: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = tiny_ir("llama")
    monkeypatch.setattr(pipeline, "export_folder", lambda _, out, *__: shutil.copytree(ready, out, dirs_exist_ok=True))
    monkeypatch.setattr("model_export.scores.os.fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(ExportError, match="no space left"):
        export_model(tiny_hf("llama"), tmp_path / "out", "fp32", attention_scores=W)
    assert list(tmp_path.iterdir()) == []


def test_sample_draws_what_policies_keep(exported: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "map.png"
    text.write_text("The sea is calm today. " * 20)
    names = "kvcrush,snapkv,h2o,streaming_llm,random"
    told = run_sample("kept_map.py", str(exported), "--policies", names, "--text", str(text), "--kept", "0.5",
                      "--out", str(out))  # fmt: skip
    found = re.findall(r"(\w+): ([\d.]+) % of 460 tokens stay \(([\d.]+) % as representatives\)", told)
    assert [name for name, _, _ in found] == names.split(",")
    for name, stay, stand_ins in found:
        assert float(stay) == 50
        assert (float(stand_ins) > 0) == (name == "kvcrush")
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("keydiff", "'keydiff', which needs keys"),
        ("tova", "'tova' with 1: export the model with --attention-scores 1"),
        ("kv_compress", "'kv_compress', which takes sum_squares"),
        ("snapkw", "did you mean 'snapkv'"),
    ],
)
def test_sample_refuses_policies_by_name(exported: Path, policy: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        run_sample("kept_map.py", str(exported), "--policies", f"kvcrush,{policy}")
