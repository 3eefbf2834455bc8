"""Conversations: each has its own tokens, whoever else talks, and a later turn goes on from exactly what was said."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openvino_genai as ov_genai
import pytest
from eviction_runs import EXACT, F32

from ov_kvcrush import ChatHistory, LLMPipeline
from ov_kvcrush.core.perf_metrics import PerfMetrics
from ov_kvcrush.prompts.conversation import NOTHING_KNOWN, ConversationEncoder
from ov_kvcrush.prompts.encoder import PromptEncoder


@pytest.fixture(scope="module")
def pipe(tiny_ir: Callable[[str], Path]) -> LLMPipeline:
    return LLMPipeline(tiny_ir("llama"), "CPU", F32, cache_config=EXACT)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def rows_of(pipe: LLMPipeline, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Tokens of the prompts that are run from now on."""
    run, seen = pipe._loop.run, []

    def noting(rows: list[np.ndarray], *rest: Any) -> Any:
        seen.extend(row.tolist() for row in rows)
        return run(rows, *rest)

    monkeypatch.setattr(pipe._loop, "run", noting)
    return seen


def rendered(pipe: LLMPipeline, history: Any) -> list[int]:
    """Tokens of a conversation that nothing is known of."""
    tokenizer = pipe.get_tokenizer()
    text = tokenizer.apply_chat_template(history, add_generation_prompt=True)
    return np.array(tokenizer.encode(text, add_special_tokens=False).input_ids.data).reshape(-1).tolist()


def decoded(pipe: LLMPipeline, ids: list[int]) -> str:
    return str(pipe.get_tokenizer().decode(ids, skip_special_tokens=False))


def test_a_turn_inside_anothers_turn_leaves_both_as_they_are(
    pipe: LLMPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer lets other threads run while it encodes; here another's turn runs there on each call."""
    bob = ChatHistory([user("I am Bob.")])
    bob.append(assistant(pipe.generate(bob, max_new_tokens=3).texts[0]))
    bob.append(user("Who am I?"))
    expected = rendered(pipe, bob)
    prompts, encode = rows_of(pipe, monkeypatch), PromptEncoder._encode

    def interrupted(self: PromptEncoder, *args: Any) -> np.ndarray:
        monkeypatch.setattr(PromptEncoder, "_encode", encode)
        pipe.generate(ChatHistory([user("I am Alice, and my secret is 1234.")]), max_new_tokens=2)
        return encode(self, *args)

    monkeypatch.setattr(PromptEncoder, "_encode", interrupted)
    pipe.generate(bob, max_new_tokens=2)
    assert len(prompts) == 2
    assert decoded(pipe, prompts[1]) == decoded(pipe, expected)


def test_conversations_in_threads_never_meet(pipe: LLMPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = rows_of(pipe, monkeypatch)
    expected: list[list[int]] = []

    def talk(name: str) -> None:
        history = ChatHistory([user(f"I am {name}.")])
        for _ in range(6):
            expected.append(rendered(pipe, history))
            pipe.generate(history, max_new_tokens=2)
            history.append(assistant("Yes."))
            history.append(user(f"Am I {name}?"))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(talk, ["Ann", "Bob", "Cleo", "Dan"]))
    assert sorted(prompts) == sorted(expected)


@pytest.mark.parametrize("same_object", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_prompt_is_what_is_said_whatever_was_generated_before(
    num_tokens: int, same_object: bool, pipe: LLMPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model's answers are full of halves of characters and of special tokens."""
    prompts, silent = rows_of(pipe, monkeypatch), 0
    for question in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ":
        history = ChatHistory([user(question)])
        said = pipe.generate(history, max_new_tokens=num_tokens, ignore_eos=True).texts[0]
        silent += not said
        for answer in ("No.", said):
            later = [user(question), assistant(answer), user("Why not?")]
            if same_object:
                history.set_messages(later)
            else:
                history = ChatHistory(later)
            pipe.generate(history, max_new_tokens=1)
            assert decoded(pipe, prompts[-1]) == decoded(pipe, rendered(pipe, later))
            assert answer == said or prompts[-1] == rendered(pipe, later)
    assert silent or num_tokens > 1


@pytest.fixture(scope="module")
def tokens(tiny_ir: Callable[[str], Path]) -> tuple[ConversationEncoder, ov_genai.Tokenizer]:
    tokenizer = ov_genai.Tokenizer(str(tiny_ir("llama")))
    return ConversationEncoder(PromptEncoder(tokenizer), tokenizer), tokenizer


def test_only_tokens_that_say_the_answer_are_remembered(
    tokens: tuple[ConversationEncoder, ov_genai.Tokenizer],
) -> None:
    encoder, tokenizer = tokens
    prompt = encoder.encode(NOTHING_KNOWN, "<|start|>user\nQ<|end|>\n<|start|>assistant\n", PerfMetrics())

    def ids(text: str) -> list[int]:
        return np.array(tokenizer.encode(text, add_special_tokens=False).input_ids.data).reshape(-1).tolist()

    half = ids("😀")[:2]
    special = [*ids("No"), *ids("<|end|>"), *ids(".")]
    for answer in (half, special, []):
        said = str(tokenizer.decode(answer)) if answer else ""
        assert encoder.answered(prompt, said, answer) is prompt
    known = encoder.answered(prompt, "No. 😀", ids("No. 😀"))
    assert known.text == prompt.text + "No. 😀"
    assert known.ids.tolist() == [*prompt.ids.tolist(), *ids("No. 😀")]


def test_a_turn_may_be_asked_again_and_another_way(tokens: tuple[ConversationEncoder, ov_genai.Tokenizer]) -> None:
    """The longest part that the text goes on from is used, and what is known does not change."""
    encoder, _ = tokens
    first = encoder.encode(NOTHING_KNOWN, "abc", PerfMetrics())
    known = first.joined("def", np.array([7, 7, 7]))  # not the tokens that encoding gives
    assert encoder.encode(known, "abcdefg", PerfMetrics()).ids[:6].tolist() == [*first.ids.tolist(), 7, 7, 7]
    for other in ("abcdef", "abcxyz", "xyz", "ab"):
        got = encoder.encode(known, other, PerfMetrics())
        assert got.ids.tolist() == encoder.encode(NOTHING_KNOWN, other, PerfMetrics()).ids.tolist()
        assert got.text == other
    assert known.text == "abcdef"


def test_histories_of_equal_text_do_not_share_tokens(pipe: LLMPipeline) -> None:
    one, two = (ChatHistory([user("Q")]) for _ in range(2))
    pipe.generate(one, max_new_tokens=2)
    assert pipe._of_histories.of(one).text
    assert pipe._of_histories.of(two) is NOTHING_KNOWN
