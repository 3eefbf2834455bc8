"""An export is refused early or finishes whole; what it writes loads in stock openvino_genai."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from covering import rarely
from tiny_gguf import tiny_gguf
from tiny_models import kinds, tiny_model
from typer.testing import CliRunner

from model_export import checks, export_model, pipeline
from model_export.cli import app
from model_export.options import WEIGHT_FORMATS, WeightOptions
from ov_kvcrush.errors import ExportError
from ov_kvcrush.model.folder import check_model_folder
from ov_kvcrush.model.info import ModelInfo
from ov_kvcrush.model.plugin import capped_properties
from ov_kvcrush.utils.atomic import atomic_folder

Build = Callable[[str], Path]
REPOSITORY = Path(__file__).parents[2]


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


@pytest.mark.parametrize("kind", kinds())
def test_exported_folder_generates_in_stock_genai(tiny_ir: Build, kind: str) -> None:
    import openvino_genai

    folder = tiny_ir(kind)
    check_model_folder(folder)
    assert {"config.json", "generation_config.json", "chat_template.jinja", "ov_kvcrush.json"} <= {
        file.name for file in folder.iterdir()
    }
    llm = openvino_genai.LLMPipeline(folder, "CPU", **capped_properties())
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

    result = openvino_genai.LLMPipeline(compressed(weight_format), "CPU", **capped_properties()).generate(
        ["hello"], max_new_tokens=3
    )
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


def test_disk_estimate_covers_what_is_written(tiny_hf: Build, tiny_ir: Build, compressed: Build) -> None:
    source = checks.check_hf_folder(tiny_hf("llama"))
    weights = (tiny_ir("llama") / "openvino_model.bin").stat().st_size
    assert 0.98 * weights < source.num_weights * 4 < 1.02 * weights
    for weight_format in ("fp16", "int8", "int4"):
        written = sum(file.stat().st_size for file in compressed(weight_format).iterdir())
        assert written < checks.needed_bytes(source, WeightOptions(weight_format))


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
    monkeypatch.setattr(pipeline, "_to_ir", lambda *_: None)
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
        with atomic_folder(target) as first:
            (first / "a").write_text("first")
            with atomic_folder(target) as second:
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
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert {file.name for file in tmp_path.iterdir()} == {"out", ".other.partial-x"}


@pytest.mark.parametrize("weight_format", ["fp32", *rarely("int8")])
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
        llm = openvino_genai.LLMPipeline(
            folder, "CPU", **{**capped_properties(), "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        )
        texts.append(llm.generate(["hello there"], max_new_tokens=8, ignore_eos=True).texts[0])
    if weight_format == "fp32":  # the same weights, with and without their quantisation
        assert texts[0] == texts[1]


@pytest.mark.usefixtures("quick_export")
def test_hub_model_is_exported_under_its_name(tiny_hf: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: str(tiny_hf("llama") / "config.json"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tiny_hf("llama")))
    assert export_model("owner/name", tmp_path / "out").source_name == "owner/name"


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
