"""The command ov_kvcrush-chat: arguments, one answer, an interactive chat on a pseudo-terminal."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino_genai as ov_genai
import pytest
from covering import covering
from rich.console import Console

from ov_kvcrush import CacheConfig, LLMPipeline, RequestError, SchedulerConfig, native
from ov_kvcrush.chat import reader as reader_module
from ov_kvcrush.chat.app import run
from ov_kvcrush.chat.conversation import Conversation
from ov_kvcrush.chat.kept_view import EVICTED, KEPT, KEPT_BY_FEW, STANDS, STANDS_FOR_FEW, fates, pieces, show_kept
from ov_kvcrush.chat.options import ChatOptions
from ov_kvcrush.chat.output import AnswerWriter, Messages, visible
from ov_kvcrush.chat.reader import Message, MessageReader, one_prompt
from ov_kvcrush.chat.session import Session
from ov_kvcrush.cli.policy_options import PolicyOptions
from ov_kvcrush.core.outputs import KeptTokens
from ov_kvcrush.policies.base import DefaultBudget
from ov_kvcrush.policies.registry import as_policy, build, describe, names

ROOT = Path(__file__).parents[2]
CHAT = [sys.executable, "-m", "ov_kvcrush.chat.app"]
FRANCE = "What is the capital of France? Answer in one sentence."
STORY = "Tell me a long story about the sea."
HANG_S = 300  # a test that waits so long has failed


def chat(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CHAT, *arguments], input=stdin, capture_output=True, text=True, encoding="utf-8", cwd=ROOT, timeout=HANG_S
    )


def chat_in_process(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The same without a process of its own, which takes seconds."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        status = run(list(arguments))
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def pipe(shallow: Path) -> LLMPipeline:
    return LLMPipeline(shallow)


@pytest.fixture(scope="module")
def text_run(smollm2: Path) -> subprocess.CompletedProcess[str]:
    return chat("--prompt", FRANCE, "--stats")


@pytest.fixture(scope="module")
def json_run(smollm2: Path) -> subprocess.CompletedProcess[str]:
    return chat_in_process(str(smollm2), "--json", stdin=FRANCE + "\n")


# -- one answer --------------------------------------------------------------------------------------------------------


def test_default_model_answers_with_paris(text_run: subprocess.CompletedProcess[str]) -> None:
    assert text_run.returncode == 0, text_run.stderr
    assert "Paris" in text_run.stdout


def test_json_is_one_object_about_the_same_answer(
    text_run: subprocess.CompletedProcess[str], json_run: subprocess.CompletedProcess[str], smollm2: Path
) -> None:
    assert json_run.returncode == 0, json_run.stderr
    answer = json.loads(json_run.stdout)
    assert text_run.stdout == answer["text"] + "\n"
    assert (answer["engine"], answer["model"], answer["finish_reason"]) == ("crush", str(smollm2), "stop")
    assert answer["num_input_tokens"] > 0
    assert answer["num_generated_tokens"] > 1
    assert answer["kv_bytes"] > 0
    assert answer["ttft_s"] > 0
    assert answer["tpot_ms"] > 0


def test_stats_are_on_stderr_and_equal_those_of_json(
    text_run: subprocess.CompletedProcess[str], json_run: subprocess.CompletedProcess[str]
) -> None:
    answer = json.loads(json_run.stdout)
    (line,) = text_run.stderr.splitlines()
    assert re.search(r"TTFT \d+\.\d+ s \| TPOT \d+\.\d+ ms", line)
    assert f"{answer['num_input_tokens']} input (0 reused), {answer['num_generated_tokens']} generated" in line
    assert f"KV {answer['kv_bytes']} bytes" in line
    num_cached = answer["num_input_tokens"] + answer["num_generated_tokens"] - 1
    assert answer["kept_tokens"] == num_cached
    assert f"kept {num_cached} of {num_cached} tokens a head" in line
    assert answer["kv_bytes_per_token"] == answer["kv_bytes"] / num_cached
    assert f"{answer['kv_bytes_per_token']:.0f} per token" in line
    assert not json_run.stderr


def test_ctrl_c_ends_one_answer_with_130_and_leaves_its_beginning(shallow: Path) -> None:
    process = start(shallow, STORY)
    beginning = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=HANG_S)
    assert process.returncode == 130, errors
    assert (beginning + rest).strip()
    assert b"Traceback" not in errors


def test_a_reader_that_goes_away_ends_it_quietly(shallow: Path) -> None:
    process = start(shallow, STORY)
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(HANG_S) == 141


def start(model: Path, prompt: str) -> subprocess.Popen[bytes]:
    command = [*CHAT, str(model), "--max-new-tokens", "300", "--prompt", prompt]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, bufsize=0
    )


def test_a_cut_answer_is_told_and_the_encoding_of_the_output_is_no_obstacle(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    assert run_in_process("--prompt", "Translate 'good morning' to Japanese.", "--max-new-tokens", "6") == 0
    assert out.getvalue().decode("ascii").strip()
    assert "[cut after 6 tokens" in capfd.readouterr().err


# -- bad input ---------------------------------------------------------------------------------------------------------


def run_in_process(*arguments: str, stdin: bytes = b"") -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        return run(list(arguments))


BAD_ARGUMENTS = {
    "unknown option": (["--promt", "x"], "--prompt"),
    "not a number": (["--max-new-tokens", "abc"], "--max-new-tokens"),
    "no tokens": (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
    "negative tokens": (["--prompt", "x", "--max-new-tokens", "-3"], "max_new_tokens must be at least 1, got -3"),
    "far too many tokens": (["--prompt", "x", "--max-new-tokens", "9" * 30], "max_new_tokens must be"),
    "negative temperature": (["--prompt", "x", "--temperature", "-1"], "temperature must be"),
    "nan temperature": (["--prompt", "x", "--temperature", "nan"], "temperature must be"),
    "top_p of zero": (["--prompt", "x", "--temperature", "1", "--top-p", "0"], "top_p must be in (0, 1], got 0.0"),
    "top_p while greedy": (["--prompt", "x", "--top-p", "0.5"], "set --temperature"),
    "negative seed": (["--prompt", "x", "--temperature", "1", "--seed", "-1"], "seed must be"),
    "unknown engine": (["--prompt", "x", "--engine", "crash"], "did you mean 'crush'?"),
    "engine without device": (["--prompt", "x", "--engine", "crush", "--device", "GPU"], "device must be CPU"),
    "unknown device": (["--prompt", "x", "--device", "ABACUS"], "ABACUS"),
    "unknown type of keys": (["--prompt", "x", "--key-precision", "u9"], "key_precision must be one of f32, bf16"),
    "unknown type of values": (["--prompt", "x", "--value-precision", "int8"], "value_precision must be one of f32"),
    "no store": (["--prompt", "x", "--max-kv-mb", "0"], "max_kv_mb must be at least 1, got 0"),
    "store that is no number": (["--prompt", "x", "--max-kv-mb", "1.5"], "--max-kv-mb"),
    "type that genai has not": (
        ["--prompt", "x", "--engine", "genai", "--value-precision", "u2"],
        "with engine='genai', got 'u8', 'u2'",
    ),
    "part of a GiB for genai": (
        ["--prompt", "x", "--engine", "genai", "--max-kv-mb", "1500"],
        "max_kv_mb must be a multiple of 1024 with engine='genai', whose cache_size is in whole GiB, got 1500",
    ),
    "prompt above the store": (
        ["--prompt", STORY * 16, "--max-kv-mb", "2"],
        "prompt must fit into the KV store of 2097152 bytes",
    ),
    "unknown policy": (["--prompt", "x", "--policy", "kvcrash"], "got 'kvcrash' (did you mean 'kvcrush'?)"),
    "nothing kept": (["--prompt", "x", "--kept", "0"], "kept must be a fraction in (0, 1], got 0.0"),
    "more than all kept": (["--prompt", "x", "--kept", "1.5"], "kept must be a fraction in (0, 1], got 1.5"),
    "kept that is no number": (["--prompt", "x", "--kept", "nan"], "kept must be a fraction in (0, 1], got nan"),
    "no tokens kept": (["--prompt", "x", "--kept-tokens", "0"], "kept_tokens must be an integer of at least 1, got 0"),
    "budget below what stays": (["--prompt", "x", "--kept-tokens", "20"], "kept_tokens must be at least the protected"),
    "no floor": (["--prompt", "x", "--min-tokens", "-1"], "min_tokens must be an integer of at least 1, got -1"),
    "two budgets": (
        ["--prompt", "x", "--kept", "0.5", "--kept-tokens", "64"],
        "only one of kept and kept_tokens can be given, got 0.5 and 64",
    ),
    "budget of none": (
        ["--prompt", "x", "--policy", "none", "--kept", "0.5"],
        "kept must be left out with policy 'none', which keeps everything, got 0.5",
    ),
    "floor of none": (
        ["--prompt", "x", "--policy", "none", "--min-tokens", "9"],
        "min_tokens must be left out with policy 'none', which keeps everything, got 9",
    ),
    "setting without value": (
        ["--prompt", "x", "--policy-option", "window"],
        "--policy-option must be KEY=VALUE, got 'window'",
    ),
    "unknown setting": (["--prompt", "x", "--policy-option", "windo=8"], "(did you mean 'window'?)"),
    "setting of another policy": (["--prompt", "x", "--policy", "tova", "--policy-option", "share=0.5"], "got 'share'"),
    "setting of the wrong type": (
        ["--prompt", "x", "--policy-option", "share=half"],
        "share must be a fraction in [0, 1], got 'half'",
    ),
    "setting twice": (
        ["--prompt", "x", "--policy-option", "share=0.5", "--policy-option", "share=0.4"],
        "--policy-option share must be given once, got 0.5 and '0.4'",
    ),
    "setting with an option of its own": (
        ["--prompt", "x", "--policy-option", "kept_tokens=64"],
        "--policy-option kept_tokens must be given as --kept-tokens, got '64'",
    ),
    "budget for genai without a policy": (
        ["--prompt", "x", "--engine", "genai", "--kept-tokens", "64"],
        "policy must be given with kept_tokens: engine='genai' has none by default",
    ),
    "recall of nothing": (
        ["--prompt", "x", "--recall-tokens", "32"],
        "recall_tokens must be an integer of at least 64",
    ),
    "unknown weights": (
        ["--prompt", "x", "--weights", "ours"],
        "weights must be one of auto, packed, plugin, got 'ours'",
    ),
    "weights with genai": (
        ["--prompt", "x", "--engine", "genai", "--weights", "packed"],
        "weights must be 'auto' or 'plugin' with engine='genai', got 'packed'",
    ),
    "recall with genai": (
        ["--prompt", "x", "--engine", "genai", "--recall-tokens", "64"],
        "recall_tokens must be left out with engine='genai', got 64",
    ),
    "policy that genai has not": (
        ["--prompt", "x", "--engine", "genai", "--policy", "tova"],
        "policy must be one of snapkv, h2o, kvcrush, got 'tova'",
    ),
    "fraction for genai": (
        ["--prompt", "x", "--device", "GPU", "--policy", "snapkv", "--kept", "0.5"],
        "kept_tokens must be given, as its sizes are tokens, got kept=0.5",
    ),
    "what genai keeps": (
        ["--prompt", "x", "--engine", "genai", "--show-kept"],
        "show_kept must be left out with engine='genai'",
    ),
    "missing folder": (["/no/such/folder", "--prompt", "x"], "/no/such/folder"),
    "folder without a model": ([str(ROOT / "tests"), "--prompt", "x"], "openvino_model.xml"),
    "empty prompt": (["--prompt", "  "], "prompt must have some text"),
    "prompt that is no text": (["--prompt", "a\udcff"], "prompt must be UTF-8 text"),
    "system that is no text": (["--prompt", "x", "--system", "\udcff"], "system must be UTF-8 text"),
    "two models": (["a", "b", "--prompt", "x"], "b"),
}


@pytest.mark.parametrize(("name", "mode"), covering(BAD_ARGUMENTS, ["text", "json"]))
def test_bad_arguments_give_one_line_and_status_2(
    name: str, mode: str, smollm2: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, message = BAD_ARGUMENTS[name]
    assert run_in_process(*arguments, *(["--json"] if mode == "json" else [])) == 2
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert message in line


BAD_STDIN = {
    "empty": (b"", "standard input must have some text"),
    "blank": (b" \n\n", "standard input must have some text"),
    "not text": (b"ab\xff", "standard input must be UTF-8 text, got other bytes at 2"),
}


@pytest.mark.parametrize("case", BAD_STDIN.values(), ids=BAD_STDIN)
def test_bad_standard_input_gives_one_line_and_status_2(
    case: tuple[bytes, str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_in_process(stdin=case[0]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert case[1] in err


def test_bad_input_of_a_process_has_no_traceback() -> None:
    done = chat()
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


def test_standard_input_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "MAX_STDIN_BYTES", 10)
    set_stdin(monkeypatch, b"a" * 10)
    assert one_prompt(None) == "a" * 10
    set_stdin(monkeypatch, b"a" * 11)
    with pytest.raises(RequestError, match="at most 10 bytes"):
        one_prompt(None)


def test_piped_text_is_put_below_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    set_stdin(monkeypatch, b"\n  one\ntwo\n")
    assert one_prompt("Summarise:") == "Summarise:\n\n  one\ntwo"
    set_stdin(monkeypatch, b"\n")
    assert one_prompt("Hello") == "Hello"


def set_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_help_and_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_in_process("--help") == 0
    out = capfd.readouterr().out
    assert "Examples" in out
    assert all(name in out for name in ("MODEL", "--prompt", "--max-new-tokens", "--stats", "--json", "Ctrl-C"))
    assert all(f"{name}: " in out for name in names())
    assert run_in_process("--version") == 0
    assert "ov_kvcrush" in capfd.readouterr().out


def test_greedy_unless_a_temperature_is_given() -> None:
    assert ChatOptions().generation_options() == {"max_new_tokens": 512, "do_sample": False}
    sampled = ChatOptions(temperature=0.5, top_p=0.9, seed=3).generation_options()
    assert sampled == {"max_new_tokens": 512, "do_sample": True, "temperature": 0.5, "rng_seed": 3, "top_p": 0.9}


def test_help_of_policies_names_all_settings(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_in_process("--policy", "help") == 0
    out = capfd.readouterr().out
    assert [line.partition(":")[0] for line in out.split("\n\n")[0].splitlines() if line[0] != " "] == names()
    for name in names():
        described = describe(name)
        parts = [settings for parts in described.choices.values() for settings in parts.values()]
        for setting in {key for settings in (described.settings, *parts) for key in settings}:
            assert f"{setting}=" in out or setting in ("kept", "kept_tokens", "min_tokens")


def test_options_of_the_cache_reach_the_engine_that_runs() -> None:
    ours = ChatOptions(key_precision="u4", max_kv_mb=3, policy=PolicyOptions("none"))
    assert ours.cache_config() == CacheConfig(key_precision="u4", max_bytes=3 << 20)
    assert ours.scheduler_config() is None
    theirs = ChatOptions(engine="genai", value_precision="u4", max_kv_mb=2048)
    assert theirs.cache_config() == CacheConfig(value_precision="u4")
    assert theirs.scheduler_config() == SchedulerConfig(cache_size=2, enable_prefix_caching=True)
    assert (ChatOptions(engine="genai").cache_config(), ChatOptions().scheduler_config()) == (None, None)
    sizes = ("sink_tokens=32", "stride=32")
    evicting = replace(theirs, policy=PolicyOptions("h2o", kept_tokens=512, others=sizes))
    policy = build("h2o", kept_tokens=512, min_tokens=512, sink_tokens=32, stride=32)
    assert evicting.cache_config() == CacheConfig(value_precision="u4", policy=policy)
    assert evicting.scheduler_config() == SchedulerConfig(cache_size=2, enable_prefix_caching=False)
    assert ChatOptions(engine="genai", max_kv_mb=1024).cache_config() is None


POLICIES = {
    "fraction": (PolicyOptions(kept=0.5), {"kept": 0.5, "min_tokens": 1024}),
    "tokens": (PolicyOptions(kept_tokens=64), {"kept_tokens": 64, "min_tokens": 64}),
    "tokens and floor": (PolicyOptions(kept_tokens=64, min_tokens=99), {"kept_tokens": 64, "min_tokens": 99}),
    "floor": (PolicyOptions(min_tokens=200), {"min_tokens": 200}),
    "nothing": (PolicyOptions(), {"min_tokens": 1024}),
    "settings": (
        PolicyOptions(others=("share=.5", "page=16", "anchor=ones")),
        {"min_tokens": 1024, "share": 0.5, "page": 16, "anchor": "ones"},
    ),
}


@pytest.mark.parametrize("case", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("name", [None, "kvcrush"])
def test_the_chat_s_policy(case: tuple[PolicyOptions, dict[str, Any]], name: str | None) -> None:
    options, settings = case
    found = ChatOptions(policy=replace(options, name=name)).eviction_policy()
    assert found == as_policy({"name": "kvcrush", **settings})
    says_how_much = {"kept", "kept_tokens"} & set(settings)
    assert found is not None
    assert (type(found.budget) is DefaultBudget) != bool(says_how_much)
    of_precisions = ChatOptions(policy=replace(options, name=name), key_precision="u8")
    assert of_precisions.eviction_policy() == build("kvcrush", **settings)


def test_a_chat_that_is_told_nothing_has_the_default_budget() -> None:
    policy = as_policy({"name": "kvcrush", "min_tokens": 1024})
    assert policy is not None
    assert type(policy.budget) is DefaultBudget
    assert ChatOptions().eviction_policy() == ChatOptions(max_kv_mb=64).eviction_policy() == policy
    assert ChatOptions(budget="1/8").cache_config() == CacheConfig(budget="1/8", policy=policy)
    assert ChatOptions(recall_tokens="1/8").cache_config() == CacheConfig(recall_tokens=0.125, policy=policy)
    assert ChatOptions(weights="plugin").cache_config() == CacheConfig(weights="plugin", policy=policy)
    whole = build("kvcrush", min_tokens=1024)
    named = [{"key_precision": "u8"}, {"value_precision": "u4"}]
    assert [ChatOptions(**given).eviction_policy() for given in named] == [whole] * 2  # type: ignore[arg-type]
    assert ChatOptions(engine="genai").eviction_policy() is None


@pytest.mark.parametrize("options", [PolicyOptions("none"), PolicyOptions("snapkv", kept=1.0)])
def test_policies_that_keep_everything_are_none(options: PolicyOptions) -> None:
    assert ChatOptions(policy=options).cache_config() is None


def test_without_the_native_library_only_the_default_policy_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_unavailable", lambda: "nobody built it")
    assert ChatOptions().eviction_policy() is None
    assert ChatOptions(policy=PolicyOptions(kept=0.5)).eviction_policy() is not None
    assert run_in_process("--prompt", "x", "--kept", "0.5") == 2


def test_fewer_bits_take_fewer_bytes(tiny_ir: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    sizes, model = [], str(tiny_ir("llama"))
    for bits in ("f32", "u8", "u2"):
        types = ("--key-precision", bits, "--value-precision", bits)
        assert run_in_process(model, "--json", "--max-new-tokens", "4", "--prompt", STORY * 8, *types) == 0
        sizes.append(json.loads(capfd.readouterr().out)["kv_bytes"])
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


def test_without_the_native_library_one_line_says_so(
    shallow: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "why_unavailable", lambda: "nobody built it")
    assert run_in_process(str(shallow), "--prompt", "Hello", "--max-new-tokens", "20") == 0
    out, err = capfd.readouterr()
    assert out.strip()
    notes = [line for line in err.splitlines() if not line.startswith("[cut")]
    assert notes == [notes[0]]
    assert notes[0].startswith("note: the KV cache is not compressed: nobody built it.")
    assert ".py" not in err


# -- what is shown -----------------------------------------------------------------------------------------------------


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_control_characters_never_reach_a_terminal() -> None:
    for character in map(chr, (*range(0x20), *range(0x7F, 0xA0))):
        shown = visible(f"a{character}[31mb")
        assert len(shown) == len("a?[31mb"), ascii(character)
        assert (character in shown) == (character in "\t\n"), ascii(character)


def test_answer_is_cleaned_for_a_terminal_only() -> None:
    terminal, file = FakeTerminal(), io.StringIO()
    for stream in (terminal, file):
        writer = AnswerWriter(stream)
        writer.write("\x1b[31m[bold]é\n")
        writer.end()
    assert terminal.getvalue() == "\u241b[31m[bold]é\n"
    assert file.getvalue() == "\x1b[31m[bold]é\n"


def test_spinner_leaves_once_before_each_answer() -> None:
    stream = io.StringIO()
    before: list[str] = []
    writer = AnswerWriter(stream, lambda: before.append(stream.getvalue()))
    for answer in (["", "a", "b"], ["c\n"]):
        for piece in answer:
            writer.write(piece)
        writer.end()
    assert before == ["", "ab\n"]
    assert stream.getvalue() == "ab\nc\n"


# -- what is kept ------------------------------------------------------------------------------------------------------

BOATS = ("red", "green", "white", "blue", "black")
FISH = "\n".join(f"Day {d}: the {BOATS[d * 7 % 5]} boat came home with {d * 13 % 40} fish." for d in range(1, 33))


@pytest.fixture(scope="module")
def kept_run(shallow: Path) -> subprocess.CompletedProcess[str]:
    question = ("--prompt", "Naïve 日本語: how many fish?", "--max-new-tokens", "20")
    kept = ("--policy", "kvcrush", "--kept-tokens", "128", "--show-kept")
    return chat_in_process(str(shallow), *kept, "--stats", "--json", *question, stdin=FISH)


def test_stats_and_json_tell_what_was_kept(kept_run: subprocess.CompletedProcess[str]) -> None:
    assert kept_run.returncode == 0, kept_run.stderr
    answer = json.loads(kept_run.stdout)
    num_tokens = answer["num_input_tokens"] + answer["num_generated_tokens"] - 1
    assert answer["num_input_tokens"] > 550
    assert answer["kept_tokens"] == 128 + answer["num_generated_tokens"] - 1
    assert f"kept {answer['kept_tokens']} of {num_tokens} tokens a head" in kept_run.stderr
    assert answer["kv_bytes_per_token"] == answer["kv_bytes"] / answer["kept_tokens"]


def test_shown_prompt_is_the_whole_prompt_with_marks(kept_run: subprocess.CompletedProcess[str]) -> None:
    """Without colours, as here, marks are around what not all heads keep; the text itself has none of them."""
    shown, _, rest = kept_run.stderr.partition("\nOf ")
    text = re.sub(r"[(){}]|\[-|-\]", "", shown)
    assert "<|im_start|>user\nNaïve 日本語: how many fish?\n\n" + FISH + "<|im_end|>" in text
    head, *lines = rest.splitlines()
    num_tokens = json.loads(kept_run.stdout)["num_input_tokens"]
    assert head.startswith(f"{num_tokens} tokens of the prompt a head keeps 128.0 on average, 32.0 of them for others")
    counts = [int(line.split()[0]) for line in lines if not line.startswith("TTFT")]
    assert sum(counts) == num_tokens
    assert len(counts) > 2


def test_fates_of_tokens() -> None:
    """Four heads. The answer's places are not shown; a token stands for others if most of those that hold it say so."""
    positions = [[0, 1, 2, 3, 9], [0, 1, 3, 9]], [[0, 1, 2, 3], [0, 4]]
    representatives = [[2], [3]], [[2, 3], [4]]
    kept = KeptTokens(np.arange(6), *([[np.array(x) for x in y] for y in z] for z in (positions, representatives)))
    assert fates(kept).tolist() == [KEPT, KEPT, STANDS, STANDS, STANDS_FOR_FEW, EVICTED]
    assert fates(replace(kept, representatives=None)).tolist() == [KEPT, KEPT, KEPT, KEPT, KEPT_BY_FEW, EVICTED]


