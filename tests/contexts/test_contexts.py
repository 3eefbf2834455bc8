"""Contexts: asked alone or together they answer as the whole prompt does, share their bytes, and give them back."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as ov_genai
import pytest
from eviction_runs import EXACT, F32, SMALL, as_lists
from tiny_models import CHAT_TEMPLATE

from ov_kvcrush import Context, CrushError, LLMPipeline, OutOfMemory
from ov_kvcrush.policies.registry import build

TEXT = "In the harbour of Anstruther lie nine boats. " * 6 + "The red one is called Reaper."
QUESTIONS = ["What is it called?", "How many boats are there?", "Where?", "a", "Which colour has the Reaper, and why?"]
TIGHT = {**SMALL, "kept_tokens": 60}
ZIP = {"name": "kvzip", **TIGHT, "chunk": 64}
SNAP = {"name": "snapkv", **TIGHT}
GROWTH = {"name": "h2o", **SMALL, "kept_tokens": 24}
SYSTEM = {"role": "system", "content": "Answer in one word."}
TALK = [SYSTEM, {"role": "user", "content": TEXT}, {"role": "assistant", "content": "I see."}]
ASK = {"max_new_tokens": 16, "ignore_eos": True}
ANY_POLICY = pytest.mark.parametrize("policy", ["none", ZIP, SNAP, {**ZIP, "name": "kvcrush", "scorer": "kvzip"}])

Ask = dict[str, Any]


def make_pipe(folder: Path, cache: dict[str, Any] | None = None, **scheduler: Any) -> LLMPipeline:
    config = {"max_num_batched_tokens": 96, **scheduler}
    return LLMPipeline(folder, "CPU", F32, cache_config={**EXACT, **(cache or {})}, scheduler_config=config)


def store_of(pipe: LLMPipeline) -> Any:
    return pipe._backend.cache.store  # type: ignore[attr-defined]


def nbytes(pipe: LLMPipeline) -> int:
    return pipe.get_metrics().kv_cache_size_in_bytes


def assert_nothing_left(pipe: LLMPipeline) -> None:
    gc.collect()
    memory: Any = pipe._backend.cache  # type: ignore[attr-defined]
    assert pipe.get_metrics().requests == 0
    assert nbytes(pipe) == memory.store.num_sequences == memory.staging.pool.num_used == 0


@pytest.fixture(scope="module")
def shared(tiny_ir: Callable[[str], Path]) -> LLMPipeline:
    return make_pipe(tiny_ir("llama"))


@pytest.fixture
def pipe(shared: LLMPipeline) -> Iterator[LLMPipeline]:
    """The same for all tests; each must leave it empty."""
    yield shared
    shared.finish_chat()
    assert_nothing_left(shared)


def ids_of(pipe: LLMPipeline, text: str) -> np.ndarray:
    return pipe.get_tokenizer().encode(text, add_special_tokens=False).input_ids.data[0].astype(np.int64)


def positions(context: Context) -> list[list[list[int]]]:
    return as_lists(context.kept_map().positions)


def below(places: list[list[list[int]]], end: int) -> list[list[list[int]]]:
    return [[[place for place in head if place < end] for head in layer] for layer in places]


def mean_kept(context: Context, begin: int = 0) -> float:
    return float(np.mean([len([p for p in head if p >= begin]) for layer in positions(context) for head in layer]))


# -- answers -----------------------------------------------------------------------------------------------------------


def test_whole_context_answers_as_the_whole_prompt_does(pipe: LLMPipeline) -> None:
    context = pipe.compress(TEXT, policy="none")
    assert context.kept_tokens == context.num_tokens == len(ids_of(pipe, context.text))
    assert context.policy is None
    assert positions(context) == [[list(range(context.num_tokens))] * 2] * 2
    for question in QUESTIONS:
        assert pipe.generate(question, context=context, **ASK) == pipe.generate(f"{TEXT}\n\n{question}", **ASK)
    results = pipe.generate(QUESTIONS, context=context, **ASK)
    assert results.perf_metrics.num_reused_tokens == len(QUESTIONS) * context.num_tokens


@ANY_POLICY
def test_questions_in_a_batch_are_answered_as_one_by_one_and_share_its_bytes(policy: Ask, pipe: LLMPipeline) -> None:
    context, whole = pipe.compress(TEXT, policy=policy), pipe.compress(f" {TEXT}", policy="none")
    questions = [f"{q} {i}" for i in range(4) for q in QUESTIONS]
    alone = [pipe.generate(q, context=context, **ASK) for q in questions]
    before, size, kept = nbytes(pipe), context.nbytes, positions(context)
    assert before == (size if policy == "none" else size + whole.nbytes)
    peaks = []
    with pytest.MonkeyPatch.context() as patch:
        engine: Any = pipe._backend
        patch.setattr(engine, "step", lambda then=engine.step: (then(), peaks.append(nbytes(pipe))))
        together = pipe.generate(questions, context=context, **ASK)
    assert together.texts == alone
    own = [len(ids_of(pipe, f"\n\n{q}<|end|>\n<|start|>assistant\n")) + 16 for q in questions]
    # Beside its own tokens each has a copy of the context's last tiles, which are not full.
    assert max(peaks) - before <= sum(store_of(pipe).bytes_for(n + 32) for n in own)
    assert (nbytes(pipe), context.nbytes, positions(context)) == (before, size, kept)
    if policy != "none":
        assert alone != [pipe.generate(q, context=whole, **ASK) for q in questions]
        assert context.kept_tokens == mean_kept(context) == 60
        assert context.nbytes < whole.nbytes / 2


@ANY_POLICY
def test_sequences_of_a_question_go_on_as_the_single_one(policy: Ask, pipe: LLMPipeline) -> None:
    context = pipe.compress(TEXT, policy=policy)
    twice = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    alone = pipe.generate(QUESTIONS[0], context=context, **ASK)
    assert pipe.generate(QUESTIONS[0], context=context, **ASK, **twice).texts == [alone, alone]


def test_ids_follow_the_context_s_tokens(pipe: LLMPipeline) -> None:
    context = pipe.compress(TEXT, policy="none")
    rows = np.random.default_rng(0).integers(0, 256, (2, 9))
    ours = pipe.generate(ov.Tensor(rows), context=context, **ASK).tokens
    whole = np.stack([np.concatenate([context.ids, row]) for row in rows])
    assert ours == pipe.generate(ov.Tensor(whole), **ASK).tokens


@pytest.mark.parametrize("as_history", [False, True])
def test_conversation_is_asked_as_its_next_turn(as_history: bool, pipe: LLMPipeline) -> None:
    context = pipe.compress(ov_genai.ChatHistory(TALK) if as_history else TALK, policy="none")
    for question in QUESTIONS:
        history = ov_genai.ChatHistory([*TALK, {"role": "user", "content": question}])
        assert pipe.generate(question, context=context, **ASK) == pipe.generate(history, **ASK).texts[0]
        pipe.finish_chat()


def test_model_without_a_chat_template_goes_on_with_the_text(tiny_ir: Callable[[str], Path]) -> None:
    tokenizer = ov_genai.Tokenizer(str(tiny_ir("llama")))
    tokenizer.set_chat_template("")
    pipe = LLMPipeline(tiny_ir("llama"), "CPU", F32, tokenizer=tokenizer, cache_config=EXACT)
    context = pipe.compress(TEXT, policy="none")
    assert context.text == TEXT
    for question in QUESTIONS:
        assert pipe.generate(question, context=context, **ASK) == pipe.generate(TEXT + question, **ASK)
    assert mean_kept(pipe.compress(TEXT, policy=ZIP)) == 60
    with pytest.raises(CrushError, match="context must be a text where the tokenizer has no chat template, got mess"):
        pipe.compress(TALK)
    with pytest.raises(CrushError, match="chat needs a tokenizer with a chat template"):
        pipe.start_chat(context=context)


@pytest.mark.parametrize("text", ["a", "user", "assistant", "<|end|>", "\n n \t", "0", "10 of 10"])
def test_text_that_the_template_has_as_well_is_found(text: str, pipe: LLMPipeline) -> None:
    context = pipe.compress(text, policy="none")
    assert context.text == "<|start|>user\n" + text.strip()
    assert pipe.generate("b", context=context, **ASK) == pipe.generate(f"{text.strip()}\n\nb", **ASK)


def test_question_is_compressed_by_the_policy_that_it_asks_for(pipe: LLMPipeline) -> None:
    context = pipe.compress(TEXT, policy=ZIP)
    kept = pipe.generate([TEXT], context=context, policy=GROWTH, **ASK).kept[0]
    assert kept is not None
    assert below(as_lists(kept.positions), context.num_tokens) == positions(context)
    new = [len([p for p in head if p >= context.num_tokens]) for layer in kept.positions for head in layer]
    assert 24 <= np.mean(new) <= 24 + 8


# -- what stays --------------------------------------------------------------------------------------------------------


def test_default_is_kvzip_at_a_quarter(pipe: LLMPipeline) -> None:
    context = pipe.compress(TEXT * 4)
    assert context.policy is not None
    assert context.policy["name"] == "kvzip"
    assert context.kept_tokens == -(-context.num_tokens // 4)
    half = pipe.compress(TEXT * 4, policy="snapkv", kept=0.5)
    assert half.kept_tokens == -(-half.num_tokens // 2)


@pytest.mark.parametrize("policy", [ZIP, SNAP], ids=json.dumps)
def test_protected_passages_and_the_template_s_head_stay(policy: Ask, pipe: LLMPipeline) -> None:
    context = pipe.compress(TEXT, policy=policy, protect=["Reaper", (100, 103)])
    begin = context.text.index("Reaper")
    head = range(len("<|start|>user\n") - len("<|start|>") + 1)
    always = {*head, *range(100, 103), *range(begin - 8, begin - 2)}
    assert all(set(places) >= always for layer in positions(context) for places in layer)
    assert "Reaper" in pipe.get_tokenizer().decode(context.ids[begin - 8 : begin - 2].tolist())


@pytest.mark.parametrize("policy", [ZIP, SNAP], ids=json.dumps)
def test_system_message_of_a_conversation_stays(policy: Ask, pipe: LLMPipeline) -> None:
    context = pipe.compress(TALK, policy=policy)
    system = len(ids_of(pipe, "<|start|>system\n" + SYSTEM["content"]))
    assert all(set(places) >= set(range(system)) for layer in positions(context) for places in layer)
    assert context.kept_tokens == 60


@ANY_POLICY
def test_progress_grows_to_all(policy: Ask, pipe: LLMPipeline) -> None:
    seen: list[tuple[int, int]] = []
    context = pipe.compress(TEXT, policy=policy, progress=lambda done, of: seen.append((done, of)))
    done, totals = zip(*seen, strict=True)
    assert len(set(totals)) == 1
    assert list(done) == sorted(done)
    assert len(set(done)) > 2
    assert done[-1] == totals[0] >= context.num_tokens


# -- bytes -------------------------------------------------------------------------------------------------------------


@ANY_POLICY
def test_fork_is_the_same_and_lives_on(policy: Ask, pipe: LLMPipeline) -> None:
    context = pipe.compress(TEXT, policy=policy)
    answers = pipe.generate(QUESTIONS, context=context, **ASK).texts
    before = nbytes(pipe)
    fork = context.fork()
    assert nbytes(pipe) == before == fork.nbytes
    assert (fork.num_tokens, fork.kept_tokens, fork.policy, fork.text, positions(fork)) == (
        context.num_tokens, context.kept_tokens, context.policy, context.text, positions(context)
    )  # fmt: skip
    context.close()
    assert nbytes(pipe) == before
    assert pipe.generate(QUESTIONS, context=fork, **ASK).texts == answers
    with fork:
        assert fork.is_open
    assert not fork.is_open
    assert nbytes(pipe) == 0
    fork.close()
    assert "closed" in repr(fork)


def test_same_text_shares_bytes_and_another_policy_does_not(pipe: LLMPipeline) -> None:
    first = pipe.compress(TEXT, policy=ZIP)
    before = nbytes(pipe)
    seen: list[tuple[int, int]] = []
    second = pipe.compress(TEXT, policy=ZIP, progress=lambda *done: seen.append(done))
    assert nbytes(pipe) == before == second.nbytes
    first.close()
    assert nbytes(pipe) == before
    assert pipe.generate(QUESTIONS[0], context=second, **ASK)
    others = [{"policy": SNAP}, {"policy": {**ZIP, "kept_tokens": 59}}, {"policy": ZIP, "protect": [(70, 90)]}]
    made = [pipe.compress(TEXT, **options) for options in others]
    assert nbytes(pipe) == before + sum(other.nbytes for other in made)
    assert all(positions(other) != positions(second) for other in made)


def test_bytes_come_back_when_nothing_refers_to_it(pipe: LLMPipeline) -> None:
    context = pipe.compress(TEXT, policy=ZIP)
    assert nbytes(pipe) == context.nbytes > 0
    del context
    gc.collect()
    assert nbytes(pipe) == store_of(pipe).num_sequences == 0


def test_context_may_be_closed_while_it_is_asked(tiny_ir: Callable[[str], Path]) -> None:
    """Two questions run, the others wait for it."""
    pipe = make_pipe(tiny_ir("llama"), max_num_seqs=2)
    context = pipe.compress(TEXT, policy=ZIP)
    expected = pipe.generate(QUESTIONS, context=context, **ASK).texts
    engine: Any = pipe._backend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "step", lambda then=engine.step: (then(), context.close()))
        assert pipe.generate(QUESTIONS, context=context, **ASK).texts == expected
    assert_nothing_left(pipe)


def test_questions_that_lose_their_memory_begin_with_the_context_again(tiny_ir: Callable[[str], Path]) -> None:
    room = make_pipe(tiny_ir("llama"))
    context = room.compress(TEXT, policy=ZIP)
    options = {"max_new_tokens": 70, "ignore_eos": True}
    expected = room.generate(QUESTIONS, context=context, **options).texts
    tight = make_pipe(tiny_ir("llama"), {"max_bytes": context.nbytes + store_of(room).bytes_for(320)})
    context = tight.compress(TEXT, policy=ZIP)
    assert tight.generate(QUESTIONS, context=context, **options).texts == expected
    assert tight.get_metrics().num_preemptions > 0
    assert tight.get_metrics().max_cache_usage <= 100
    del context
    assert_nothing_left(tight)


def test_context_for_which_the_store_has_no_room(tiny_ir: Callable[[str], Path]) -> None:
    probe = make_pipe(tiny_ir("llama"))
    pipe = make_pipe(tiny_ir("llama"), {"max_bytes": store_of(probe).bytes_for(512)})
    with pytest.raises(CrushError, match=r"prompt must fit into the KV store of .* raise max_bytes"):
        pipe.compress(TEXT * 2, policy="none")
    first = pipe.compress(TEXT, policy="none")
    before, answer = nbytes(pipe), pipe.generate("a", context=first, **ASK)
    with pytest.raises(OutOfMemory, match=r"context must fit into the KV store beside what is there, got .* tokens"):
        pipe.compress(TEXT[1:], policy="none")
    assert nbytes(pipe) == before
    assert pipe.generate("a", context=first, **ASK) == answer
    second = pipe.compress(TEXT[1:], policy=ZIP)
    assert pipe.generate("a", context=second, **ASK)
    del first, second
    assert_nothing_left(pipe)


@pytest.mark.parametrize("policy", ["none", ZIP], ids=json.dumps)
@pytest.mark.parametrize("last", [False, True])
def test_error_of_the_caller_while_it_is_read_leaves_nothing(last: bool, policy: Ask, pipe: LLMPipeline) -> None:
    def progress(done: int, of: int) -> None:
        if done == of or not last:
            raise KeyError("caller")

    with pytest.raises(KeyError, match="caller"):
        pipe.compress(TEXT, policy=policy, progress=progress)
    assert_nothing_left(pipe)


@pytest.mark.parametrize("policy", ["none", ZIP], ids=json.dumps)
def test_stop_while_it_is_read_is_an_error_and_leaves_nothing(policy: Ask, pipe: LLMPipeline) -> None:
    with pytest.raises(CrushError, match=r"context must be read to its end, got a stop after [0-9]+ tokens"):
        pipe.compress(TEXT, policy=policy, progress=lambda *_: pipe.stop())
    assert_nothing_left(pipe)


def test_kvzip_s_context_of_a_text_that_was_a_prompt_before(tiny_ir: Callable[[str], Path]) -> None:
    """With prefix caching its KV is there, but it cannot be read twice there."""
    pipe = make_pipe(tiny_ir("llama"), enable_prefix_caching=True)
    pipe.generate(TEXT, **ASK)
    context = pipe.compress(TEXT, policy=ZIP)
    assert context.kept_tokens == 60
    pipe._backend.clear_prefixes()
    fresh = make_pipe(tiny_ir("llama"))
    assert positions(fresh.compress(TEXT, policy=ZIP)) == positions(context)


# -- more text and chats -----------------------------------------------------------------------------------------------


def test_extended_whole_context_is_that_of_the_longer_text(pipe: LLMPipeline) -> None:
    more = " Another one is blue. " * 3
    context = pipe.compress(TEXT, policy="none")
    before = context.nbytes
    longer = context.extend(more).extend("The end.")
    assert context.nbytes == before
    assert longer.text == context.text + more + "The end."
    assert nbytes(pipe) < before + longer.nbytes
    context.close()
    for question in QUESTIONS:
        whole = f"{TEXT}{more}The end.\n\n{question}"
        assert pipe.generate(question, context=longer, **ASK) == pipe.generate(whole, **ASK)


@pytest.mark.parametrize("growth", [None, GROWTH], ids=json.dumps)
def test_parts_of_contexts_are_the_bytes_of_all_of_them(growth: Ask | None, pipe: LLMPipeline) -> None:
    first = pipe.compress(TEXT, policy=SNAP)
    longer = first.extend("x" * 200, policy=growth)
    longest = longer.extend("y" * 90)
    contexts = [first, first.fork(), longer, longest, longest.fork(), pipe.compress(TEXT, policy=SNAP)]
    parts: dict[int, int] = {}
    for context in contexts:
        parts.update(context.nbytes_by_part)
    assert len(parts) == 3
    assert sum(parts.values()) == nbytes(pipe) < sum(context.nbytes for context in contexts)
    assert list(first.nbytes_by_part.values()) == [first.nbytes]


@pytest.mark.parametrize(("policy", "growth", "kept"), [(SNAP, None, 60), (ZIP, GROWTH, 24), (ZIP, None, 200)])
def test_extension_is_compressed_by_itself(policy: Ask, growth: Ask | None, kept: int, pipe: LLMPipeline) -> None:
    context = pipe.compress(TEXT, policy=policy)
    longer = context.extend("x" * 200, policy=growth)
    assert below(positions(longer), context.num_tokens) == positions(context)
    assert mean_kept(longer, context.num_tokens) == kept
    assert longer.kept_tokens == context.kept_tokens + kept
    longest = longer.extend("y" * 200, policy=growth)
    assert below(positions(longest), longer.num_tokens) == positions(longer)
    assert pipe.generate("a", context=longest, **ASK)


@pytest.mark.parametrize("talk", [TEXT, TALK], ids=["text", "messages"])
def test_chat_that_begins_with_a_whole_context_is_the_plain_chat(talk: Any, pipe: LLMPipeline) -> None:
    options = {"max_new_tokens": 12}
    context = pipe.compress(talk, policy="none")
    pipe.start_chat(context=context)
    ours, sizes = [], []
    for question in QUESTIONS[:3]:
        results = pipe.generate(question, **options, num_return_sequences=1)
        ours.append(results)
        sizes.append(pipe.chat_context().num_tokens)
    pipe.finish_chat()
    assert sizes == sorted(set(sizes))
    assert sizes[0] > context.num_tokens
    messages = [] if isinstance(talk, str) else list(talk)
    plain = []
    for i, question in enumerate(QUESTIONS[:3]):
        opening = f"{TEXT}\n\n{question}" if isinstance(talk, str) and not i else question
        messages.append({"role": "user", "content": opening})
        if not i:
            pipe.start_chat()
            pipe._history = ov_genai.ChatHistory(messages[:-1])
        plain.append(pipe.generate(opening, **options))
    assert ours == plain


@pytest.mark.parametrize("turns", [2, 3])
def test_chat_keeps_its_context_and_compresses_what_it_adds(turns: int, pipe: LLMPipeline) -> None:
    context = pipe.compress(TEXT, policy=ZIP)
    before = context.nbytes
    pipe.start_chat(context=context)
    for turn in range(turns):
        pipe.generate(f"{TEXT[:90]} {turn}?", policy=GROWTH, **ASK)
        chat = pipe.chat_context()
        assert below(positions(chat), context.num_tokens) == positions(context)
        assert 24 <= mean_kept(chat, context.num_tokens) <= 24 + 8
        assert chat.num_tokens > context.num_tokens + 90 * (turn + 1)
    assert context.nbytes == before
    assert nbytes(pipe) < before + chat.nbytes
    answer = pipe.generate("And then?", context=None, policy=GROWTH, **ASK)
    pipe.finish_chat()
    assert isinstance(answer, str)
    pipe.start_chat(context=chat)  # goes on from a turn before
    assert isinstance(pipe.generate("And then?", policy=GROWTH, **ASK), str)
    kept = positions(pipe.chat_context())
    assert below(kept, context.num_tokens) == positions(context)


def chat(pipe: LLMPipeline, options: list[Ask]) -> tuple[list[str], list[int]]:
    """Answers of a chat that begins with the whole context, and what it is long after each."""
    pipe.start_chat(context=pipe.compress(TEXT, policy="none"))
    answers, sizes = [], []
    for question, more in zip(QUESTIONS, options, strict=False):
        answers.append(pipe.generate(question, **{**ASK, **more}))
        sizes.append(pipe.chat_context().num_tokens)
    return answers, sizes


def plain_chat(pipe: LLMPipeline, options: list[Ask]) -> list[str]:
    pipe.start_chat()
    questions = [f"{TEXT}\n\n{QUESTIONS[0]}", *QUESTIONS[1:]]
    return [pipe.generate(q, **{**ASK, **more}) for q, more in zip(questions, options, strict=False)]


def test_chat_goes_on_after_a_stop_string(pipe: LLMPipeline) -> None:
    first = plain_chat(pipe, [{}])[0]
    options: list[Ask] = [{"stop_strings": {first[4:6]}, "include_stop_str_in_output": False}, {}, {}]
    answers, sizes = chat(pipe, options)
    assert first.startswith(answers[0])
    assert answers == plain_chat(pipe, options)
    assert sizes[0] < sizes[1] < sizes[2]


def test_chat_goes_on_where_the_template_leaves_out_what_was_answered(tiny_ir: Callable[[str], Path]) -> None:
    """As templates of models that think aloud do."""
    tokenizer = ov_genai.Tokenizer(str(tiny_ir("llama")))
    said = "(message['content'] if message['role'] != 'assistant' else '...')"
    tokenizer.set_chat_template(CHAT_TEMPLATE.replace("message['content']", said))
    pipe = LLMPipeline(tiny_ir("llama"), "CPU", F32, tokenizer=tokenizer, cache_config=EXACT)
    answers, sizes = chat(pipe, [{}] * 4)
    assert answers == plain_chat(pipe, [{}] * 4)
    assert sizes == sorted(sizes)
    pipe.finish_chat()
    assert_nothing_left(pipe)


def test_contexts_may_come_and_go_in_many_threads(pipe: LLMPipeline) -> None:
    context = pipe.compress(TEXT, policy=ZIP)
    expected = [pipe.generate(q, context=context, **ASK) for q in QUESTIONS]

    def ask(index: int) -> list[str]:
        mine = context.fork() if index % 2 else pipe.compress(f"{TEXT} {index}", policy=SNAP)
        others = pipe.generate(QUESTIONS, context=mine, **ASK).texts
        return others if index % 2 else pipe.generate(QUESTIONS, context=context, **ASK).texts

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(8))) == [expected] * 8


def test_turn_of_a_chat_that_fails_or_is_cancelled_leaves_it_as_it_was(pipe: LLMPipeline) -> None:
    context = pipe.compress(TEXT, policy=ZIP)
    pipe.start_chat(context=context)
    first = pipe.generate("What?", **ASK)
    size, held = pipe.chat_context().num_tokens, nbytes(pipe)

    def failing(text: str) -> None:
        raise KeyError("caller")

    with pytest.raises(KeyError):
        pipe.generate("And?", streamer=failing, **ASK)
    pipe.generate("And?", streamer=lambda text: ov_genai.StreamingStatus.CANCEL, **ASK)
    with pytest.raises(CrushError, match="valid Unicode"):
        pipe.generate("\ud800")
    gc.collect()
    assert (pipe.chat_context().num_tokens, nbytes(pipe)) == (size, held)
    second = pipe.generate("And?", **ASK)
    pipe.start_chat(context=context)
    assert [pipe.generate("What?", **ASK), pipe.generate("And?", **ASK)] == [first, second]


def test_error_after_the_last_token_of_a_chat_s_turn_leaves_nothing(pipe: LLMPipeline) -> None:
    class Failing(ov_genai.StreamerBase):
        def write(self, token: int | list[int]) -> ov_genai.StreamingStatus:
            return ov_genai.StreamingStatus.RUNNING

        def end(self) -> None:
            raise KeyError("caller")

    context = pipe.compress(TEXT, policy=ZIP)
    pipe.start_chat(context=context)
    held = nbytes(pipe)
    with pytest.raises(KeyError):
        pipe.generate("What?", streamer=Failing(), **ASK)
    assert nbytes(pipe) == held


# -- bad input ---------------------------------------------------------------------------------------------------------


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty": ("", {}, "prompt must have at least one token, got an empty text"),
    "white space": (" \n\t", {}, "context must have some text, got white space only"),
    "surrogates": ("\ud800", {}, "prompt must be valid Unicode, got a text with lone surrogates"),
    "number": (5, {}, "context must be a text or messages with role and content, got 5"),
    "no messages": ([], {}, r"context must be a text or messages with role and content, got \[\]"),
    "no content": ([{"role": "user"}], {}, r"messages with role and content, got \[{'role': 'user'}\]"),
    "too long": (TEXT * 20, {}, r"must be shorter than .*, got .* tokens"),
    "kept with a policy": (
        TEXT,
        {"policy": build("kvzip"), "kept": 0.5},
        "kept must be left out where policy has its own settings, got 0.5",
    ),
    "kept with settings": (TEXT, {"policy": ZIP, "kept": 0.5}, "kept must be left out where policy has its own"),
    "kept above 1": (TEXT, {"kept": 1.5}, r"kept must be a fraction in \(0, 1\], got 1.5"),
    "kept of all": (TEXT, {"policy": "none", "kept": 0.5}, "kept must be left out with policy 'none'"),
    "unknown policy": (TEXT, {"policy": "kvzap"}, r"policy must be one of .*, got 'kvzap' \(did you mean 'kvzip'\?\)"),
    "passage": (TEXT, {"protect": ["xyz"]}, "passages of the prompt, got 'xyz', which is not in it"),
    "span": (TEXT, {"protect": [(0, 9999)]}, r"protect must be spans .*, got \(0, 9999\)"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_what_cannot_be_compressed_is_refused(case: tuple[Any, dict[str, Any], str], pipe: LLMPipeline) -> None:
    text, options, message = case
    with pytest.raises(CrushError, match=message):
        pipe.compress(text, **options)


def test_text_that_does_not_fit_the_staging_blocks_twice(tiny_ir: Callable[[str], Path]) -> None:
    pipe = make_pipe(tiny_ir("llama"), {"staging_bytes": 16 << 15})
    with pytest.raises(CrushError, match=r"to be read twice, as policy 'kvzip' wants: .*; raise staging_bytes"):
        pipe.compress(TEXT, policy={**ZIP, "chunk": 2048})
    assert pipe.compress(TEXT, policy=ZIP).kept_tokens == 60
    assert pipe.compress(TEXT * 2, policy=SNAP).kept_tokens == 60


def test_context_that_cannot_be_used_is_refused(pipe: LLMPipeline, tiny_ir: Callable[[str], Path]) -> None:
    closed = pipe.compress(TEXT[:50], policy="none")
    closed.close()
    other = make_pipe(tiny_ir("llama"))
    theirs = other.compress(TEXT, policy=ZIP)
    orphan = make_pipe(tiny_ir("llama")).compress(TEXT, policy="none")
    gc.collect()
    closed_message = "context must be open, got one that was closed"
    gone_message = "context must be used while its pipeline is there, got one whose pipeline is gone"
    cases: list[tuple[Any, str]] = [
        (closed, closed_message),
        (orphan, gone_message),
        (theirs, "context must be of the pipeline that is asked, got another's; save it, and load it for this one"),
        ("text", "context must be a Context, as compress() makes them, got str"),
    ]
    for context, message in cases:
        for call in (lambda c: pipe.generate("a", context=c), lambda c: pipe.start_chat(context=c)):
            with pytest.raises(CrushError, match=re.escape(message)):
                call(context)
    for context, message in ((closed, closed_message), (orphan, gone_message)):
        for use in (lambda c: c.nbytes, lambda c: c.fork(), lambda c: c.extend("a"), lambda c: c.kept_map()):
            with pytest.raises(CrushError, match=message):
                use(context)
    orphan.close()


def test_misuse_of_a_context_is_refused(pipe: LLMPipeline) -> None:
    context = pipe.compress(TEXT, policy=ZIP)
    talk = pipe.compress(TALK, policy=SNAP)
    with pytest.raises(CrushError, match=r"context must be given to start_chat\(\) for a conversation, got one in a"):
        pipe.generate(ov_genai.ChatHistory(TALK[:2]), context=context)
    with pytest.raises(CrushError, match="system_message must be left out with a context, which has its own, got both"):
        pipe.start_chat("Be brief.", context=context)
    with pytest.raises(CrushError, match="chat must have begun with a context to be one, got none"):
        pipe.chat_context()
    pipe.start_chat(context=context)
    with pytest.raises(CrushError, match=r"context must be given to start_chat\(\) for a conversation, got one in a"):
        pipe.generate("a", context=context)
    pipe.finish_chat()
    with pytest.raises(CrushError, match="prompt must have at least one token, got an empty text"):
        pipe.generate("", context=context)
    with pytest.raises(CrushError, match="prompt must have at least one token behind its context, got none"):
        pipe.generate(ov.Tensor(np.zeros((1, 0), np.int64)), context=context)
    with pytest.raises(CrushError, match=r"extend\(\) must follow a text, got a conversation"):
        talk.extend("more")
    with pytest.raises(CrushError, match=r"policy must be one that reads a text once in extend\(\), got 'kvzip'"):
        context.extend("more", policy="kvzip")
    with pytest.raises(CrushError, match="prompt must have at least one token, got an empty text"):
        context.extend("")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "genai"}, "context must not be asked for with engine='genai', got one; engine='crush' holds it"),
        ({"cache_config": {"attention": "paged"}}, "context must not be asked for with attention='paged', got one"),
    ],
)
def test_engines_without_contexts_refuse_them(
    options: dict[str, Any], message: str, tiny_ir: Callable[[str], Path]
) -> None:
    pipe = LLMPipeline(tiny_ir("llama"), **options)
    for policy in (None, "none"):
        with pytest.raises(CrushError, match=message):
            pipe.compress(TEXT, policy=policy)


# -- a real model ------------------------------------------------------------------------------------------------------


def test_real_model_answers_together_as_one_by_one(smollm2: Path) -> None:
    pipe = LLMPipeline(smollm2, "CPU", F32)  # bf16 and quantised activations round a batch otherwise than a lone row
    facts = " ".join(f"On day {i} the {'ship' if i % 3 else 'crew'} saw {7 * i % 11} whales." for i in range(35))
    text = f"{facts} The captain's name is Ishmael Brown. {facts[:400]}"
    questions = ["What is the captain's name?", "What did the ship see?", "Say hello."]
    options = {"max_new_tokens": 12}
    context = pipe.compress(text, kept=0.5)
    assert 500 < context.num_tokens < 900
    assert context.kept_tokens == -(-context.num_tokens // 2)
    alone = [pipe.generate(q, context=context, **options) for q in questions]
    assert pipe.generate(questions, context=context, **options).texts == alone
    assert "Ishmael" in alone[0]
    whole = pipe.compress(text, policy="none")
    assert whole.ids.tolist() == ids_of(pipe, whole.text).tolist()
    assert context.nbytes < 0.6 * whole.nbytes
    del context, whole
    assert_nothing_left(pipe)


def test_kept_prefixes_stay_within_their_limit(tiny_ir: Callable[[str], Path]) -> None:
    free = make_pipe(tiny_ir("llama"), enable_prefix_caching=True)
    texts = [f"{i} {TEXT}" for i in range(4)]
    for text in texts:
        free.generate(text, **ASK)
    one = nbytes(free) // len(texts)
    limited = make_pipe(tiny_ir("llama"), {"prefix_bytes": 2 * one + one // 2}, enable_prefix_caching=True)
    for text in texts:
        limited.generate(text, **ASK)
        assert nbytes(limited) <= 2 * one + one // 2
    reused = [limited.generate([text], **ASK).perf_metrics.num_reused_tokens > 0 for text in reversed(texts)]
    assert reused[:2] == [True, True]  # the newest ones stayed
    assert not any(reused[2:])
