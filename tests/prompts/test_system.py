"""The system prompt stays where a policy evicts, however the chat template has it, and is looked for only there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino_genai as ov_genai
import pytest
from eviction_runs import EXACT, F32, SMALL
from tiny_models import CHAT_TEMPLATE

from ov_kvcrush import ChatHistory, ContinuousBatchingPipeline, LLMPipeline, RequestError
from ov_kvcrush.prompts.system import SystemFinder

SYSTEM = "Answer in one word."
TEXT = "In the harbour of Anstruther lie nine boats. " * 6
POLICY = {"name": "h2o", **SMALL, "kept_tokens": 60}
NO_POLICY: list[Any] = [None, "none"]
CONTENT = "message['content']"
JOINED = (
    "(message['content'] if message['content'] is string else message['content'] | map(attribute='text') | join('+'))"
)
IN_THE_QUESTION = (
    "{% for message in messages %}{% if message['role'] != 'system' %}<|start|>{{ message['role'] }}\n"
    "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}\n\n{% endif %}"
    "{{ message['content'] }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "as it is": (CHAT_TEMPLATE, SYSTEM, "<|start|>system\n" + SYSTEM),
    "trimmed": (
        CHAT_TEMPLATE.replace(CONTENT, f"{CONTENT} | trim"), f"\n {SYSTEM} \n", "<|start|>system\n" + SYSTEM,
    ),
    "parts": (
        CHAT_TEMPLATE.replace(CONTENT, JOINED),
        [{"type": "text", "text": "Answer in"}, {"type": "text", "text": "one word."}],
        "<|start|>system\nAnswer in+one word.",
    ),
    "moved": (IN_THE_QUESTION, f"{SYSTEM}\n", SYSTEM),
}  # fmt: skip


@pytest.fixture(params=TEMPLATES)
def case(request: pytest.FixtureRequest, tiny_ir: Callable[[str], Path]) -> tuple[ov_genai.Tokenizer, Path, Any, str]:
    """A tokenizer, its model, a system message, and what stays of the conversation."""
    template, content, stays = TEMPLATES[request.param]
    tokenizer = ov_genai.Tokenizer(str(tiny_ir("llama")))
    tokenizer.set_chat_template(template)
    return tokenizer, tiny_ir("llama"), content, stays


def talk(content: Any) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": content},
        {"role": "user", "content": TEXT},
        {"role": "assistant", "content": "I see."},
        {"role": "user", "content": "How many?"},
    ]


def assert_stays(kept: Any, tokenizer: ov_genai.Tokenizer, stays: str) -> None:
    """In all heads, and not because everything does."""
    assert kept is not None
    text = [str(tokenizer.decode([token], skip_special_tokens=False)) for token in kept.ids.tolist()]
    begin = "".join(text).index(stays)
    ends = [len("".join(text[: i + 1])) for i in range(len(text))]
    span = {i for i, end in enumerate(ends) if begin < end <= begin + len(stays)}
    for layer in kept.positions:
        for head in layer:
            assert span <= set(head.tolist())
            assert len(head) < len(kept.ids) / 2


def test_system_prompt_stays_in_generate_chats_batches_and_contexts(case: Any) -> None:
    tokenizer, folder, content, stays = case
    pipe = LLMPipeline(folder, "CPU", F32, tokenizer=tokenizer, cache_config=EXACT)
    ask = {"max_new_tokens": 2, "policy": POLICY}
    assert_stays(pipe.generate(ChatHistory(talk(content)), **ask).kept[0], tokenizer, stays)
    assert_stays(pipe.compress(talk(content), policy={**POLICY, "name": "snapkv"}).kept_map(), tokenizer, stays)
    if isinstance(content, str):
        pipe.start_chat(content)
        result = pipe.generate(TEXT, num_return_sequences=2, do_sample=True, **ask)
        assert_stays(result.kept[0], tokenizer, stays)
        pipe.finish_chat()
        history = ChatHistory(talk(content))
        kept = pipe.generate(history, max_new_tokens=2, policy=POLICY, protect=[content]).kept[0]
        assert_stays(kept, tokenizer, stays)


def test_batch_protects_as_generate_does(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, folder, content, stays = case
    pipe = ContinuousBatchingPipeline(folder, None, "CPU", F32, tokenizer=tokenizer, cache_config=EXACT)
    run, seen = pipe._loop.run, []

    def noting(rows: Any, configs: Any, streamer: Any, metrics: Any, caches: Any, *rest: Any, **named: Any) -> Any:
        seen.extend(zip(rows, caches, strict=True))
        return run(rows, configs, streamer, metrics, caches, *rest, **named)

    monkeypatch.setattr(pipe._loop, "run", noting)
    pipe.generate([ChatHistory(talk(content)), ChatHistory(talk(content)[1:])], policy=POLICY, max_new_tokens=1)
    (ids, first), (_, second) = seen
    begin, end = first.system
    assert stays in str(tokenizer.decode(ids[begin:end].tolist(), skip_special_tokens=False))
    assert end - begin <= len(stays)
    assert second.system is None


@pytest.mark.parametrize("policy", NO_POLICY)
def test_nothing_is_looked_for_without_a_policy(
    policy: Any, tiny_ir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = LLMPipeline(tiny_ir("llama"), "CPU", F32, cache_config=EXACT)

    def never(*_: Any) -> None:
        raise AssertionError("looked for")

    monkeypatch.setattr(SystemFinder, "span", never)
    pipe.generate(ChatHistory(talk(SYSTEM)), max_new_tokens=1, policy=policy)
    pipe.compress(talk(SYSTEM), policy="none")
    with pytest.raises(AssertionError, match="looked for"):
        pipe.generate(ChatHistory(talk(SYSTEM)), max_new_tokens=1, policy=POLICY)


def test_system_prompt_that_the_template_leaves_out_is_none(tiny_ir: Callable[[str], Path]) -> None:
    tokenizer = ov_genai.Tokenizer(str(tiny_ir("llama")))
    tokenizer.set_chat_template(CHAT_TEMPLATE.replace(CONTENT, f"({CONTENT} if message['role'] != 'system' else '')"))
    pipe = LLMPipeline(tiny_ir("llama"), "CPU", F32, tokenizer=tokenizer, cache_config=EXACT)
    assert pipe.generate(ChatHistory(talk(SYSTEM)), max_new_tokens=2, policy=POLICY).kept[0] is not None


def test_system_prompt_that_cannot_be_found_is_refused_where_something_is_evicted(
    tiny_ir: Callable[[str], Path],
) -> None:
    """A template that has it twice, changed: never unprotected without a word."""
    tokenizer = ov_genai.Tokenizer(str(tiny_ir("llama")))
    changed = "{{ messages[0]['content'] | length }}" + CHAT_TEMPLATE.replace(CONTENT, f"{CONTENT}[:9]")
    tokenizer.set_chat_template(changed)
    pipe = LLMPipeline(tiny_ir("llama"), "CPU", F32, tokenizer=tokenizer, cache_config=EXACT)
    with pytest.raises(RequestError, match="system message must be one that the chat template leaves as it is"):
        pipe.generate(ChatHistory(talk(SYSTEM)), max_new_tokens=2, policy=POLICY)
    assert pipe.generate(ChatHistory(talk(SYSTEM)), max_new_tokens=2).texts
