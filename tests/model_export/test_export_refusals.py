"""What cannot be exported is refused before anything heavy starts, with the reason, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_gguf import tiny_gguf

from model_export import checks, export_model, pipeline
from model_export.options import WEIGHT_FORMATS
from ov_kvcrush.errors import CrushError, ExportError

Build = Callable[[str], Path]


@pytest.fixture
def no_heavy_work(tiny_ir: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if anything heavy starts."""
    tiny_ir("llama")  # built before it is forbidden

    def fail(*_: object) -> None:
        raise AssertionError("heavy work was started")

    for name in ("export_folder", "export_gguf"):
        monkeypatch.setattr(pipeline, name, fail)
    monkeypatch.setattr("model_export.export.source_sha256", fail)


@pytest.fixture
def llama_copy(tiny_hf: Build, tmp_path: Path) -> Path:
    """A Hugging Face folder that a test may damage."""
    return Path(shutil.copytree(tiny_hf("llama"), tmp_path / "source"))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"weight_format": "int5"}, "weight_format.*did you mean 'int"),
    ({"weight_format": "fp-16"}, "weight_format.*did you mean 'fp16"),
    ({"weight_format": "int8", "group_size": 64}, "group_size"),
    ({"weight_format": "fp32", "sym": True}, "sym"),
    ({"weight_format": "int4", "ratio": 0.0}, "ratio"),
    ({"weight_format": "int4", "ratio": 1.5}, "ratio"),
    ({"weight_format": "int4", "group_size": 0}, "group_size"),
]


@pytest.mark.usefixtures("no_heavy_work")
@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS, ids=[str(o) for o, _ in BAD_OPTIONS])
def test_wrong_option_is_refused(tiny_hf: Build, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ExportError, match=words):
        export_model(tiny_hf("llama"), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "encoder-decoder": ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
    "state-space": ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "state"),
    "latent attention": ({"kv_lora_rank": 512}, "latent attention"),
    "multimodal": ({"vision_config": {"x": 1}}, "multimodal"),
    "encoder-only": ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "not a causal"),
    "no layers": ({"num_hidden_layers": None}, "num_hidden_layers"),
}


@pytest.mark.usefixtures("no_heavy_work")
@pytest.mark.parametrize("case", UNSUPPORTED)
def test_model_that_cannot_be_run_is_refused(llama_copy: Path, tmp_path: Path, case: str) -> None:
    changes, words = UNSUPPORTED[case]
    edit_config(llama_copy, **changes)
    with pytest.raises(ExportError, match=words):
        export_model(llama_copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def truncate_weights(folder: Path) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1000)


def cut_weights_by_one(folder: Path) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate((folder / "model.safetensors").stat().st_size - 1)


def spoil_weights_header(folder: Path) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(8)
        file.write(b"}")


def demand_a_shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "without config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "valid JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "must have weights"),
    "short weights": (truncate_weights, "safetensors"),
    "weights one byte short": (cut_weights_by_one, "truncated"),
    "spoilt weights": (spoil_weights_header, "header"),
    "missing shard": (demand_a_shard, r"without \['model-2.safetensors'\]"),
    "no tokenizer": (lambda f: [file.unlink() for file in f.glob("tokenizer*")], "must have a tokenizer"),
}


@pytest.mark.usefixtures("no_heavy_work")
@pytest.mark.parametrize("case", DAMAGE)
def test_incomplete_source_is_refused(llama_copy: Path, tmp_path: Path, case: str) -> None:
    damage, words = DAMAGE[case]
    damage(llama_copy)
    with pytest.raises(CrushError, match=words):
        export_model(llama_copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_heavy_work")
def test_what_is_no_source_is_refused(tiny_ir: Build, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("hello")
    (tmp_path / "bare").mkdir()
    shutil.copy(tiny_ir("llama") / "openvino_model.xml", tmp_path / "bare")
    cases = {
        tmp_path / "none": "folder that exists, a hub id",
        tmp_path / "none.gguf": "file that exists",
        tmp_path / "file.txt": "got the file",
        tmp_path / "bare": "OpenVINO model already",
        "no-such-owner/no-such-model": "reachable hub model",
    }
    for source, words in cases.items():
        with pytest.raises(ExportError, match=words):
            export_model(source, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_heavy_work")
def test_hub_model_is_refused_by_its_config_alone(
    tiny_hf: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: str(tmp_path / "config.json"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("weights were fetched"))
    with pytest.raises(ExportError, match=r"got owner/name: MambaForCausalLM cannot be run"):
        export_model("owner/name", tmp_path / "out")


@pytest.mark.usefixtures("no_heavy_work")
def test_target_that_cannot_be_is_refused(tiny_hf: Build, tmp_path: Path) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    file.write_text("mine")
    with pytest.raises(ExportError, match="empty or absent"):
        export_model(tiny_hf("llama"), full)
    with pytest.raises(ExportError, match="must be a model folder to be overwritten"):
        export_model(tiny_hf("llama"), full, overwrite=True)
    with pytest.raises(ExportError, match="must be a folder"):
        export_model(tiny_hf("llama"), file, overwrite=True)
    assert (full / "notes.txt").read_text() == file.read_text() == "mine"


@pytest.mark.usefixtures("no_heavy_work")
@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_too_little_disk_is_refused_with_both_numbers(
    tiny_hf: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight_format: str
) -> None:
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=50_000_000))
    with pytest.raises(ExportError, match=r"about 0\.07 GB free.*got 0\.05 GB"):
        export_model(tiny_hf("llama"), tmp_path / "out", weight_format)


@pytest.mark.usefixtures("no_heavy_work")
def test_missing_extra_is_named(tiny_hf: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checks.importlib.util.find_spec
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None if name == "nncf" else real(name))
    with pytest.raises(ExportError, match=r'nncf.*pip install "ov-kvcrush\[export\]"'):
        export_model(tiny_hf("llama"), tmp_path / "out")


@pytest.mark.usefixtures("no_heavy_work")
@pytest.mark.parametrize("weight_format", [None, "fp32"])
def test_truncated_gguf_is_refused(tiny_hf: Build, tmp_path: Path, weight_format: str | None) -> None:
    source = tmp_path / "m.gguf"
    tiny_gguf(source, tiny_hf("llama"), "Q8_0")
    size = source.stat().st_size
    os.truncate(source, size - 100)
    with pytest.raises(CrushError, match=rf"the file has {size - 100} bytes"):
        export_model(source, tmp_path / "out", weight_format)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_compression_options_of_a_gguf_need_a_weight_format(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="weight_format must be given"):
        export_model(tmp_path / "m.gguf", tmp_path / "out", group_size=64)
