"""The bench beside llama.cpp: what its process is asked for, with a fake in its place, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_llama_cpp import VERSION, notes, write_fake_llama_cpp
from tiny_gguf import tiny_gguf
from typer.testing import CliRunner, Result

from ov_kvcrush.bench import peers
from ov_kvcrush.bench.cli import app
from ov_kvcrush.bench.measure import random_prompts
from ov_kvcrush.bench.settings import BenchSettings, Cell
from ov_kvcrush.errors import CrushError
from ov_kvcrush.model.converted import folder_of_gguf
from ov_kvcrush.model.plugin import plugin_threads

AGAINST = ("--against", "llama.cpp")


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def gguf(tiny_hf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tiny_gguf(path, tiny_hf("llama"), "Q4_1")
    return path


@pytest.fixture(scope="module")
def folder(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OV_KVCRUSH_CACHE", str(tmp_path_factory.mktemp("cache")))
        return folder_of_gguf(gguf, lambda _: None)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake is installed, for child processes too; what it notes."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    return write_fake_llama_cpp(tmp_path)


def test_both_engines_read_the_same_file_prompts_and_chunks(gguf: Path, folder: Path, log: Path) -> None:
    report = log.with_name("report.json")
    shape = ("--context", 40, "--new-tokens", 4, "--runs", 2, "--max-num-batched-tokens", 24)
    done = bench(folder, "--gguf", gguf, *AGAINST, *shape, "--property", "INFERENCE_NUM_THREADS=1", "--json", report)
    assert done.exit_code == 0, done.output
    assert "crush / llama.cpp" in done.output
    assert f"llama.cpp: llama-cpp-python {VERSION}" in done.output
    loaded = json.loads(report.read_text())
    ours, theirs = loaded["rows"]
    assert (ours["engine"], theirs["engine"]) == ("crush", "llama.cpp")
    assert loaded["environment"]["versions"]["llama-cpp-python"] == VERSION
    assert [(len(row["runs"]), row["kept_tokens"]) for row in (ours, theirs)] == [(2, 40), (2, 40)]
    assert {run["num_steps"] for run in ours["runs"]} == {run["num_steps"] for run in theirs["runs"]} == {2 + 3}
    assert (theirs["kv_bytes"], theirs["key_precision"]) == (10 * (40 + 3), "f16")

    begin, *asked = notes(log)
    assert begin["model"] == str(gguf)
    options = begin["options"]
    assert (options["n_threads"], options["n_threads_batch"], options["n_batch"]) == (1, 1, 24)
    vocab_size = BenchSettings.for_model(folder).vocab_size
    prompt = random_prompts(1, 40, vocab_size, loaded["settings"]["seed"])[0].tolist()
    run = [{"reset": True}, {"eval": prompt[:24]}, {"eval": prompt[24:]}, *({"eval": [n]} for n in (40, 41, 42))]
    assert asked == run * 3  # the warm-up too


def test_threads_are_those_of_openvino(gguf: Path, folder: Path, log: Path) -> None:
    job = BenchSettings.for_model(folder, against="llama.cpp", gguf=gguf).worker_job("llama.cpp", Cell(64, 1))
    peers.LlamaUnderTest(job)
    assert notes(log)[0]["options"]["n_threads"] == plugin_threads({})


def test_what_llama_cpp_cannot_load_is_bad_input(folder: Path, gguf: Path, log: Path) -> None:
    job = BenchSettings.for_model(folder, against="llama.cpp", gguf=gguf).worker_job("llama.cpp", Cell(64, 1))
    with pytest.raises(CrushError, match=r"one that llama\.cpp can load, got: no file"):
        peers.LlamaUnderTest({**job, "gguf": "/nowhere/x.gguf"})


def test_refusals_are_one_clear_line(gguf: Path, folder: Path, smollm2: Path, log: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(gguf.read_bytes() + bytes(32))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"nothing of the kind at all")
    cases = {
        "must have a GGUF file, as MODEL or by --gguf beside the folder": (folder, *AGAINST),
        "--gguf must be the file that": (folder, *AGAINST, "--gguf", other),
        "must be the file that ": (smollm2, *AGAINST, "--gguf", gguf),
        "this is not a GGUF file": (folder, *AGAINST, "--gguf", broken),
        "nowhere.gguf must be a readable file": (folder, *AGAINST, "--gguf", "nowhere.gguf"),
        "--gguf must be left out with a GGUF file as MODEL": (gguf, *AGAINST, "--gguf", gguf),
        "--gguf must be left out without --against llama.cpp": (folder, "--gguf", gguf),
        "--batch must be 1 with --against llama.cpp, got 2": (gguf, *AGAINST, "--batch", 2),
        "--against llama.cpp must be left out with --traffic": (gguf, *AGAINST, "--traffic"),
        "--gguf must be left out with --attention": (folder, "--attention", "--gguf", gguf),
    }
    for message, arguments in cases.items():
        done = bench(*arguments)
        errors = [line for line in done.output.splitlines() if line.startswith("error: ")]
        assert (done.exit_code, len(errors)) == (2, 1), done.output
        assert message in errors[0]


def test_without_the_extra_it_is_named(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CrushError, match=r"must have llama-cpp-python, got none; pip install 'ov-kvcrush\[peers\]'"):
        BenchSettings.for_model(gguf, against="llama.cpp")
    assert peers.peer_versions(("crush", "genai")) == {}
