"""ov_kvcrush-chat --context: a text or a saved context that a conversation goes on from."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ov_kvcrush import RequestError
from ov_kvcrush.chat import app as chat_module
from ov_kvcrush.chat import context_option as context_module
from ov_kvcrush.chat.app import run
from ov_kvcrush.chat.context_option import ContextWish, open_context, show_progress
from ov_kvcrush.chat.conversation import ChatPipeline, ContextConversation, Conversation
from ov_kvcrush.chat.output import Messages
from ov_kvcrush.chat.reader import Message
from ov_kvcrush.chat.session import Session
from ov_kvcrush.engine.handle import GenerationHandle
from ov_kvcrush.errors import ContextFileError
from ov_kvcrush.policies.registry import build

BOATS = ("red", "green", "white", "blue", "black")
TEXT = "\n".join(f"Day {d}: the {BOATS[d * 7 % 5]} boat came home with {d * 13 % 40} fish." for d in range(1, 17))
QUESTION = "Which boat came home on day 3?"
OPTIONS = {"max_new_tokens": 8, "do_sample": False}
SHORT = ("--max-new-tokens", "8")


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        assert self.status == 0, self.err
        return dict(json.loads(self.out))


def chat(*arguments: Any, stdin: bytes = b"") -> Done:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        status = run([str(argument) for argument in arguments])
    return Done(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.txt; tests put into it what others read."""
    folder = tmp_path_factory.mktemp("contexts")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def compressed(shallow: Path, files: Path) -> Done:
    """A run that compresses, saves and asks."""
    context = ("--context", files / "text.txt", "--save-context", files / "saved.kvc")
    return chat(shallow, *context, "--prompt", QUESTION, "--json", "--stats", *SHORT)


@pytest.fixture(scope="module")
def saved(compressed: Done, files: Path) -> Path:
    assert compressed.status == 0, compressed.err
    return files / "saved.kvc"


@pytest.fixture(scope="module")
def pipe(shallow: Path) -> ChatPipeline:
    return ChatPipeline(shallow)


@pytest.fixture
def begun(pipe: ChatPipeline) -> Iterator[ContextConversation]:
    wish = ContextWish(Path("text.txt"), TEXT, build("kvzip", kept=0.5))
    yield ContextConversation(pipe, *open_context(wish, pipe, Console(file=io.StringIO())), OPTIONS)
    pipe.finish_chat()


# -- one question ------------------------------------------------------------------------------------------------------


def test_answer_is_that_of_the_compressed_text(compressed: Done, pipe: ChatPipeline) -> None:
    context = pipe.compress(TEXT)
    answer = compressed.json
    assert answer["text"] == pipe.generate(QUESTION, context=context, **OPTIONS)
    assert answer["num_reused_tokens"] == context.num_tokens
    figures = answer["context"]
    assert (figures["num_tokens"], figures["kept_tokens"]) == (context.num_tokens, context.kept_tokens)
    assert figures["nbytes"] == context.nbytes
    with pipe.compress(f" {TEXT}", policy="none") as whole:
        assert figures["nbytes"] < whole.nbytes
    assert (figures["is_loaded"], figures["saved_seconds"]) == (False, None)


def test_stats_tell_what_the_context_took(compressed: Done) -> None:
    figures = compressed.json["context"]
    first, _ = compressed.err.splitlines()
    assert f"text.txt, compressed in {figures['seconds']:.2f} s" in first
    assert f"tokens {figures['num_tokens']}, {figures['kept_tokens']} kept a head" in first
    assert f"KV {figures['nbytes']} bytes" in first


@pytest.mark.parametrize("name", ["saved.kvc", "other name"])
def test_a_saved_context_answers_as_the_text_did(
    name: str, saved: Path, files: Path, compressed: Done, shallow: Path
) -> None:
    file = files / name
    file.write_bytes(saved.read_bytes())
    loaded = chat(shallow, "--context", file, "--json", "--stats", *SHORT, stdin=QUESTION.encode())
    answer, first = loaded.json, compressed.json
    assert answer["text"] == first["text"]
    assert answer["num_reused_tokens"] == first["num_reused_tokens"]
    sizes = ("num_tokens", "kept_tokens", "nbytes")
    assert [answer["context"][key] for key in sizes] == [first["context"][key] for key in sizes]
    assert answer["context"]["is_loaded"]
    assert f"({answer['context']['saved_seconds']:.2f} s less than compressing took)" in loaded.err