def test_pieces_are_whole_characters(smollm2: Path) -> None:
    tokenizer = ov_genai.Tokenizer(str(smollm2))
    text = "Ünïcode 日本語 🙂 é <|im_start|> end\n"
    ids = tokenizer.encode(text, add_special_tokens=False).input_ids.data[0].tolist()
    found = pieces(ids, tokenizer)
    assert "".join(piece for _, piece in found) == text
    assert sum(count for count, _ in found) == len(ids) > len(found)
    half = tokenizer.encode("🙂", add_special_tokens=False).input_ids.data[0].tolist()[:1]
    assert pieces(half, tokenizer) == [(1, "\ufffd")]


def test_colours_are_shown_where_there_are_some(smollm2: Path) -> None:
    tokenizer = ov_genai.Tokenizer(str(smollm2))
    ids = tokenizer.encode("one two\x1b[0m three", add_special_tokens=False).input_ids.data[0]
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=200)
    show_kept(KeptTokens(ids, [[np.arange(1)]]), tokenizer, console)
    shown = out.getvalue()
    assert shown.startswith("\x1b[1;32mone\x1b[0m\x1b[9;90m two\u241b[0m three")
    assert "evicted by all" in shown


def test_conversation_shows_what_is_kept_and_says_where_that_is_all(
    pipe: LLMPipeline, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    type_lines(monkeypatch, ["/kept", "Hello", '"""', *FISH.splitlines(), '"""', "/kept", "/help"])
    policy = build("kvcrush", kept_tokens=128)
    options = {"max_new_tokens": 4, "do_sample": False, "policy": policy}
    Session(Conversation(pipe, "", options), Messages(), show_stats=False, show_kept=True).run()
    before, after = capfd.readouterr().err.split("All ")
    assert "No answer yet." in before
    assert re.match(r"\d+ tokens are kept.", after)
    assert after.count("tokens of the prompt a head keeps 12") == 2  # after the answer, and for /kept
    assert re.search(r"kept +13\d of \d+ tokens a head of the last answer", after)


# -- conversation ------------------------------------------------------------------------------------------------------


def test_interrupted_answer_stays_in_the_conversation(pipe: LLMPipeline) -> None:
    conversation = Conversation(pipe, "", {"max_new_tokens": 60, "do_sample": False})
    handler = signal.getsignal(signal.SIGINT)
    pieces: list[str] = []

    def press_ctrl_c(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            signal.raise_signal(signal.SIGINT)

    turn = conversation.ask(STORY, press_ctrl_c)
    assert turn.finish_reason == "interrupted"
    assert turn.text.startswith("".join(pieces[:3]))
    assert turn.metrics.num_generated_tokens < 60
    assert signal.getsignal(signal.SIGINT) is handler
    next_turn = conversation.ask("Go on.")
    kept = turn.metrics.num_input_tokens + turn.metrics.num_generated_tokens
    assert next_turn.metrics.num_reused_tokens >= kept - 1
    conversation.reset()
    assert conversation.ask(STORY).metrics.num_reused_tokens == 0


def test_failing_turn_leaves_the_conversation_as_it_was(pipe: LLMPipeline) -> None:
    conversation = Conversation(pipe, "Be brief.", {"max_new_tokens": 8, "do_sample": False})
    conversation.reset()
    conversation.ask("Hello")
    expected = conversation.ask("Bye").text
    conversation.reset()
    conversation.ask("Hello")
    with pytest.raises(RequestError, match="context"):
        conversation.ask("word " * 20000)
    with pytest.raises(ZeroDivisionError):
        conversation.ask("Bye", lambda _: 1 / 0)  # type: ignore[arg-type,return-value]
    assert conversation.ask("Bye").text == expected


# -- messages of several lines -----------------------------------------------------------------------------------------

MESSAGES = {
    "one line": (["hello"], Message("hello")),
    "continued": (["a\\", "b \\", "", "left"], Message("a\nb \n", may_be_command=False)),
    "block": (['"""', "a", "", "b\\", '  """ ', "left"], Message("a\n\nb\\", may_be_command=False)),
    "block ended by Ctrl-D": (['"""', "a"], Message("a", may_be_command=False)),
    "pasted lines": (["/help\nme", "left"], Message("/help\nme", may_be_command=False)),
    "quotes inside a line": (['"""a"""', "left"], Message('"""a"""')),
}


@pytest.mark.parametrize("case", MESSAGES.values(), ids=MESSAGES)
def test_messages_of_several_lines(case: tuple[list[str], Message], monkeypatch: pytest.MonkeyPatch) -> None:
    type_lines(monkeypatch, case[0])
    assert MessageReader().read() == case[1]


def type_lines(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    """Let the next lines typed be these; after them comes Ctrl-D."""
    waiting = iter(lines)

    def next_line(_: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(reader_module, "_line", next_line)


@pytest.mark.parametrize("lines", [["/quit", "left"], []], ids=["quit", "ctrl-d"])
def test_ways_to_leave(lines: list[str], pipe: LLMPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    type_lines(monkeypatch, lines)
    Session(Conversation(pipe, "", {}), Messages(), show_stats=False).run()


SLASHES = {"/etc/fstab is a file": False, " /help": False, "//": False, "/help": True, "/hlp": True, "/stats now": True}


@pytest.mark.parametrize("line", SLASHES)
def test_only_a_slash_and_a_word_is_a_command(
    line: str, pipe: LLMPipeline, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    type_lines(monkeypatch, [line])
    Session(Conversation(pipe, "", {"max_new_tokens": 1, "do_sample": False}), Messages(), show_stats=True).run()
    assert ("TTFT" not in capfd.readouterr().err) == SLASHES[line]


# -- at a terminal -----------------------------------------------------------------------------------------------------

PROMPT = r"(^|\n)(\x1b\[\?2004[hl])*> $"  # the last thing on the screen; the codes switch bracketed paste
# A session leader without a terminal takes the one that it opens; then the command takes its place. Python finds its
# environment by argv[0], so that is the whole path: a bare name would be looked up in PATH.
TAKE_TERMINAL = (
    "import os, sys; os.open(os.ttyname(0), os.O_RDWR); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


class Terminal:
    """The command on a pseudo-terminal of its own, so that the byte of Ctrl-C becomes a signal."""

    def __init__(self, *arguments: str) -> None:
        import pty

        self._fd, child = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, *CHAT[1:], *arguments],
            stdin=child, stdout=child, stderr=child, cwd=ROOT, start_new_session=True,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200", "LINES": "50"},
        )  # fmt: skip
        os.close(child)
        self._new = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def press_ctrl_c(self) -> None:
        # A signal is seen at the next key only, if it comes after readline's last output and before it waits for input.
        time.sleep(0.2)
        self.type("\x03")

    def until(self, pattern: str) -> str:
        """Return what was shown since the last call, once `pattern` is in it."""
        deadline = time.monotonic() + HANG_S
        while not re.search(pattern, self._new):
            assert time.monotonic() < deadline, f"{pattern!r} never came, the screen has {self._new!r}"
            if not select.select([self._fd], [], [], 1)[0]:
                continue
            try:
                data = os.read(self._fd, 65536)
            except OSError:  # Linux: the other side is closed
                data = b""
            assert data, f"{pattern!r} never came, the program ended after {self._new!r}"
            self._new += data.decode(errors="replace").replace("\r", "")
        shown, self._new = self._new, ""
        return shown

    def say(self, text: str) -> str:
        """Type a line and return what is shown until the next prompt."""
        self.type(text + "\n")
        return self.until(PROMPT)

    def close(self) -> None:
        os.close(self._fd)
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def terminal(smollm2: Path) -> Iterator[Terminal]:
    terminal = Terminal("--stats", "--max-new-tokens", "64", "--system", "You tell stories.")
    terminal.until(PROMPT)
    yield terminal
    terminal.close()


def tokens_of(shown: str) -> tuple[int, int, int]:
    """Input, reused and generated tokens from the line of statistics."""
    match = re.search(r"(\d+) input \((\d+) reused\), (\d+) generated", shown)
    assert match, shown
    return int(match[1]), int(match[2]), int(match[3])


def test_terminal_commands(terminal: Terminal) -> None:
    shown = terminal.say("/help")
    assert all(name in shown for name in ("/help", "/reset", "/stats", "/quit", '"""'))
    assert "did you mean '/reset'?" in terminal.say("/rest")
    assert "must stand alone" in terminal.say("/reset now")
    assert "No answer yet" in terminal.say("/stats")


def test_terminal_second_turn_goes_on_from_the_first(terminal: Terminal) -> None:
    terminal.say("/reset")
    first = tokens_of(terminal.say("My name is Anna."))
    second = tokens_of(terminal.say("What is my name?"))
    assert first[1] == 0
    assert second[0] > first[0] + first[2] - 1
    assert second[1] >= first[0]
    assert re.search(r"answers\s+2\b", terminal.say("/stats"))
    assert "new conversation" in terminal.say("/reset")
    assert tokens_of(terminal.say("My name is Anna.")) == first


def test_terminal_message_of_many_lines_is_one_turn(terminal: Terminal) -> None:
    terminal.say("/reset")
    terminal.type('"""\n')
    terminal.until(r"\. $")
    terminal.type("/help is a word here.\n")
    terminal.until(r"\. $")
    terminal.say('"""')
    terminal.type("Say hello\\\n")
    terminal.until(r"\. $")
    terminal.say("to the world.")
    assert re.search(r"answers\s+2\b", terminal.say("/stats"))


def test_terminal_ctrl_c_stops_the_answer_not_the_program(terminal: Terminal) -> None:
    terminal.say("/reset")
    terminal.type(STORY + "\n")
    terminal.until(r"\x1b\[2K[A-Z]\w+ \w")  # the spinner clears its line, then the answer begins
    terminal.press_ctrl_c()
    stopped = terminal.until(PROMPT)
    assert "[stopped]" in stopped
    before = tokens_of(stopped)
    assert before[2] < 64
    after = tokens_of(terminal.say("Hello"))
    assert after[1] >= before[0] + before[2] - 1  # what was said before the stop is part of the conversation


def test_terminal_ctrl_c_at_the_prompt_tells_how_to_leave(terminal: Terminal) -> None:
    terminal.type("half a line")
    terminal.until("half a line")
    terminal.press_ctrl_c()
    assert "/quit" not in terminal.until(PROMPT)
    terminal.press_ctrl_c()
    assert "/quit" in terminal.until(PROMPT)
    assert "error" not in terminal.say("")
    terminal.press_ctrl_c()
    assert "/quit" in terminal.until(PROMPT)
    assert terminal.process.poll() is None


def test_terminal_ctrl_c_twice_ends_the_program(terminal: Terminal) -> None:
    terminal.say("")
    terminal.press_ctrl_c()
    terminal.until(PROMPT)
    terminal.press_ctrl_c()
    assert terminal.process.wait(HANG_S) == 0


def test_json_is_refused_at_a_terminal() -> None:
    terminal = Terminal("--json")
    assert "error: prompt must be given with --json" in terminal.until(r"error: .*\n")
    assert terminal.process.wait(HANG_S) == 2
    terminal.close()
