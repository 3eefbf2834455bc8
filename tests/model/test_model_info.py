"""ov_kvcrush.json: what is written is read, and what is broken is refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import (
    CONTEXT_LENGTH,
    HEAD_SIZE,
    HIDDEN_SIZE,
    KINDS,
    NUM_HEADS,
    NUM_KV_HEADS,
    SLIDING_WINDOWS,
    VOCAB_SIZE,
)

from ov_kvcrush.errors import ModelError
from ov_kvcrush.model.info import FILE_NAME, ModelInfo, read_model_info
from ov_kvcrush.model.plugin import open_core
from ov_kvcrush.model.support import unsupported_reason

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 128,
    "vocab_size": 288,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
}


def info(**changes: Any) -> ModelInfo:
    base = ModelInfo.from_hf_config(
        LLAMA, weight_format="int8", versions={"openvino": "1"}, source_name="x", source_sha256="0" * 64
    )
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize(
    "value",
    [info(), info(sliding_windows=(None, 16)), info(context_length=None), info(rope={"type": "none"})],
    ids=["plain", "sliding", "no-context", "no-rope"],
)
def test_what_is_written_is_read(tmp_path: Path, value: ModelInfo) -> None:
    value.write(tmp_path)
    assert ModelInfo.read(tmp_path) == value
    assert read_model_info(tmp_path) == value
    assert [file.name for file in tmp_path.iterdir()] == [FILE_NAME]


def test_absent_file_is_none(tmp_path: Path) -> None:
    assert ModelInfo.read(tmp_path) is None
    assert read_model_info(tmp_path) is None


def test_config_json_is_the_fallback(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    found = read_model_info(tmp_path)
    assert found is not None
    assert dataclasses.replace(found, source_name="") == ModelInfo.from_hf_config(LLAMA)
    assert found.weight_format is None


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info().write(tmp_path)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        info(context_length=7).write(tmp_path)
    assert ModelInfo.read(tmp_path) == info()
    assert [file.name for file in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ModelInfo) if f.name != "attention_scores"])
def test_missing_field_is_named(tmp_path: Path, name: str) -> None:
    data = info().to_json()
    del data[name]
    (tmp_path / FILE_NAME).write_text(json.dumps(data))
    with pytest.raises(ModelError, match=name):
        ModelInfo.read(tmp_path)


WRONG: list[tuple[str, Any]] = [
    ("architecture", ""),
    ("model_type", 3),
    ("num_layers", 0),
    ("num_layers", True),
    ("num_heads", "4"),
    ("num_heads", 3),
    ("num_kv_heads", -2),
    ("k_head_size", 32.0),
    ("v_head_size", None),
    ("hidden_size", 0),
    ("vocab_size", []),
    ("context_length", 0),
    ("sliding_windows", [None]),
    ("sliding_windows", [None, 0]),
    ("sliding_windows", None),
    ("rope", {}),
    ("rope", {"type": "default", "theta": -1.0, "scaling": None, "rotary_fraction": 1.0}),
    ("rope", {"type": "default", "theta": 1.0, "scaling": 3, "rotary_fraction": 1.0}),
    ("rope", {"type": "default", "theta": 1.0, "scaling": None, "rotary_fraction": 1.5}),
    ("rope", {"type": "default", "theta": 1.0, "scaling": None, "rotary_fraction": 1.0, "local": {"type": 1}}),
    ("weight_format", 4),
    ("versions", {"openvino": 2}),
    ("source_name", None),
    ("source_sha256", "abc"),
    ("format_version", 2),
    ("format_version", "1"),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{n}={v!r}"[:40] for n, v in WRONG])
def test_wrong_value_is_refused_by_name(tmp_path: Path, name: str, value: Any) -> None:
    data = info().to_json()
    data[name] = value
    (tmp_path / FILE_NAME).write_text(json.dumps(data))
    with pytest.raises(ModelError, match=name):
        ModelInfo.read(tmp_path)


def test_unknown_field_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(json.dumps({**info().to_json(), "num_layer": 3}))
    with pytest.raises(ModelError, match="did you mean 'num_layers'"):
        ModelInfo.read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", '"' + "x" * (5 << 20) + '"', "[" * 100_000])
def test_broken_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=FILE_NAME):
        ModelInfo.read(tmp_path)
    (tmp_path / FILE_NAME).rename(tmp_path / "config.json")
    with pytest.raises(ModelError, match=r"config\.json"):
        read_model_info(tmp_path)


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"])
def test_config_without_a_count_is_refused_by_name(name: str) -> None:
    with pytest.raises(ModelError, match=name):
        ModelInfo.from_hf_config({key: value for key, value in LLAMA.items() if key != name})


def windows(**config: Any) -> tuple[int | None, ...]:
    return ModelInfo.from_hf_config({**LLAMA, "num_hidden_layers": 6, **config}).sliding_windows


def test_sliding_windows_of_each_family() -> None:
    kinds = ["sliding_attention", "full_attention"] * 3
    six = (8,) * 6
    assert windows(model_type="mistral", sliding_window=8) == six
    assert windows(model_type="mistral", sliding_window=None) == (None,) * 6
    assert windows(model_type="phi3", sliding_window=8) == six
    assert windows(model_type="qwen2", sliding_window=8, use_sliding_window=False) == (None,) * 6
    upper = windows(model_type="qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=4)
    assert upper == (None,) * 4 + (8,) * 2
    assert windows(model_type="qwen3", sliding_window=8, use_sliding_window=True, layer_types=kinds) == (8, None) * 3
    assert windows(model_type="gemma3_text", sliding_window=8) == (8,) * 5 + (None,)
    assert windows(model_type="gemma3_text", sliding_window=8, sliding_window_pattern=3) == (8, 8, None) * 2
    assert windows(model_type="gemma3_text", sliding_window=8, layer_types=kinds) == (8, None) * 3
    assert windows(model_type="llama", sliding_window=8) == (None,) * 6


def test_rope_of_old_and_new_configs() -> None:
    plain = {"type": "default", "theta": 5e5, "scaling": None, "rotary_fraction": 1.0}
    scaled = {**plain, "type": "llama3", "scaling": {"factor": 8.0}}
    without = {key: value for key, value in LLAMA.items() if key != "rope_theta"}

    def rope(**config: Any) -> Any:
        return ModelInfo.from_hf_config({**without, **config}).rope

    assert rope(rope_theta=5e5) == plain
    assert rope(rope_parameters={"rope_type": "default", "rope_theta": 5e5}) == plain
    assert rope(rope_theta=5e5, rope_scaling={"type": "llama3", "factor": 8.0}) == scaled
    assert rope(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}) == scaled
    assert rope(model_type="gpt_neox", rotary_emb_base=5e5, rotary_pct=0.25) == {**plain, "rotary_fraction": 0.25}
    assert rope()["theta"] == 10000.0
    local = {**plain, "theta": 1e4}
    assert rope(rope_theta=5e5, rope_local_base_freq=1e4) == {**plain, "local": local}
    per_layer = {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1e4}}
    assert rope(rope_parameters=per_layer) == {**plain, "local": local}
    assert rope(model_type="gpt2") == {"type": "none"}


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "encoder-decoder": ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "encoder-decoder"),
    "is_encoder_decoder": ({"is_encoder_decoder": True}, "encoder-decoder"),
    "mamba": ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "state"),
    "rwkv": ({"architectures": ["RwkvForCausalLM"], "model_type": "rwkv"}, "state"),
    "hybrid layers": ({"layer_types": ["linear_attention", "full_attention"]}, "linear attention"),
    "own code": ({"model_type": "internlm2"}, "trust_remote_code"),
    "wrong graph": ({"model_type": "phimoe"}, "computes something else"),
    "latent attention": ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "latent attention"),
    "multimodal": ({"vision_config": {"x": 1}}, "multimodal"),
    "encoder-only": ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "not a causal language model"),
    "classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
    "chunked": ({"attention_chunk_size": 8192}, "chunks"),
    "nothing": ({"architectures": None, "model_type": None}, "no model_type"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_model_that_cannot_be_run_has_a_reason(case: str) -> None:
    changes, words = UNSUPPORTED[case]
    reason = unsupported_reason({**LLAMA, **changes})
    assert reason is not None
    assert words in reason
    assert unsupported_reason(LLAMA) is None


@pytest.mark.parametrize("kind", KINDS)
def test_exported_info_tells_the_shape(
    tiny_ir: Callable[[str], Path], tiny_hf: Callable[[str], Path], kind: str
) -> None:
    found = ModelInfo.read(tiny_ir(kind))
    assert found is not None
    config = json.loads((tiny_hf(kind) / "config.json").read_text())
    num_layers = config["num_hidden_layers"]
    assert (found.architecture, found.num_layers) == (config["architectures"][0], num_layers)
    assert found.num_heads == NUM_HEADS
    assert found.num_kv_heads == (NUM_HEADS if kind == "gpt_neox" else NUM_KV_HEADS)
    assert (found.k_head_size, found.v_head_size) == (HEAD_SIZE, HEAD_SIZE)
    assert (found.hidden_size, found.vocab_size, found.context_length) == (HIDDEN_SIZE, VOCAB_SIZE, CONTEXT_LENGTH)
    assert found.sliding_windows == SLIDING_WINDOWS.get(kind, (None,) * num_layers)
    assert found.rope["rotary_fraction"] == (0.25 if kind == "gpt_neox" else 1.0)
    assert ("local" in found.rope) == (kind == "gemma3")
    assert found.weight_format == "fp32"
    assert unsupported_reason(config) is None


@pytest.mark.parametrize("kind", KINDS)
def test_windows_and_shape_agree_with_the_graph(tiny_ir: Callable[[str], Path], kind: str) -> None:
    """The graph is the truth: fold what each attention node got as its window, and read its cache's shape."""
    import openvino as ov
    from openvino._offline_transformations import paged_attention_transformation

    found = ModelInfo.read(tiny_ir(kind))
    assert found is not None
    core = open_core()
    model = core.read_model(tiny_ir(kind) / "openvino_model.xml")
    paged_attention_transformation(model, True, False, False, False, False, False)
    nodes = [node for node in model.get_ordered_ops() if node.get_type_name() == "PagedAttentionExtension"]
    folded = [core.compile_model(ov.Model([node.input_value(10)], []), "CPU")([])[0].item() for node in nodes]
    assert tuple(int(window) or None for window in folded) == found.sliding_windows
    for node in nodes:
        shape = [node.get_rt_info()[key].value for key in ("num_k_heads", "k_head_size", "v_head_size")]
        assert shape == [found.num_kv_heads, found.k_head_size, found.v_head_size]
