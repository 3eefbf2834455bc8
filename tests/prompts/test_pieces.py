"""Texts that are encoded in pieces have the tokens of the whole; conversations keep their tools, calls and parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as ov_genai
import pytest
from eviction_runs import EXACT, F32
from tiny_models import CHAT_TEMPLATE

from ov_kvcrush import ChatHistory, Context, LLMPipeline, RequestError
from ov_kvcrush.core.perf_metrics import PerfMetrics
from ov_kvcrush.prompts.context import ContextEncoder
from ov_kvcrush.prompts.encoder import PromptEncoder

TEXT = "In the harbour lie nine boats. The red one is called Reaper."
QUESTION = "What is it called?"


@pytest.fixture(scope="module")
def spaces(tmp_path_factory: pytest.TempPathFactory) -> ov_genai.Tokenizer:
    """A tokenizer as Llama 2's: SentencePiece's space before every text, and bytes for what it does not know."""
    from openvino_tokenizers import convert_tokenizer
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    letters = sorted(set(TEXT + QUESTION + "userasitn|<>\n") - {" ", "\n"})
    merges = [("▁", letter) for letter in letters]
    vocab = {word: index for index, word in enumerate([*words, *letters, *("▁" + letter for letter in letters)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=CHAT_TEMPLATE
    )
    folder = tmp_path_factory.mktemp("spaces")
    models_of = convert_tokenizer(fast, with_detokenizer=True)
    for model, name in zip(models_of, ("tokenizer", "detokenizer"), strict=True):
        ov.save_model(model, folder / f"openvino_{name}.xml")
    made = ov_genai.Tokenizer(str(folder))
    made.set_chat_template(CHAT_TEMPLATE)
    return made


def ids_of(tokenizer: ov_genai.Tokenizer, text: str) -> list[int]:
    return np.array(tokenizer.encode(text, add_special_tokens=False).input_ids.data).reshape(-1).tolist()


def test_context_and_question_have_the_tokens_of_the_whole(spaces: ov_genai.Tokenizer) -> None:
    assert ids_of(spaces, "a") != ids_of(spaces, "\na")[-1:]  # or it prepends nothing, and this shows nothing
    encoder, metrics = ContextEncoder(PromptEncoder(spaces), spaces), PerfMetrics()
    for template in (CHAT_TEMPLATE, ""):
        spaces.set_chat_template(template)
        encoder = ContextEncoder(PromptEncoder(spaces), spaces)
        content, ids, head = encoder.open(TEXT, metrics)
        assert ids[head:].size
        asked = encoder.question(ids, content, QUESTION, metrics)
        whole = content.rendered + QUESTION
        if template:
            whole = spaces.apply_chat_template(content.asked(QUESTION), add_generation_prompt=True)
        assert asked.tolist() == ids_of(spaces, whole)
        longer, more = encoder.more(content, " And more.", metrics)
        assert [*ids.tolist(), *more.tolist()] == ids_of(spaces, longer.rendered)
    spaces.set_chat_template(CHAT_TEMPLATE)


# -- tools, calls and parts --------------------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "boats", "parameters": {}}}]
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "boats", "arguments": {}}}]}
PARTS = {"role": "user", "content": [{"type": "text", "text": "How many boats?"}]}
WITH_ALL = (
    "{% if tools %}<|start|>tools\n{{ tools[0]['function']['name'] }}<|end|>\n{% endif %}{{ mood or '' }}"
    + CHAT_TEMPLATE.replace(
        "message['content']",
        "(message['tool_calls'][0]['function']['name'] if message['tool_calls'] else message['content']"
        " if message['content'] is string else message['content'][0]['text'])",
    )
)


@pytest.fixture(scope="module")
def pipe(tiny_ir: Callable[[str], Path]) -> LLMPipeline:
    tokenizer = ov_genai.Tokenizer(str(tiny_ir("llama")))
    tokenizer.set_chat_template(WITH_ALL)
    return LLMPipeline(tiny_ir("llama"), "CPU", F32, tokenizer=tokenizer, cache_config=EXACT)


def history() -> ChatHistory:
    made = ChatHistory([PARTS, CALL, {"role": "tool", "content": "nine"}])
    made.set_tools(TOOLS)
    made.set_extra_context({"mood": "gay"})
    return made


def test_context_of_a_history_keeps_tools_calls_and_parts(pipe: LLMPipeline, tmp_path: Path) -> None:
    asked = history()
    asked.append({"role": "user", "content": QUESTION})
    expected = pipe.generate(asked, max_new_tokens=8).texts[0]
    context = pipe.compress(history(), policy="none")
    assert context.text == pipe.get_tokenizer().apply_chat_template(history(), add_generation_prompt=False)
    assert "boats<|end|>\ngay" in context.text
    context.save(tmp_path / "a.kvc")
    for begun in (context, Context.load(tmp_path / "a.kvc", pipe)):
        assert begun.content == context.content
        assert pipe.generate(QUESTION, context=begun, max_new_tokens=8) == expected
        pipe.start_chat(context=begun)
        assert pipe.generate(QUESTION, max_new_tokens=8) == expected
        assert pipe.chat_context().content.tools == context.content.tools
        pipe.finish_chat()


def test_same_tokens_of_other_messages_are_another_context(pipe: LLMPipeline) -> None:
    text = pipe.compress([{"role": "user", "content": "How many boats?"}], policy="none")
    parts = pipe.compress([PARTS], policy="none")
    assert text.ids.tolist() == parts.ids.tolist()
    assert parts.content.messages == (PARTS,)


@pytest.mark.parametrize("message", [{"role": "user"}, {"content": "a"}, {"role": "user", "content": 5}, "a"])
def test_what_is_no_message_is_refused(message: Any, pipe: LLMPipeline) -> None:
    with pytest.raises(RequestError, match="context must be a text or messages with role and content"):
        pipe.compress([message])
