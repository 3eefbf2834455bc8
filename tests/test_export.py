"""An export is refused early or finishes whole; what it writes loads in stock openvino_genai."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_gguf import tiny_gguf
from tiny_models import KINDS, tiny_model
from typer.testing import CliRunner

from model_export import checks, export_model, pipeline
from model_export.cli import app
from model_export.options import WEIGHT_FORMATS, WeightOptions
from ov_kvcrush.errors import CrushError, ExportError
from ov_kvcrush.model_folder import check_model_folder
from ov_kvcrush.model_info import ModelInfo
from ov_kvcrush.safe_folder import finished_folder

Build = Callable[[str], Path]
REPOSITORY = Path(__file__).parent.parent


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
def quick_export(tiny_ir: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the heavy part take a folder that was exported before, for tests of what is around it."""
    ready = tiny_ir("llama")

    def export_folder(_source: Path, out: Path, *_: object) -> None:
        shutil.copytree(ready, out, dirs_exist_ok=True)

    monkeypatch.setattr(pipeline, "export_folder", export_folder)


@pytest.fixture(scope="module")
def compressed(tiny_hf: Build, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Return a function from a weight format to the llama exported in it, once per session."""
    folders: dict[str, Path] = {}

    def build(weight_format: str) -> Path:
        if weight_format not in folders:
            folders[weight_format] = tmp_path_factory.mktemp("compressed") / weight_format
            export_model(tiny_hf("llama"), folders[weight_format], weight_format)
        return folders[weight_format]

    return build


@pytest.fixture
def llama_copy(tiny_hf: Build, tmp_path: Path) -> Path:
    """A Hugging Face folder that a test may damage."""
    return Path(shutil.copytree(tiny_hf("llama"), tmp_path / "source"))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("kind", KINDS)
def test_exported_folder_generates_in_stock_genai(tiny_ir: Build, kind: str) -> None:
    import openvino_genai

    folder = tiny_ir(kind)
    check_model_folder(folder)
    assert {"config.json", "generation_config.json", "chat_template.jinja", "ov_kvcrush.json"} <= {
        file.name for file in folder.iterdir()
    }
    llm = openvino_genai.LLMPipeline(folder, "CPU")
    result = llm.generate(["hello"], max_new_tokens=5, ignore_eos=True)
    assert result.perf_metrics.get_num_generated_tokens() == 5
    assert llm.get_tokenizer().get_eos_token_id() == 257
    assert "<|start|>user" in llm.get_tokenizer().apply_chat_template([{"role": "user", "content": "hi"}], True)


def test_weight_formats_shrink_and_are_recorded(tiny_ir: Build, compressed: Build) -> None:
    import openvino as ov

    sizes, hashes = {}, set()
    for weight_format in WEIGHT_FORMATS:
        folder = tiny_ir("llama") if weight_format == "fp32" else compressed(weight_format)
        info = ModelInfo.read(folder)
        assert info is not None
        assert info.weight_format == weight_format
        assert info.versions["optimum-intel"]
        assert info.source_name == "llama"
        hashes.add(info.source_sha256)
        sizes[weight_format] = (folder / "openvino_model.bin").stat().st_size
        model = ov.Core().read_model(folder / "openvino_model.xml")
        # Uncompressed models ask for an f16 cache; compressed ones leave the precision to the plugin.
        asks = model.has_rt_info(["runtime_options", "KV_CACHE_PRECISION"])
        assert asks == (weight_format in ("fp32", "fp16"))
    assert sizes["fp32"] > 1.9 * sizes["fp16"]
    assert sizes["fp16"] > 1.9 * sizes["int8"]
    assert sizes["int8"] > 1.5 * sizes["int4"]
    assert len(hashes) == 1


@pytest.mark.parametrize("weight_format", ["fp16", "int8", "int4"])
def test_compressed_model_generates_in_stock_genai(compressed: Build, weight_format: str) -> None:
    import openvino_genai

    result = openvino_genai.LLMPipeline(compressed(weight_format), "CPU").generate(["hello"], max_new_tokens=3)
    assert result.texts


def test_hash_follows_the_weights_and_the_config(tiny_hf: Build, tiny_ir: Build, tmp_path: Path) -> None:
    from model_export.export import source_sha256

    def digest(folder: Path) -> str:
        return source_sha256(checks.check_hf_folder(folder))

    info = ModelInfo.read(tiny_ir("llama"))
    assert info is not None
    assert digest(tiny_hf("llama")) == info.source_sha256
    assert digest(tiny_model("llama", tmp_path / "same", seed=0)) == info.source_sha256
    assert digest(tiny_model("llama", tmp_path / "other", seed=1)) != info.source_sha256
    assert digest(tiny_model("llama", tmp_path / "longer", seed=0, max_position_embeddings=64)) != info.source_sha256


def test_options_of_int4_reach_the_weights(tiny_ir: Build, tmp_path: Path) -> None:
    def size(name: str, **options: Any) -> int:
        folder = shutil.copytree(tiny_ir("llama"), tmp_path / name)
        pipeline.compress(folder, WeightOptions("int4", **options), lambda _: None)
        assert {file.name for file in folder.iterdir()} == {file.name for file in tiny_ir("llama").iterdir()}
        return (folder / "openvino_model.bin").stat().st_size

    plain, small_groups, half = size("plain"), size("groups", group_size=32), size("half", ratio=0.5)
    assert size("sym", sym=True) < plain < small_groups
    assert plain < half
    with pytest.raises(ExportError, match="group_size"):
        size("wrong", group_size=48)


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
    "soft-capped": ({"attn_logit_softcapping": 50.0}, "caps its attention scores"),
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


@pytest.mark.usefixtures("quick_export")
def test_hub_model_is_exported_under_its_name(tiny_hf: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: str(tiny_hf("llama") / "config.json"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tiny_hf("llama")))
    assert export_model("owner/name", tmp_path / "out").source_name == "owner/name"


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


def test_disk_estimate_covers_what_is_written(tiny_hf: Build, tiny_ir: Build, compressed: Build) -> None:
    source = checks.check_hf_folder(tiny_hf("llama"))
    weights = (tiny_ir("llama") / "openvino_model.bin").stat().st_size
    assert 0.98 * weights < source.num_weights * 4 < 1.02 * weights
    for weight_format in ("fp16", "int8", "int4"):
        written = sum(file.stat().st_size for file in compressed(weight_format).iterdir())
        assert written < checks.needed_bytes(source, WeightOptions(weight_format))


@pytest.mark.usefixtures("no_heavy_work")
def test_missing_extra_is_named(tiny_hf: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checks.importlib.util.find_spec
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None if name == "nncf" else real(name))
    with pytest.raises(ExportError, match=r'nncf.*pip install "ov-kvcrush\[export\]"'):
        export_model(tiny_hf("llama"), tmp_path / "out")


def test_refusal_and_own_gguf_weights_need_no_torch(tiny_hf: Build, tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "m.gguf", tiny_hf("llama"), "Q8_0")
    code = (
        "import sys\nfrom model_export import export_model\n"
        "try: export_model(sys.argv[1] + '/none', 'out')\nexcept ValueError: pass\n"
        "export_model(sys.argv[1] + '/m.gguf', sys.argv[1] + '/out')\n"
        "print(sorted({'torch', 'transformers', 'optimum.intel', 'nncf', 'gguf'} & set(sys.modules)))"
    )
    assert run_python(code, str(tmp_path)).stdout.strip() == "[]"
    check_model_folder(tmp_path / "out")


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), OSError("no space left")])
@pytest.mark.parametrize("where", ["_to_ir", "_convert_tokenizer", "compress"])
def test_failure_midway_leaves_nothing(
    tiny_hf: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    for name in ("_to_ir", "_convert_tokenizer", "compress"):
        monkeypatch.setattr(pipeline, name, fail if name == where else lambda *_: None)
    with pytest.raises((type(error), ExportError)):
        export_model(tiny_hf("llama"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_missing_tokenizer_ir_is_a_failure(tiny_hf: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum.exporters.openvino.convert.export_tokenizer", lambda *_, **__: None)
    with pytest.raises(ExportError, match="tokenizer that openvino_tokenizers can convert"):
        export_model(tiny_hf("llama"), tmp_path / "out", "fp32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick_export")
def test_killed_export_leaves_nothing_finished_and_the_next_cleans_up(
    tiny_hf: Build, tiny_ir: Build, tmp_path: Path
) -> None:
    code = (
        "import os, shutil, sys\nfrom model_export import export_model, pipeline\n"
        "def export_folder(source, out, *_):\n"
        "    shutil.copytree(sys.argv[2], out, dirs_exist_ok=True)\n"
        "    os._exit(9)\n"
        "pipeline.export_folder = export_folder\n"
        "export_model(sys.argv[1], sys.argv[3], 'fp32')"
    )
    out = tmp_path / "out"
    arguments = (str(tiny_hf("llama")), str(tiny_ir("llama")), str(out))
    assert run_python(code, *arguments, check=False).returncode == 9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".")
    assert (left / "openvino_model.xml").is_file()
    export_model(tiny_hf("llama"), out, "fp32")
    assert list(tmp_path.iterdir()) == [out]
    check_model_folder(out)


@pytest.mark.usefixtures("quick_export")
def test_overwrite_exchanges_the_model_only_when_the_new_one_is_whole(
    tiny_hf: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    before = export_model(tiny_hf("llama"), out, "fp32")
    with monkeypatch.context() as patch:
        patch.setattr("model_export.export.check_model_folder", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export_model(tiny_hf("llama"), out, "int8", overwrite=True)
    assert ModelInfo.read(out) == before
    check_model_folder(out)
    after = export_model(tiny_hf("llama"), out, "int8", overwrite=True)
    assert ModelInfo.read(out) == after
    assert after.weight_format == "int8"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.usefixtures("quick_export")
def test_failed_exchange_puts_the_old_model_back(
    tiny_hf: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    before = export_model(tiny_hf("llama"), out, "fp32")
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if ".partial-" in Path(source).name:
            raise OSError("rename failed")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(ExportError, match="rename failed"):
        export_model(tiny_hf("llama"), out, "int8", overwrite=True)
    assert ModelInfo.read(out) == before
    assert list(tmp_path.iterdir()) == [out]


def test_folder_in_the_making_is_not_taken_for_stale(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def race() -> None:
        with finished_folder(target) as first:
            (first / "a").write_text("first")
            with finished_folder(target) as second:
                assert (first / "a").is_file()
                (second / "a").write_text("second")

    with pytest.raises(FileExistsError):
        race()
    assert (target / "a").read_text() == "second"
    assert [file.name for file in target.iterdir()] == ["a"]
    assert list(tmp_path.iterdir()) == [target]


def test_stale_folders_of_other_targets_are_kept(tmp_path: Path) -> None:
    other = tmp_path / ".other.partial-x"
    other.mkdir()
    (other / ".lock").touch()
    stale = tmp_path / ".out.partial-x"
    stale.mkdir()
    (stale / ".lock").touch()
    with finished_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert {file.name for file in tmp_path.iterdir()} == {"out", ".other.partial-x"}


@pytest.mark.parametrize("weight_format", ["fp32", "int8"])
def test_gguf_in_another_weight_format(tiny_hf: Build, tmp_path: Path, weight_format: str) -> None:
    import openvino_genai

    source, out = tmp_path / "m.gguf", tmp_path / "out"
    tiny_gguf(source, tiny_hf("qwen3"), "Q8_0")
    info = export_model(source, out, weight_format)
    assert (info.weight_format, info.source_name, info.model_type) == (weight_format, "m.gguf", "qwen3")
    own = export_model(source, tmp_path / "own")
    assert (own.weight_format, own.rope, own.k_head_size) == ("gguf-Q8_0", info.rope, info.k_head_size)

    texts = []
    for folder in (out, tmp_path / "own"):
        llm = openvino_genai.LLMPipeline(folder, "CPU", INFERENCE_PRECISION_HINT="f32", KV_CACHE_PRECISION="f32")
        texts.append(llm.generate(["hello there"], max_new_tokens=8, ignore_eos=True).texts[0])
    if weight_format == "fp32":  # the same weights, with and without their quantisation
        assert texts[0] == texts[1]


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


def test_command_line_exports_and_explains(tiny_hf: Build, tmp_path: Path) -> None:
    runner = CliRunner()
    text = runner.invoke(app, ["--help"]).output
    assert "--weight-format" in text
    assert "ov_kvcrush-export model.Q8_0.gguf" in text
    out = tmp_path / "out"
    done = runner.invoke(
        app, [str(tiny_hf("gpt_neox")), str(out), "--weight-format", "int4", "--group-size", "64", "--sym"]
    )
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(out)
    assert done.stderr.splitlines()[:-1] == [
        "checking the source",
        "hashing the source",
        "converting the model",
        "converting the tokenizer",
        "compressing the weights to int4",
        "checking the result",
    ]
    again = runner.invoke(app, [str(tiny_hf("gpt_neox")), str(out)])
    assert again.exit_code == 2
    assert "OUT must be empty or absent" in again.stderr
    wrong = runner.invoke(app, [str(tiny_hf("gpt_neox")), str(tmp_path / "b"), "--weight-format", "int44"])
    assert "did you mean 'int4'" in wrong.stderr


def run_python(code: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that sees the repository's packages."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert not check or done.returncode == 0, done.stderr
    return done
