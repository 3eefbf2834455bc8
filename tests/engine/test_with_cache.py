"""Pipelines beside each other: one model and its staging blocks, a store each; what one reads both may hold."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as ov_genai
import pytest
from eviction_runs import EXACT, F32, SMALL, as_lists

from ov_kvcrush import Context, ContinuousBatchingPipeline, CrushError, LLMPipeline, OutOfMemory
from ov_kvcrush.policies.base import Policy
from ov_kvcrush.policies.registry import build

TIGHT = {**SMALL, "kept_tokens": 60}
POLICIES = [
    build("none"),
    build("snapkv", **TIGHT),
    build("kvzip", **TIGHT, chunk=64),
    build("kvcrush", **TIGHT, scorer="kvzip", chunk=64),
    build("h2o", **TIGHT, split="ada"),
]
U4 = {"key_precision": "u4", "value_precision": "u4"}
CONFIGS = [U4, {"key_precision": "u8", "value_precision": "u2", "group_size": 16, "recent_tokens": 0}, EXACT]
ASK = {"max_new_tokens": 16, "ignore_eos": True}
IDS = np.random.default_rng(0).integers(0, 256, 230)
QUESTION = np.random.default_rng(1).integers(0, 256, 9)
BLOCK = 32 << 10  # bytes of a staging block of "llama"


def make_pipe(folder: Path, cache: dict[str, Any] | None = None, **scheduler: Any) -> LLMPipeline:
    config = {"max_num_batched_tokens": 96, **scheduler}
    return LLMPipeline(folder, "CPU", F32, cache_config={**EXACT, **(cache or {})}, scheduler_config=config)


def memory_of(pipe: Any) -> Any:
    return pipe._backend.cache


def nbytes(pipe: Any) -> int:
    return pipe.get_metrics().kv_cache_size_in_bytes


def assert_nothing_left(*pipes: Any) -> None:
    gc.collect()
    for pipe in pipes:
        memory = memory_of(pipe)
        deadline = time.monotonic() + 10
        while nbytes(pipe) and time.monotonic() < deadline:  # who is told of an end can be here before its KV goes
            time.sleep(0.01)
        assert pipe.get_metrics().requests == 0
        assert nbytes(pipe) == memory.store.num_sequences == memory.staging.pool.num_used == 0


def positions(context: Context) -> list[list[list[int]]]:
    return as_lists(context.kept_map().positions)


def answers(pipe: LLMPipeline, contexts: Sequence[Context], question: np.ndarray = QUESTION) -> list[list[int]]:
    return [pipe.generate(ov.Tensor(question[None]), context=c, **ASK).tokens[0] for c in contexts]


@pytest.fixture(scope="module")
def folder(tiny_ir: Callable[[str], Path]) -> Path:
    return tiny_ir("llama")


@pytest.fixture(scope="module")
def shared(folder: Path) -> LLMPipeline:
    return make_pipe(folder)


@pytest.fixture
def pipe(shared: LLMPipeline) -> Iterator[LLMPipeline]:
    """The same for all tests; each must leave it empty."""
    yield shared
    assert_nothing_left(shared)


# -- what is read once is what each would have read --------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_contexts_are_those_of_a_pipeline_loaded_with_the_same_cache(
    config: dict[str, Any], pipe: LLMPipeline, folder: Path
) -> None:
    beside, alone = pipe.with_cache(config), make_pipe(folder, config)
    assert type(beside) is LLMPipeline
    made = pipe.compress_ids(IDS, POLICIES, pipelines=[beside] * len(POLICIES), head=5)
    expected = [alone.compress_ids(IDS, [policy], head=5)[0] for policy in POLICIES]
    assert nbytes(pipe) == 0
    sizes = [[(c.nbytes, c.policy, c.kept_tokens) for c in contexts] for contexts in (made, expected)]
    assert sizes[0] == sizes[1]
    assert list(map(positions, made)) == list(map(positions, expected))
    said = answers(beside, made)
    assert said == answers(alone, expected)
    assert beside.answer_each([(c, QUESTION) for c in made], beside._options(None, ASK)) == [
        alone.get_tokenizer().decode(tokens) for tokens in said
    ]
    assert any(tokens != said[0] for tokens in said)
    for context in (*made, *expected):
        context.close()
    assert_nothing_left(pipe, beside, alone)


def test_a_pipeline_beside_one_with_shared_layers_has_them_too(folder: Path) -> None:
    pipe = make_pipe(folder, {"shared_layers": {1: 0}})
    beside, named = pipe.with_cache(EXACT), pipe.with_cache({**EXACT, "shared_layers": {1: 0}})
    policies = [build("kvzip", **TIGHT, chunk=64)] * 3
    made = pipe.compress_ids(IDS, policies, pipelines=[pipe, beside, named])
    assert len({c.nbytes for c in made}) == 1
    said = [answers(one, [context])[0] for one, context in zip((pipe, beside, named), made, strict=True)]
    assert said == [said[0]] * 3
    for context in made:
        context.close()
    assert_nothing_left(pipe, beside, named)


def test_one_reading_fills_the_stores_of_all_whoever_reads(pipe: LLMPipeline) -> None:
    pipes = [pipe, pipe.with_cache(CONFIGS[0])]
    pipes.append(pipes[1].with_cache(CONFIGS[1]))
    policies = [policy for policy in POLICIES for _ in pipes]
    homes = pipes * len(POLICIES)
    expected = None
    for reader in pipes:
        with counted_steps(pipes) as steps:
            made = reader.compress_ids(IDS, policies, pipelines=homes)
        with counted_steps(pipes) as least:
            (lone,) = reader.compress_ids(IDS, [POLICIES[2]])
        lone.close()
        assert steps == least
        assert [n > 0 for n in steps] == [p is reader for p in pipes]
        placed = list(zip(homes, made, strict=True))
        assert [nbytes(p) for p in pipes] == [sum(c.nbytes for home, c in placed if home is p) for p in pipes]
        said = [answers(home, [context])[0] for home, context in placed]
        assert expected in (None, said)
        expected = said
        for first in range(0, len(made), len(pipes)):
            assert positions(made[first]) == positions(made[first + 1]) == positions(made[first + 2])
        for home, context in placed:
            assert context.snapshot_for(home.context_owner).num_tokens == len(IDS)
            context.close()
    assert_nothing_left(*pipes)


class counted_steps:
    """How many inferences each pipeline ran."""

    def __init__(self, pipes: Sequence[LLMPipeline]) -> None:
        self._pipes, self._steps, self._patch = pipes, [0] * len(pipes), pytest.MonkeyPatch()

    def __enter__(self) -> list[int]:
        for index, pipe in enumerate(self._pipes):
            runner: Any = pipe._backend._runner  # type: ignore[attr-defined]

            def infer(index: int = index, then: Callable[[], np.ndarray] = runner.infer) -> np.ndarray:
                self._steps[index] += 1
                return then()

            self._patch.setattr(runner, "infer", infer)
        return self._steps

    def __exit__(self, *error: object) -> None:
        self._patch.undo()


def test_policies_that_are_equal_choose_once(pipe: LLMPipeline) -> None:
    beside = pipe.with_cache(U4)
    asked: list[Policy] = []
    policies = [build("snapkv", **TIGHT) for _ in range(4)]
    with pytest.MonkeyPatch.context() as patch:
        kind = type(policies[0])
        select = kind.select
        patch.setattr(kind, "select", lambda self, *args: (asked.append(self), select(self, *args))[1])
        made = pipe.compress_ids(IDS, policies, pipelines=[pipe, beside, pipe, beside])
    assert len(asked) == 1
    assert len({str(positions(context)) for context in made}) == 1
    made.clear()
    assert_nothing_left(pipe, beside)


def test_each_is_a_pipeline_of_its_own(pipe: LLMPipeline, folder: Path) -> None:
    beside, alone = pipe.beside(U4), make_pipe(folder, U4)  # with_cache by its first name
    config = pipe.get_generation_config()
    beside.set_generation_config(ov_genai.GenerationConfig(max_new_tokens=3))
    assert pipe.get_generation_config().max_new_tokens == config.max_new_tokens
    pipe.start_chat()
    text = "In the harbour of Anstruther lie nine boats. " * 3
    assert beside.generate(text, **ASK) == alone.generate(text, **ASK)  # not a turn of the other's chat
    beside.start_chat()
    alone.start_chat()
    for turn in ("One?", "Two?"):
        assert beside.generate(turn, **ASK) == alone.generate(turn, **ASK)
        pipe.generate(turn, **ASK)
    pipe.finish_chat()
    assert nbytes(beside) == nbytes(alone) > 0 == nbytes(pipe)
    beside.finish_chat()
    alone.finish_chat()
    with beside.compress(text, policy=POLICIES[2]) as ours, alone.compress(text, policy=POLICIES[2]) as theirs:
        assert beside.generate("What?", context=ours, **ASK) == alone.generate("What?", context=theirs, **ASK)
        assert nbytes(pipe) == 0
        with pytest.raises(CrushError, match="context must be of the pipeline that is asked, got another's"):
            pipe.generate("What?", context=ours)
    assert_nothing_left(pipe, beside)


def test_a_file_of_a_context_that_another_read_is_that_of_its_own_pipeline(
    pipe: LLMPipeline, folder: Path, tmp_path: Path
) -> None:
    beside, alone = pipe.with_cache(U4), make_pipe(folder, U4)
    (context,) = pipe.compress_ids(IDS, [POLICIES[1]], pipelines=[beside])
    context.save(tmp_path / "context.kvc")
    loaded = Context.load(tmp_path / "context.kvc", alone)
    assert answers(alone, [loaded]) == answers(beside, [context])
    with pytest.raises(CrushError, match="key_precision"):
        Context.load(tmp_path / "context.kvc", pipe)
    del context, loaded
    assert_nothing_left(pipe, beside, alone)


def test_pipeline_beside_one_that_is_gone_goes_on(folder: Path) -> None:
    beside = make_pipe(folder).with_cache(U4)
    gc.collect()
    (context,) = beside.compress_ids(IDS, [POLICIES[2]])
    assert answers(beside, [context]) == answers(beside, [context])
    del context
    assert_nothing_left(beside)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_store_without_room_leaves_the_others_as_they_were(pipe: LLMPipeline) -> None:
    beside = pipe.with_cache(U4)
    (small,) = beside.compress_ids(IDS, [POLICIES[1]])
    tight = pipe.with_cache({**U4, "max_bytes": small.nbytes + memory_of(beside).store.bytes_for(len(IDS)) - 1})
    small.close()
    held = tight.compress_ids(IDS[::-1].copy(), [POLICIES[1]])
    before, answer = nbytes(tight), answers(tight, held)
    homes = [pipe, beside, tight, pipe]
    for reader in (pipe, tight):
        with pytest.raises(OutOfMemory, match="context must fit into the KV store beside what is there, got 230"):
            reader.compress_ids(IDS, [POLICIES[0]] * 4, pipelines=homes)
        gc.collect()
        assert [nbytes(p) for p in (pipe, beside, tight)] == [0, 0, before]
        assert memory_of(pipe).staging.pool.num_used == 0
    assert answers(tight, held) == answer
    made = pipe.compress_ids(IDS, [POLICIES[2]] * 4, pipelines=homes)
    with pytest.raises(OutOfMemory, match="prompt and answer must fit into the KV store beside what is there"):
        answers(tight, made[2:3], question=IDS)
    del held
    assert all(answers(home, [context]) for home, context in zip(homes, made, strict=True))
    del made
    assert_nothing_left(pipe, beside, tight)
    with pytest.raises(CrushError, match=r"prompt must fit into the KV store of .* raise max_bytes"):
        pipe.compress_ids(np.tile(IDS, 5), [POLICIES[0]] * 2, pipelines=[pipe, tight])
    assert_nothing_left(pipe, beside, tight)


def test_kept_prefixes_make_room_for_what_another_read(pipe: LLMPipeline) -> None:
    tight = pipe.with_cache({**U4, "max_bytes": memory_of(pipe.with_cache(U4)).store.bytes_for(len(IDS) + 40)})
    tight.start_chat()
    tight.generate("In the harbour lie boats. " * 5, **ASK)
    assert nbytes(tight) > memory_of(tight).store.bytes_for(64)
    (context,) = pipe.compress_ids(IDS, [POLICIES[0]], pipelines=[tight])
    assert nbytes(tight) == context.nbytes
    tight.finish_chat()
    del context
    assert_nothing_left(pipe, tight)


@pytest.mark.parametrize("last", [False, True])
def test_error_of_the_caller_while_it_is_read_leaves_nothing(last: bool, pipe: LLMPipeline) -> None:
    beside = pipe.with_cache(U4)

    def progress(done: int, of: int) -> None:
        if done == of or not last:
            raise KeyError("caller")

    with pytest.raises(KeyError, match="caller"):
        pipe.compress_ids(IDS, POLICIES, pipelines=[beside, pipe] * 2 + [beside], progress=progress)
    assert_nothing_left(pipe, beside)


def test_error_of_a_policy_leaves_nothing(pipe: LLMPipeline) -> None:
    beside = pipe.with_cache(U4)
    broken = build("tova", **TIGHT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(broken), "select", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipe.compress_ids(IDS, [*POLICIES[:2], broken], pipelines=[pipe, beside, beside])
    assert_nothing_left(pipe, beside)


def test_kept_prefixes_of_a_prompt_do_not_keep_it_from_being_read(folder: Path) -> None:
    pipe = make_pipe(folder, enable_prefix_caching=True)
    beside = pipe.with_cache(U4)
    pipe.generate(ov.Tensor(IDS[None]), **ASK)
    first, second = (pipe.compress_ids(IDS, POLICIES, pipelines=[beside] * len(POLICIES)) for _ in range(2))
    assert answers(beside, first) == answers(beside, second)
    first.clear(), second.clear()
    for each in (pipe, beside):
        each._backend.clear_prefixes()
    assert_nothing_left(pipe, beside)


# -- staging blocks ----------------------------------------------------------------------------------------------------


def test_prompts_of_both_wait_for_the_same_staging_blocks(folder: Path) -> None:
    """In many threads, with blocks for little more than one of the texts and its second reading."""
    pipe = make_pipe(folder, {"staging_bytes": 16 * BLOCK})
    pipes = [pipe, pipe.with_cache(U4), pipe.with_cache(CONFIGS[1])]
    assert len({id(memory_of(p).staging.pool) for p in pipes}) == len({id(memory_of(p).staging) for p in pipes}) == 1

    def work(index: int) -> list[Any]:
        ids = np.roll(IDS, index // 2)
        own, other = pipes[index % 3], pipes[(index + 1) % 3]
        contexts = own.compress_ids(ids, POLICIES[:3], pipelines=[own, other, other])
        plain = other.generate(ov.Tensor(ids[None, :200]), **ASK).tokens[0]
        said = answers(own, contexts[:1]) + answers(other, contexts[1:])
        for context in contexts:
            context.close()
        return [plain, said]

    expected = [work(index) for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == expected
    assert_nothing_left(*pipes)


def test_request_that_nobody_steps_does_not_block_the_other_pipeline(folder: Path) -> None:
    config = {**EXACT, "staging_bytes": 10 * BLOCK}
    pipe = ContinuousBatchingPipeline(folder, {"max_num_batched_tokens": 64}, "CPU", F32, cache_config=config)
    beside = pipe.with_cache(U4)
    assert type(beside) is ContinuousBatchingPipeline
    expected = beside.generate([ov.Tensor(IDS[None])], **ASK)[0].m_generation_ids
    handle = pipe.add_request(0, ov.Tensor(IDS[None]), **ASK)
    pipe.step()
    assert not handle.can_read()
    assert memory_of(beside).is_contended
    assert not memory_of(pipe).is_contended
    assert beside.generate([ov.Tensor(IDS[None])], **ASK)[0].m_generation_ids == expected
    assert handle.can_read()
    while pipe.has_non_finished_requests():
        pipe.step()
    alone = ContinuousBatchingPipeline(folder, {"max_num_batched_tokens": 64}, "CPU", F32, cache_config=EXACT)
    theirs = alone.generate([ov.Tensor(IDS[None])], **ASK)[0].m_generation_ids
    assert [handle.outputs()[0].generated_ids] == theirs
    assert_nothing_left(pipe, beside)


# -- bad use -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "genai"}, "engine must be 'crush' for a pipeline beside another, got 'genai', which has no store"),
        (
            {"cache_config": {"attention": "paged"}},
            "attention must be 'crush' for a pipeline beside another, got 'paged', which has no store",
        ),
    ],
)
def test_engines_without_a_store_have_none_beside(options: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(CrushError, match=message):
        LLMPipeline(folder, **options).with_cache(U4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"staging_bytes": 1 << 20}, "staging_bytes must be left out beside another pipeline, .* got 1048576"),
        ({"attention": "paged"}, "attention must be 'crush' or 'auto' beside another pipeline, got 'paged'"),
        ({"max_bytes": 100}, "max_bytes must be at least .*, got 100"),
        ({"shared_layers": {1: 0}}, r"shared_layers must be those that the model was loaded with, \{\}, got \{1: 0\}"),
        ({"key_precision": "u3"}, "key_precision must be one of"),
        ({"key_precison": "u4"}, "key_precison"),
        (5, "cache_config must be a CacheConfig or a dict, got int"),
    ],
)
def test_caches_that_cannot_be_beside_are_refused(config: Any, message: str, pipe: LLMPipeline) -> None:
    with pytest.raises(CrushError, match=message):
        pipe.with_cache(config)


def test_pipelines_that_cannot_take_are_refused(pipe: LLMPipeline, folder: Path) -> None:
    beside = pipe.with_cache(U4)
    stranger, genai = make_pipe(folder), LLMPipeline(folder, engine="genai")
    cases: list[tuple[Any, str]] = [
        ([beside, stranger], "pipelines must be the one that reads or made by its with_cache(), got another"),
        ([genai, beside], "pipelines must be the one that reads or made by its with_cache(), got another"),
        ([beside], "pipelines must be one for each of 2 policies, got 1"),
        ([], "pipelines must be one for each of 2 policies, got 0"),
        ([beside, "u4"], "pipelines must be pipelines, got str"),
    ]
    for pipelines, message in cases:
        with pytest.raises(CrushError, match=re.escape(message)):
            pipe.compress_ids(IDS, POLICIES[:2], pipelines=pipelines)
    with pytest.raises(CrushError, match="policies must agree on how a text is read again"):
        pipe.compress_ids(IDS, [build("kvzip", **TIGHT, sample=s) for s in (1, 0.5)], pipelines=[pipe, beside])
    assert_nothing_left(pipe, beside, stranger)


def test_text_that_is_longer_than_the_staging_blocks_is_refused(folder: Path) -> None:
    pipe = make_pipe(folder, {"staging_bytes": 4 * BLOCK})
    with pytest.raises(CrushError, match=r"to be read once for several policies, got 230 tokens; raise staging_bytes"):
        pipe.compress_ids(IDS, POLICIES[:2])
    assert_nothing_left(pipe)


# -- prompts that begin alike are read once ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_staged", [200, 192, 31])
def test_what_follows_a_staged_prompt_is_what_the_whole_would_be(num_staged: int, pipe: LLMPipeline) -> None:
    beside = pipe.with_cache(U4)
    homes = [beside, pipe] * 2 + [beside]
    tails = [np.random.default_rng(seed).integers(0, 256, length) for seed, length in enumerate((30, 1, 90))]
    with pipe.stage_ids(IDS[:num_staged]) as staged:
        assert nbytes(pipe) == 0
        for tail in tails:
            ids = np.concatenate([IDS[:num_staged], tail])
            with counted_steps([pipe]) as steps:
                made = pipe.compress_ids(ids, POLICIES, pipelines=homes, head=5, staged=staged)
            with counted_steps([pipe]) as steps_of_all:
                expected = pipe.compress_ids(ids, POLICIES, pipelines=homes, head=5)
            assert num_staged < 100 or steps < steps_of_all  # which have 96 rows at most
            assert list(map(positions, made)) == list(map(positions, expected))
            assert [c.nbytes for c in made] == [c.nbytes for c in expected]
            for one, other, home in zip(made, expected, homes, strict=True):
                assert answers(home, [one]) == answers(home, [other])
            for context in (*made, *expected):
                context.close()
    assert_nothing_left(beside)


def test_a_staged_prompt_that_was_released_is_read_again(pipe: LLMPipeline) -> None:
    with pipe.stage_ids(IDS[:100]) as staged:
        pass
    assert memory_of(pipe).staging.pool.num_used == 0
    made, expected = (pipe.compress_ids(IDS, POLICIES[:2], staged=one) for one in (staged, None))
    assert list(map(positions, made)) == list(map(positions, expected))
    for context in (*made, *expected):
        context.close()


def test_nobody_waits_for_blocks_that_are_held(folder: Path) -> None:
    pipe = make_pipe(folder, {"staging_bytes": 12 * BLOCK})
    with pipe.stage_ids(IDS):
        with pytest.raises(OutOfMemory):
            pipe.compress_ids(IDS[::-1].copy(), POLICIES[:2])
        pipe.compress_ids(IDS[:30], POLICIES[:2])
    (context,) = pipe.compress_ids(IDS[::-1].copy(), POLICIES[:1])
    context.close()
    assert_nothing_left(pipe)


def test_a_prompt_must_go_on_from_what_is_staged(pipe: LLMPipeline, folder: Path) -> None:
    with pipe.stage_ids(IDS[:100]) as staged:
        for ids in (IDS[:100], IDS[1:], IDS[:50]):
            with pytest.raises(CrushError, match="prompt must begin with the staged tokens and go on"):
                pipe.compress_ids(ids, POLICIES[:1], staged=staged)
    with (
        pytest.raises(CrushError, match="must fit into the staging blocks"),
        make_pipe(folder, {"staging_bytes": 4 * BLOCK}).stage_ids(IDS),
    ):
        pass
