"""The scheduler and the block pool, without a model: nothing is lost, all get through."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from covering import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from ov_kvcrush import SchedulerConfig
from ov_kvcrush.core.request import FinishReason, Request, Sequence
from ov_kvcrush.core.sampling_params import SamplingParams
from ov_kvcrush.engine.scheduler import Scheduler, SchedulerOutput
from ov_kvcrush.kvcache.block_pool import BLOCK_SIZE, BlockPool, blocks_for
from ov_kvcrush.kvcache.paged import PagedKVCache
from ov_kvcrush.kvcache.prefix_cache import PrefixCache, common_length


class FakeCache:
    """What each slot of each block holds: the pair (sequence, position) that was written there last."""

    bytes_per_block = 1

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.slots = np.full((num_blocks, BLOCK_SIZE), -1, np.int64)
        self.num_copies = 0

    def copy_block(self, source: int, target: int) -> None:
        self.slots[target] = self.slots[source]
        self.num_copies += 1

    def bind(self, request: object) -> None:
        raise AssertionError("no model runs here")

    def run(self, plan: SchedulerOutput, blocks_of: Callable[[Sequence], np.ndarray]) -> None:
        """Write what a real step would, and check that every sequence reads its own history."""
        for row in plan.rows:
            s, blocks = row.sequence, blocks_of(row.sequence)
            positions = np.arange(s.num_cached, s.num_cached + row.num_tokens)
            self.slots[blocks[positions // BLOCK_SIZE], positions % BLOCK_SIZE] = s.ids[:][positions]
        for row in plan.rows:
            s, blocks = row.sequence, blocks_of(row.sequence)
            positions = np.arange(s.num_cached + row.num_tokens)
            read = self.slots[blocks[positions // BLOCK_SIZE], positions % BLOCK_SIZE]
            np.testing.assert_array_equal(read, s.ids[:][positions])


class Harness:
    """Scheduler, pool and fake memory; tokens are drawn by a counter, so that no two are alike."""

    def __init__(self, num_blocks: int, **config: object) -> None:
        self.cache = FakeCache(num_blocks)
        self.memory = PagedKVCache(self.cache, None)
        self.pool = self.memory.pool
        self.scheduler = Scheduler(SchedulerConfig(**config), self.memory)  # type: ignore[arg-type]
        self.next_token = 1_000_000
        self.finished: list[Sequence] = []

    def add(self, ids: np.ndarray, new_tokens: int, copies: int = 1, keep: bool = False) -> Request:
        params = SamplingParams(max_new_tokens=new_tokens, do_sample=copies > 1, num_return_sequences=copies)
        request = Request(len(self.finished), ids, params, keep_kv=keep)
        self.scheduler.add(request.sequences[0])
        return request

    def step(self) -> SchedulerOutput:
        plan = self.scheduler.schedule()
        self.cache.run(plan, lambda sequence: self.memory.kv_of(sequence).blocks.view)
        for sequence in plan.out_of_memory:
            self._end(sequence)
        for row in plan.rows:
            row.sequence.num_cached += row.num_tokens
            if row.samples:
                self._grow(row.sequence)
        return plan

    def _grow(self, sequence: Sequence) -> None:
        request = sequence.request
        members = [sequence]
        if not sequence.num_generated and len(request.sequences) < request.params.num_return_sequences:
            for index in range(1, request.params.num_return_sequences):
                request.sequences.append(self.scheduler.fork(sequence, index))
            members = list(request.sequences)
        for member in members:
            self.next_token += 1
            member.ids.append(self.next_token)
            if member.num_generated >= request.params.max_new_tokens:
                self._end(member)

    def _end(self, sequence: Sequence) -> None:
        sequence.finish_reason = FinishReason.LENGTH
        if sequence.request.keep_kv:
            self.memory.cache_prefix(sequence)
        self.scheduler.remove([sequence])
        self.finished.append(sequence)

    def run(self, max_steps: int = 5000) -> None:
        for _ in range(max_steps):
            if not len(self.scheduler):
                return
            plan = self.step()
            assert plan.rows or plan.out_of_memory, "a step without progress"
        raise AssertionError("the queue does not empty")


def prompt(n: int, start: int = 0) -> np.ndarray:
    return np.arange(start, start + n, dtype=np.int64)


@settings(max_examples=examples(150), deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 150), st.integers(1, 60), st.integers(1, 3), st.booleans(), st.integers(0, 2)),
        max_size=12,
    ),
    num_blocks=st.integers(6, 30),
    budget=st.integers(1, 200),
    max_num_seqs=st.integers(1, 8),
)
def test_every_request_ends_and_every_block_comes_back(
    requests: list[tuple[int, int, int, bool, int]], num_blocks: int, budget: int, max_num_seqs: int
) -> None:
    h = Harness(num_blocks, max_num_batched_tokens=budget, max_num_seqs=max_num_seqs)
    added = []
    for length, new, copies, keep, family in requests:
        if blocks_for(length + 1) <= num_blocks:  # the engine refuses longer ones
            added.append(h.add(prompt(length, family * 10_000), new, copies, keep))
            h.step()
    h.run()
    assert sum(len(r.sequences) for r in added) == len(h.finished)
    for request in added:
        for sequence in request.sequences:
            assert sequence.is_finished
            # Shorter only where the cache was full with this sequence alone.
            full = blocks_for(len(sequence.ids)) >= num_blocks - 1
            assert sequence.num_generated == request.params.max_new_tokens or full
    h.memory.clear_prefixes()
    assert h.pool.num_used == 0
    assert h.pool.num_free == num_blocks


def test_decode_rows_come_before_prompt_chunks() -> None:
    h = Harness(40, max_num_batched_tokens=64, max_step_ms=0)
    first = h.add(prompt(10), 20)
    h.step()
    second = h.add(prompt(200, 500), 5)
    plan = h.step()
    assert [(r.sequence.request, r.num_tokens, r.samples) for r in plan.rows] == [(first, 1, True), (second, 63, False)]
    assert plan.num_tokens == 64


def test_last_to_arrive_is_preempted_and_resumed() -> None:
    h = Harness(4, max_num_batched_tokens=256)
    first, second = h.add(prompt(60), 40), h.add(prompt(60, 500), 10)
    h.step()
    assert h.pool.num_free == 0
    while not h.scheduler.num_preemptions:
        h.step()
    assert first.sequences[0] in h.scheduler.running
    assert second.sequences[0] in h.scheduler.waiting
    h.run()
    assert (first.sequences[0].num_generated, second.sequences[0].num_generated) == (40, 10)


def test_alone_and_full_ends_instead_of_hanging() -> None:
    h = Harness(2, max_num_batched_tokens=64)
    request = h.add(prompt(60), 1000)
    h.run()
    assert len(request.sequences[0].ids) == 2 * BLOCK_SIZE + 1


def test_kept_prefix_is_shared_by_token_and_copied_on_write() -> None:
    h = Harness(20, max_num_batched_tokens=512)
    h.add(prompt(70), 1, keep=True)
    h.run()
    held = h.pool.num_used
    again = h.add(np.concatenate([prompt(50), prompt(30, 900)]), 3)
    plan = h.step()
    assert again.sequences[0].num_cached == 80
    assert [row.num_tokens for row in plan.rows] == [30]
    assert h.cache.num_copies == 1, "50 tokens end inside the second block"
    # The first block is shared; the copied one and one more are its own.
    assert h.pool.num_used == held + 2
    h.run()
    assert h.pool.num_used == held


def test_forks_share_the_prompt() -> None:
    h = Harness(20, max_num_batched_tokens=512)
    request = h.add(prompt(40), 5, copies=3)
    h.step()
    assert h.pool.num_used == 2
    h.step()
    assert h.pool.num_used == 4, "the full block stays shared, each sequence has its own last block"
    h.run()
    assert h.pool.num_used == 0
    assert len({tuple(s.generated.tolist()) for s in request.sequences}) == 3


def test_prefix_cache_keeps_the_longest_and_the_latest() -> None:
    pool = BlockPool(10)
    cache: PrefixCache[np.ndarray] = PrefixCache(pool.release, max_prefixes=2)
    for start, length in ((0, 32), (0, 64), (5000, 32), (7000, 32)):
        blocks = np.array([pool.allocate() for _ in range(blocks_for(length))], np.int32)
        cache.put(prompt(length, start), blocks)
    # The first is contained in the second; the second is the least recently used of three.
    assert len(cache) == 2
    assert pool.num_used == 2
    assert cache.match(prompt(64)) is None
    match = cache.match(prompt(32, 5000))
    assert match is not None
    assert match[1] == 31, "the last token's logits are needed"


@given(st.lists(st.integers(0, 2), max_size=8), st.lists(st.integers(0, 2), max_size=8))
def test_common_length(a: list[int], b: list[int]) -> None:
    n = common_length(np.array(a, np.int64), np.array(b, np.int64))
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


def test_step_inputs_describe_the_rows() -> None:
    h = Harness(20, max_num_batched_tokens=48, max_step_ms=0)
    h.add(prompt(34), 5)
    h.step()
    h.add(prompt(60, 500), 5)
    inputs = h.memory.step_inputs(h.scheduler.schedule().rows)
    assert inputs["past_lens"].tolist() == [34, 0]
    assert inputs["subsequence_begins"].tolist() == [0, 1, 48]
    assert inputs["block_indices_begins"].tolist() == [0, 2, 4]
    assert inputs["position_ids"].tolist() == [34, *range(47)]
    assert inputs["input_ids"][1:].tolist() == list(range(500, 547))
    assert inputs["sampled_rows"].tolist() == [0], "the prompt is not complete"
    assert int(inputs["max_context_len"]) == 47


def test_pool_refuses_to_free_twice() -> None:
    pool = BlockPool(2)
    block = np.array([pool.allocate()], np.int32)
    pool.release(block)
    with pytest.raises(AssertionError):
        pool.release(block)