def test_options_of_the_policy_are_those_of_the_text(files: Path, compressed: Done, shallow: Path) -> None:
    text = (shallow, "--context", files / "text.txt", "--prompt", QUESTION, "--json", *SHORT)
    whole = chat(*text, "--policy", "none").json["context"]
    assert whole["kept_tokens"] == whole["num_tokens"] == compressed.json["context"]["num_tokens"]
    few = chat(*text, "--policy", "snapkv", "--kept-tokens", "96", "--policy-option", "window=8")
    assert few.json["context"]["kept_tokens"] == 96
    assert not few.err


def test_without_a_context_there_are_no_figures(shallow: Path) -> None:
    assert chat(shallow, "--prompt", "Hello", "--json", *SHORT).json["context"] is None


# -- bad input ---------------------------------------------------------------------------------------------------------

BAD_FILES = {
    "missing.txt": (None, "context must be a file that can be read, got"),
    "missing.kvc": (None, "context must be a file that can be read, got"),
    "empty.txt": (b"", "context must have some text, got the empty file"),
    "blank.txt": (b" \n\t\n", "context must have some text, got white space only in"),
    "binary.txt": (b"ab\0c", "context must be UTF-8 text or a saved context, got a zero byte at 2 of"),
    "latin1.txt": (b"caf\xe9", "context must be UTF-8 text, got other bytes at 3 of"),
    "long.txt": (b"a" * 101, "context must be at most 100 bytes of text, got more in"),
    ".": (None, "context must be a file that can be read, got"),
}
BAD_ARGUMENTS = {
    "system": (["--system", "Be brief."], "system must be left out with --context, which a conversation begins with"),
    "genai": (["--engine", "genai"], "context must be left out with engine='genai', which holds no contexts"),
    "device of genai": (["--device", "GPU"], "context must be left out with engine='genai'"),
    "unknown policy": (["--policy", "kvzap"], "got 'kvzap' (did you mean 'kvzip'?)"),
    "unknown setting": (["--policy-option", "chunks=9"], "(did you mean 'chunk'?)"),
    "nothing kept": (["--kept", "0"], "kept must be a fraction in (0, 1], got 0.0"),
    "folder that is not there": (["--save-context", "none/x.kvc"], "save_context must be a file that can be written"),
    "folder": (["--save-context", "."], "save_context must be a file, got ., which is something else"),
    "device file": (["--save-context", "/dev/null"], "save_context must be a file, got /dev/null, which"),
    "the text": (["--save-context", "text.txt"], "save_context must be a new file or a saved context, got text.txt"),
    "no folder to write to": (["--save-context", "/proc/x.kvc"], "save_context must be a file that can be written"),
}


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(chat_module, "ChatPipeline", fail)


