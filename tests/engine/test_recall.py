"""Recall in a pipeline: reading all is as without, and everything that a cache can do goes on with it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from eviction_runs import F32, SMALL
from tiny_models import HEAD_SIZE, NUM_HEADS, VOCAB_SIZE

from ov_kvcrush import CacheConfig, Context, CrushError, LLMPipeline
from ov_kvcrush.config import parse_recall
from ov_kvcrush.kvcache.crush import CrushKVCache
from ov_kvcrush.policies.registry import build

ASK: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True}
TEXT = "In the harbour of Anstruther lie nine boats. " * 30 + "The red one is called Reaper."
POLICY = {"name": "snapkv", **SMALL, "kept_tokens": 600, "recent_tokens": 40}


@pytest.fixture(scope="module")
def folder(tiny_ir: Callable[[str], Path]) -> Path:
    return tiny_ir("llama")


def make_pipe(folder: Path, recall: float | str | None = 64, scheduler: Any = None, **cache: Any) -> LLMPipeline:
    return LLMPipeline(
        folder, "CPU", F32, cache_config={"recall_tokens": recall, **cache}, scheduler_config=scheduler or {}
    )


def prompt(n: int, seed: int = 0) -> ov.Tensor:
    return ov.Tensor(np.random.default_rng(seed).integers(0, VOCAB_SIZE - 8, (1, n)))


def cache_of(pipe: LLMPipeline) -> CrushKVCache:
    cache = pipe._backend.cache  # type: ignore[attr-defined]
    assert isinstance(cache, CrushKVCache)
    return cache


def assert_nothing_left(pipe: LLMPipeline) -> None:
    gc.collect()
    assert cache_of(pipe).store.nbytes == 0


@pytest.mark.parametrize("policy", [None, POLICY])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_recall_of_all_answers_as_without(tiny_ir: Callable[[str], Path], kind: str, policy: Any) -> None:
    answers = []
    for recall in (None, 5000):
        pipe = make_pipe(tiny_ir(kind), recall, policy=policy)
        texts = [pipe.generate(TEXT, **ASK), pipe.generate(prompt(700), **ASK).tokens]
        with pipe.compress(TEXT, kept=0.5) as context:  # a plan of bytes would count those of the means
            texts.append(pipe.generate("What is it called?", context=context, **ASK))
        answers.append(texts)
        assert_nothing_left(pipe)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("cache", [{}, {"policy": POLICY}, {"key_precision": "u4", "value_precision": "u2"}])
def test_an_answer_is_the_same_alone_and_among_others(folder: Path, cache: dict[str, Any]) -> None:
    pipe = make_pipe(folder, **cache)
    prompts = [TEXT, "Nine boats.", TEXT[100:], TEXT + " Who sails it?"]
    together = pipe.generate(prompts, **ASK).texts
    assert together == [str(pipe.generate(one, **ASK)) for one in prompts]
    assert_nothing_left(pipe)


def test_a_step_reads_less_than_is_held(folder: Path) -> None:
    """What a decoding sequence has in the store is grouped, and few tiles of it are read."""
    pipe = make_pipe(folder)
    with pipe.compress_ids(np.arange(1000) % 250, [build("none")])[0] as context:
        cache = cache_of(pipe)
        assert context._snapshot is not None
        store_id = context._snapshot.store_id
        positions = cache.store.positions(store_id, 0, 0)
        assert sorted(positions) == list(range(1000))
        assert not np.array_equal(positions, np.arange(1000))
        q = np.random.default_rng(0).normal(size=(1, NUM_HEADS * HEAD_SIZE)).astype(np.float32)
        for tiles in cache.store.recalled(0, (store_id, 0, 1, 1000), q):
            assert 0 < len(tiles) <= 64 // 32 + 3


@pytest.mark.parametrize(("saved", "loaded"), [(64, 64), (64, None), (None, 64)])
def test_a_context_goes_into_files_and_back(
    folder: Path, tmp_path: Path, saved: float | None, loaded: float | None
) -> None:
    path, again = tmp_path / "text.kvc", tmp_path / "again.kvc"
    mine, theirs = make_pipe(folder, saved), make_pipe(folder, loaded)
    with mine.compress(TEXT, policy="none") as context:
        context.save(path)
        with Context.load(path, theirs) as other:
            other.save(again)
            assert again.read_bytes() == path.read_bytes()
            if saved == loaded:
                assert other.nbytes == context.nbytes
                asked = [p.generate("Where?", context=c, **ASK) for p, c in ((mine, context), (theirs, other))]
                assert asked[0] == asked[1]
            more = other.extend(TEXT[:500], policy="none")
            assert more.num_tokens > other.num_tokens
            theirs.generate("Who?", context=more, **ASK)
            del more
    assert_nothing_left(mine)
    assert_nothing_left(theirs)


def test_turns_of_a_chat_and_prefixes_go_on(folder: Path) -> None:
    pipe = make_pipe(folder, scheduler={"enable_prefix_caching": True})
    assert [len(pipe.generate(prompt(900), **ASK).tokens[0]) for _ in range(2)] == [40, 40]
    half = np.concatenate([np.array(prompt(900).data)[:, :600], np.array(prompt(200, 1).data)], axis=1)
    pipe.generate(ov.Tensor(half), **ASK)
    assert cache_of(pipe).prefixes.kept()
    pipe.start_chat()
    answers = [pipe.generate(text, **ASK) for text in (TEXT, "Which one?", TEXT[:300])]
    pipe.finish_chat()
    assert all(str(answer) for answer in answers)
    cache_of(pipe).clear_prefixes()
    assert_nothing_left(pipe)


def test_a_tight_store_is_never_passed(folder: Path) -> None:
    """What was promised to prompts is enough for them, whatever their tiles list."""
    store = cache_of(make_pipe(folder, 0.1)).store
    limit = store.bytes_for(1400)
    pipe = make_pipe(folder, 0.1, max_bytes=limit)
    tokens = [np.random.default_rng(i).integers(0, 250, 900 + 100 * i) for i in range(4)]
    for one in tokens:
        assert len(pipe.generate(ov.Tensor(one[None]), **ASK).tokens[0]) == 40
    assert cache_of(pipe).store.nbytes <= limit


@pytest.mark.parametrize("value", [64, 2048, 0.5, "64", "1/8", "0.25"])
def test_numbers_of_tokens_and_fractions(value: Any) -> None:
    found = CacheConfig(recall_tokens=value).recall_tokens
    assert found == parse_recall(value)
    assert isinstance(found, int) == (found >= 1)


@pytest.mark.parametrize("value", [0, 63, 1.0, 64.5, -0.5, True, "x", "1/0", "65.5", [64], float("nan")])
def test_a_wrong_recall_is_refused(value: Any) -> None:
    with pytest.raises(CrushError, match="recall_tokens must be an integer of at least 64 or a fraction below 1"):
        CacheConfig(recall_tokens=value)


def test_recall_needs_the_store() -> None:
    with pytest.raises(CrushError, match="recall_tokens must be left out with attention='paged'"):
        CacheConfig(recall_tokens=64, attention="paged")
