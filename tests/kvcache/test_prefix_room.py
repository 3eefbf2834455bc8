"""Cached prefixes give way where that makes room, and only there; what is promised stays promised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from eviction_runs import F32

from ov_kvcrush import CacheConfig, Context, ContinuousBatchingPipeline, LLMPipeline, OutOfMemory, SchedulerConfig
from ov_kvcrush.core.eviction import EvictionState
from ov_kvcrush.core.snapshot import KVSnapshot
from ov_kvcrush.kvcache.block_pool import BlockPool
from ov_kvcrush.kvcache.factory import make_kv_cache_manager
from ov_kvcrush.kvcache.prefix_cache import PrefixCache
from ov_kvcrush.kvcache.room import PrefixLimit, Room
from ov_kvcrush.model.load import load_model

TEXT = "In the harbour of Anstruther lie nine boats. " * 6


class Store:
    """Sequences as sets of tiles of one byte."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.tiles: dict[int, set[int]] = {}

    @property
    def nbytes(self) -> int:
        return self.nbytes_of_all(list(self.tiles))

    def nbytes_of_all(self, ids: list[int]) -> int:
        return len(set().union(*(self.tiles[i] for i in ids)))

    def nbytes_freed_by(self, ids: list[int]) -> int:
        return self.nbytes - self.nbytes_of_all([i for i in self.tiles if i not in ids])


class Promises:
    num_bytes = 0

    def promised(self) -> int:
        return self.num_bytes


def room_of(max_bytes: int, tiles: list[set[int]]) -> tuple[Any, Any, Room]:
    store, promises = Store(max_bytes), Promises()
    prefixes: PrefixCache[KVSnapshot] = PrefixCache(lambda kept: store.tiles.pop(kept.store_id) and None)
    for store_id, held in enumerate(tiles):
        store.tiles[store_id] = held
        owner: Any = None
        prefixes.put(np.array([store_id + 1]), KVSnapshot(owner, store_id, EvictionState(), None, 1))
    return store, promises, Room(store, promises, prefixes)  # type: ignore[arg-type]


def test_no_prefix_goes_for_a_promise_that_cannot_be_kept() -> None:
    store, promises, room = room_of(10, [{1, 2, 3}, {4, 5}, {6}])
    store.tiles[100] = {7, 8}
    promises.num_bytes = 9
    assert not room.make()
    assert len(room.prefixes) == 3
    promises.num_bytes = 7
    assert room.make()
    assert len(room.prefixes) == 1, "6 of 10 bytes are left when the first is gone, 8 when the second is"


def test_no_prefix_goes_for_an_attempt_that_cannot_succeed() -> None:
    _, _, room = room_of(10, [{1, 2, 3}, {4, 5}])
    assert not room.make_for(lambda: False, promised=4, needed=7)
    assert len(room.prefixes) == 2
    attempts = iter([False, True])
    assert room.make_for(lambda: next(attempts), promised=4, needed=6)
    assert len(room.prefixes) == 1


def test_shared_bytes_count_once() -> None:
    _, _, room = room_of(100, [{*range(10), 10 + i} for i in range(8)])
    room.shrink(18)
    assert len(room.prefixes) == 8
    room.shrink(12)
    assert len(room.prefixes) == 2


def test_the_latest_stay_whatever_they_hold() -> None:
    _, _, room = room_of(100, [{1}, {2}, set(range(10, 40))])
    room.shrink(5, fewest=1)
    assert [kept.store_id for kept in room.prefixes.kept()] == [2]
    room.shrink(5)
    assert not len(room.prefixes)


def test_only_a_store_of_a_given_size_is_filled_with_prefixes(tiny_ir: Callable[[str], Path]) -> None:
    """Elsewhere they hold a quarter of it, and the latest stays, for a chat's next turn."""
    config = CacheConfig(key_precision="f32", value_precision="f32", attention="crush")
    model = load_model(tiny_ir("llama"), "CPU", F32, "crush")
    for scheduler, cache, expected in (
        (SchedulerConfig(cache_size=1), config, None),
        (SchedulerConfig(num_kv_blocks=8), config, None),
        (SchedulerConfig(), replace(config, max_bytes=1 << 20), None),
        (SchedulerConfig(cache_size=1), replace(config, prefix_bytes=7), PrefixLimit(7)),
    ):
        manager: Any = make_kv_cache_manager(model, scheduler, cache)
        assert manager._prefix_limit == expected
    manager = make_kv_cache_manager(model, SchedulerConfig(), config)
    assert manager._prefix_limit == PrefixLimit(int(manager.store.max_bytes * 0.25), fewest=1)