def assert_refused(done: Done, message: str) -> None:
    assert (done.status, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.usefixtures("no_model")
def test_bad_files_are_refused_before_a_model_is_loaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, message = BAD_FILES[name]
    monkeypatch.setattr(context_module, "MAX_TEXT_BYTES", 100)
    file = tmp_path / name
    if data is not None:
        file.write_bytes(data)
    assert_refused(chat("--context", file, "--prompt", "x"), f"{message} {file}")


@pytest.mark.parametrize("case", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
@pytest.mark.usefixtures("no_model")
def test_bad_arguments_are_refused_before_a_model_is_loaded(
    case: tuple[list[str], str], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    assert_refused(chat("--context", "text.txt", "--prompt", "x", *case[0]), case[1])
    assert (files / "text.txt").read_text(encoding="utf-8") == TEXT


@pytest.mark.usefixtures("no_model")
def test_nothing_to_save_is_refused() -> None:
    assert_refused(chat("--prompt", "x", "--save-context", "x.kvc"), "save_context must be given with --context")


def test_a_damaged_context_is_refused_and_written_nowhere(saved: Path, tmp_path: Path) -> None:
    file, target = tmp_path / "damaged.kvc", tmp_path / "new.kvc"
    file.write_bytes(saved.read_bytes()[:-1])
    assert_refused(chat("--context", file, "--save-context", target, "--prompt", "x"), "it is damaged or cut short")
    assert not target.exists()


# -- conversation ------------------------------------------------------------------------------------------------------


def test_a_saved_conversation_goes_on_as_it_would_have(
    begun: ContextConversation, pipe: ChatPipeline, tmp_path: Path
) -> None:
    file = tmp_path / "a b.kvc"
    begun.ask(QUESTION)
    size = begun.save(file).num_tokens
    second = begun.ask("And the next day?")
    assert second.metrics.num_reused_tokens >= size - 1  # the last token of an answer is not run
    context, figures = open_context(ContextWish(file, None, None), pipe, Console(file=io.StringIO()))
    assert (figures.num_tokens, figures.saved_seconds) == (size, None)
    again = ContextConversation(pipe, context, figures, OPTIONS).ask("And the next day?")
    assert again.text == second.text
    assert again.metrics.num_input_tokens == second.metrics.num_input_tokens


def test_reset_goes_back_to_the_context(begun: ContextConversation) -> None:
    assert begun.figures is not None
    first = begun.ask(QUESTION)
    begun.ask("And the next day?")
    begun.reset()
    again = begun.ask(QUESTION)
    assert again.text == first.text
    assert again.metrics.num_reused_tokens == first.metrics.num_reused_tokens == begun.figures.num_tokens


def test_a_question_that_was_stopped_before_its_answer_is_not_kept(
    begun: ContextConversation, pipe: ChatPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun.ask("Hello")
    expected = begun.ask(QUESTION)
    begun.reset()
    begun.ask("Hello")
    drive = GenerationHandle.drive
    with monkeypatch.context() as patch:
        patch.setattr(GenerationHandle, "drive", lambda self: (signal.raise_signal(signal.SIGINT), drive(self)))
        stopped = begun.ask("Forget this.")
    assert (stopped.text, stopped.finish_reason) == ("", "interrupted")
    assert begun.ask(QUESTION).text == expected.text


def test_commands_of_a_conversation_with_a_context(
    begun: ContextConversation, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    session = Session(begun, Messages(), show_stats=False)
    file, text = tmp_path / "with space.kvc", tmp_path / "notes.txt"
    text.write_text("mine", encoding="utf-8")
    shown = []
    for line in ("/help", "/stats", "/save", f"/save {file}", f"/save {text}", "/reset", "/kept now"):
        session.act(Message(line))
        shown.append(" ".join(capfd.readouterr().err.split()))
    assert "/save FILE" in shown[0]
    assert begun.figures is not None
    assert f"{begun.figures.num_tokens}, {begun.figures.kept_tokens} kept a head" in shown[1]
    assert "/save must have a FILE behind it, got none" in shown[2]
    assert f"{begun.figures.num_tokens} tokens," in shown[3]
    assert file.exists()
    assert "file must be a new file or a saved context" in shown[4]
    assert text.read_text(encoding="utf-8") == "mine"
    assert "A new conversation begins behind the context." in shown[5]
    assert "/kept must stand alone, got 'now' after it" in shown[6]


def test_other_conversations_are_not_saved(pipe: ChatPipeline, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="must have begun with --context"):
        Conversation(pipe, "", OPTIONS).save(tmp_path / "x.kvc")
    assert not list(tmp_path.iterdir())


def test_at_a_terminal_a_context_that_cannot_be_saved_is_still_asked(
    pipe: ChatPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise ContextFileError("path must have room")

    wish = ContextWish(Path("text.txt"), TEXT, build("kvzip"), tmp_path / "x.kvc")
    task = chat_module.Task(chat_module.ChatOptions(), None, False, False, context=wish)
    monkeypatch.setattr("ov_kvcrush.contexts.context.Context.save", fail)
    assert chat_module._begin(task, pipe, Messages(), at_terminal=True).ask(QUESTION).text
    assert "error: path must have room" in capfd.readouterr().err
    with pytest.raises(ContextFileError):
        chat_module._begin(task, pipe, Messages(), at_terminal=False)


# -- progress ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("policy", ["kvzip", "snapkv"])
def test_progress_is_shown_at_a_terminal_only(is_terminal: bool, policy: str) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, color_system=None, width=120)
    shown = []
    for done in (400, 600):
        with show_progress(build(policy), console) as tell:
            tell(done, 1000)  # the bar is drawn a last time at its end
        shown.append(out.getvalue())
        out.seek(0)
        out.truncate()
    if not is_terminal:
        assert shown == ["", ""]
        return
    again = "Reading it again, to see what it needs"
    for text, line in zip(shown, ("400 of 1000 tokens", "600 of 1000 tokens"), strict=True):
        assert line in text
        assert text.count("left") > 0
    assert again not in shown[0]
    assert (again in shown[1]) == (policy == "kvzip")