def test_blocks_are_freed_by_their_last_owners() -> None:
    pool = BlockPool(4)
    blocks = np.array([pool.allocate() for _ in range(3)])
    pool.share(blocks[:2])
    assert pool.freed_by([]) == 0
    assert pool.freed_by([blocks[:2]]) == 0
    assert pool.freed_by([blocks]) == 1
    assert pool.freed_by([blocks[:2], blocks]) == 3


@pytest.fixture
def pipe(tiny_ir: Callable[[str], Path]) -> LLMPipeline:
    settings = SchedulerConfig(enable_prefix_caching=True)
    return LLMPipeline(tiny_ir("llama"), "CPU", F32, scheduler_config=settings, cache_config={"max_bytes": 250_000})


def test_a_context_is_loaded_where_prefixes_fill_the_store(pipe: LLMPipeline, tmp_path: Path) -> None:
    path = tmp_path / "text.kvc"
    with pipe.compress(TEXT, policy="none") as context:
        context.save(path)
        size = context.nbytes
    for i in range(6):
        pipe.generate(f"{i} " + TEXT, max_new_tokens=1)
    assert 250_000 - pipe.get_metrics().kv_cache_size_in_bytes < size
    with Context.load(path, pipe) as loaded:
        assert loaded.nbytes == size
        held = [loaded.fork()]
        with pytest.raises(OutOfMemory):
            held.extend(Context.load(path, pipe) for _ in range(10))


@pytest.fixture(scope="module")
def batches(tiny_ir: Callable[[str], Path]) -> ContinuousBatchingPipeline:
    scheduler = {"max_num_batched_tokens": 32, "enable_prefix_caching": True}
    return ContinuousBatchingPipeline(tiny_ir("llama"), scheduler, properties=F32, cache_config={"max_bytes": 350_000})


def ids(length: int, begin: int = 0) -> Any:
    return ov.Tensor(np.random.default_rng(begin).integers(0, 256, (1, length)))


def test_a_context_takes_nothing_of_what_a_prompt_was_promised(
    batches: ContinuousBatchingPipeline, tmp_path: Path
) -> None:
    """Loaded while that is read, it would have it end without an answer."""
    path = tmp_path / "text.kvc"
    with batches.compress(TEXT, policy="none") as context:
        context.save(path)
        size, length = context.nbytes, context.num_tokens
    store: Any = batches._backend.cache.store  # type: ignore[attr-defined]
    num_tokens = next(n for n in range(0, 4096, 32) if store.bytes_for(n) + size > store.max_bytes)
    assert num_tokens > length / 2
    handle = batches.add_request(1, ids(num_tokens), max_new_tokens=8, ignore_eos=True)
    batches.step()
    assert not handle.can_read()
    assert store.nbytes + size <= store.max_bytes
    with pytest.raises(OutOfMemory):
        Context.load(path, batches)
    assert handle.wait(60)
    assert (handle.error, len(handle.outputs()[0].generated_ids)) == (None, 8)
    batches._backend.clear_prefixes()
    Context.load(path, batches).close()


def test_a_prompt_that_waits_for_others_drops_no_prefix(batches: ContinuousBatchingPipeline) -> None:
    cache: Any = batches._backend.cache  # type: ignore[attr-defined]
    room = cache.capacity_tokens(None)
    batches.generate([ids(40, 1)], max_new_tokens=1)
    holder = batches.add_request(1, ids(room // 2, 2), max_new_tokens=room // 4, ignore_eos=True)
    while not holder.can_read():
        batches.step()
    assert len(cache.prefixes) == 1
    waiting = batches.add_request(2, ids(room * 3 // 4, 3), max_new_tokens=1)
    for _ in range(4):
        batches.step()
    assert len(cache.prefixes) == 1
    holder.cancel()
    assert waiting.wait(60)
    assert waiting.error is None
    batches._backend.clear_prefixes()
    assert batches.get_metrics().kv_cache_size_in_bytes == 0
