"""Memory of CrushAttention: prompts are read on staging blocks, then live in the compressed store."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as Items
from dataclasses import replace

import numpy as np
import openvino as ov

from ov_kvcrush.core.request import AttentionScores, Sequence
from ov_kvcrush.core.snapshot import KVSnapshot
from ov_kvcrush.engine.scheduler import ScheduledTokens
from ov_kvcrush.engine.takers import commit_for_each
from ov_kvcrush.errors import ContextFileError
from ov_kvcrush.kvcache import snapshot_arrays as held_arrays
from ov_kvcrush.kvcache.attention_plan import PREFILL, STAGED, STORED, PlanEntry, write_plan
from ov_kvcrush.kvcache.block_pool import BLOCK_SIZE, BlockPool, blocks_for
from ov_kvcrush.kvcache.block_tensors import BlockTensors
from ov_kvcrush.kvcache.eviction import CacheView, Choice, EvictionSpec, EvictionState, split_heads
from ov_kvcrush.kvcache.manager import KVCacheUsage
from ov_kvcrush.kvcache.paged import paged_inputs, row_inputs, with_dummy_rows
from ov_kvcrush.kvcache.prefix_cache import PrefixCache
from ov_kvcrush.kvcache.replay import ROWS, Reader, ReplayState, replay_blocks
from ov_kvcrush.model.graph.rewrite import CRUSH_PLAN, CRUSH_STORE, PAGED_ROWS, SAMPLED_ROWS
from ov_kvcrush.native import Store, StoreFull
from ov_kvcrush.pipelines.backend import SnapshotArrays
from ov_kvcrush.policies.base import Policy
from ov_kvcrush.policies.registry import name_of

_log = logging.getLogger(__name__)

_ENDLESS = 1 << 31  # tokens: a text whose cache does not grow can be as long as the model's context
_RESIDENT_BYTES = 16 << 20  # staging that stays in memory: giving a page back and touching it again takes 5 us


class CrushKVCache:
    """A staging pool of full-precision blocks, and the store.

    A fresh prompt gets staging blocks for all its tokens and attends to them, by the store's own kernel or through
    PagedAttention; when it is complete the store adopts it and the blocks are given back. Every other row attends
    through the store: decode rows, prompts that go on from kept KV, and prompts that are longer than the staging pool.
    Where a request has a policy, it chooses what a complete prompt leaves, and again whenever the cache has grown over
    its budget.
    chunk: rows of one step, at most. prefix_bytes: the most that kept prefixes hold; 0 = what is free. pool: owners of
    the staging blocks, where other memories have prompts on them too. pages_prompts: whether the model has
    PagedAttention, for prompts that the store has no kernel for.
    """

    def __init__(
        self,
        store: Store,
        heads: list[tuple[int, int]],
        staging: BlockTensors,
        max_prefixes: int | None,
        chunk: int,
        prefix_bytes: int = 0,
        pool: BlockPool | None = None,
        *,
        pages_prompts: bool,
    ) -> None:
        self.store = store
        self._prefix_bytes = prefix_bytes
        self._heads = heads  # of each layer: query heads, KV heads
        self.pool = pool or BlockPool(staging.num_blocks - 1)  # the last one is for the rows that are not of a prompt
        self.prefixes: PrefixCache[KVSnapshot] = PrefixCache(lambda kv: store.release(kv.stored), max_prefixes)
        self._view = CacheView(store, heads)
        self._chunk = chunk
        self.policy_seconds = 0.0
        self.staging = staging
        self._reading: set[Sequence] = set()  # prompts that have not taken all the bytes promised to them
        self._resident_blocks = _RESIDENT_BYTES // staging.bytes_per_block
        self._last_paged_rows = 0  # that PagedAttention was run with
        self._store_id = np.array([store.id], np.int32)
        staging.register(store)
        self._pages_prompts = pages_prompts
        self._bytes_per_block = store.bytes_for(BLOCK_SIZE * 1024) / 1024

    # -- how much fits -------------------------------------------------------------------------------------------------

    @property
    def can_evict(self) -> bool:
        """Token by token, for each KV head."""
        return True

    def capacity_tokens(self, eviction: EvictionSpec | None, num_evicted: int = 0) -> int:
        """Tokens of the longest text whose bytes are within the store's limit."""
        low, high = 0, _ENDLESS
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._bytes_for(middle, eviction, num_evicted) <= self.store.max_bytes
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def _replay_blocks(self, sequence: Sequence) -> int:
        """Blocks for a second reading of a prompt, 0 if it has none."""
        eviction, length = sequence.request.replayer, len(sequence.ids)
        replay = eviction.policy.inputs.replay if eviction else None
        if eviction is None or replay is None or not eviction.num_read_again(length):
            return 0
        return replay_blocks(replay, eviction.words, length)

    def _bytes_for(self, length: int, eviction: EvictionSpec | None, num_evicted: int = 0) -> int:
        """The most bytes that the store holds of one text of `length` tokens, which came without num_evicted."""
        most = eviction.peak_tokens(length, self._chunk, num_evicted) if eviction else length - num_evicted
        return self.store.bytes_for(max(most, 0))

    def refusal(self, num_tokens: int, eviction: EvictionSpec | None, num_evicted: int = 0) -> str | None:
        """Why a prompt can never be run; None if it can."""
        needed = self._bytes_for(num_tokens + 1, eviction, num_evicted)
        replay = eviction.policy.inputs.replay if eviction else None
        if eviction and replay and eviction.num_read_again(num_tokens):
            num_blocks = blocks_for(num_tokens) + replay_blocks(replay, eviction.words, num_tokens)
            if num_blocks > self.pool.num_blocks:
                return (
                    f"prompt must fit into the staging blocks to be read twice, as policy {name_of(eviction.policy)!r} "
                    f"wants: it takes {num_blocks * self.staging.bytes_per_block} bytes, "
                    f"got staging of {self.pool.num_blocks * self.staging.bytes_per_block}; raise staging_bytes"
                )
        if needed <= self.store.max_bytes:
            return None
        return (
            f"prompt must fit into the KV store of {self.store.max_bytes} bytes, got {num_tokens} tokens, "
            f"which take {needed} bytes; raise max_bytes or lower the precision"
        )

    @property
    def staged_tokens(self) -> int:
        """Tokens of all staging blocks."""
        return self.pool.num_blocks * BLOCK_SIZE

    @property
    def is_contended(self) -> bool:
        """Whether other memories have prompts on the staging blocks."""
        own = sum(len(s.blocks) + (len(s.replay.own_blocks) if s.replay else 0) for s in self._reading)
        return self.pool.num_used > own

    def _promised(self, without: Sequence | None = None) -> int:
        """Bytes that prompts being read will still take."""
        return sum(self._missing(s) for s in self._reading if s is not without)

    def _missing(self, sequence: Sequence) -> int:
        gone = sequence.kept.num_evicted
        held = 0 if sequence.blocks.ids.size else sequence.num_cached - gone
        most = self._bytes_for(len(sequence.ids), sequence.request.eviction, gone)
        return max(most - self.store.bytes_for(held), 0)

    # -- the life of a sequence ----------------------------------------------------------------------------------------

    def allocate(self, sequence: Sequence) -> bool:
        """Promise bytes for all tokens, and staging blocks where the prompt is fresh and fits the pool."""
        num_blocks = blocks_for(len(sequence.ids))
        reused = self._reuse(sequence)
        if sequence.request.context and not reused:
            return False
        staged = not reused and num_blocks <= self.pool.num_blocks
        num_replay_blocks = self._replay_blocks(sequence) if staged else 0
        if staged and num_blocks + num_replay_blocks > self.pool.num_free:
            return False
        if not reused:
            sequence.stored = self.store.create(sequence.request.captured_rows)
        needed = self._missing(sequence)
        while self.store.nbytes + self._promised() + needed > self.store.max_bytes:
            if not self.prefixes.drop_oldest():
                self.release(sequence)
                sequence.num_cached = 0
                return False
        self._reading.add(sequence)
        if staged:
            assert sequence.stored is not None
            for _ in range(num_blocks):
                sequence.blocks.append(self.pool.allocate())
            self.store.attach_prefill(sequence.stored, sequence.blocks.ids, len(sequence.ids))
            if num_replay_blocks:
                own = np.array([self.pool.allocate() for _ in range(num_replay_blocks)], np.int32)
                sequence.replay = ReplayState(sequence, own)
        return True

    def _reuse(self, sequence: Sequence) -> bool:
        """Begin with the request's context, or with kept KV if that pays, else with nothing."""
        sequence.num_cached = 0
        context = sequence.request.context
        if context is not None:
            return self._begin_with(sequence, context, context.num_tokens)
        found = self.prefixes.match(sequence.ids[:], lambda kv, length: kv.serves(sequence, length))
        if found is None:
            return False
        return self._begin_with(sequence, *found)

    def _begin_with(self, sequence: Sequence, kv: KVSnapshot, length: int) -> bool:
        try:
            sequence.stored = self.store.fork(kv.stored, None if length == kv.num_tokens else length)
        except StoreFull:
            return False
        self.store.set_capture(sequence.stored, sequence.request.captured_rows)
        sequence.num_cached = length
        sequence.kept = kv.kept if length == kv.num_tokens else EvictionState()
        return True

    def append_slots(self, sequence: Sequence, num_tokens: int) -> bool:
        """See that the store has slots for the next tokens; a staged prompt has its blocks since it was admitted."""
        if len(sequence.blocks) or sequence.free_slots >= num_tokens:
            return True
        assert sequence.stored is not None, "append_slots() for a sequence that was not admitted"
        promised = self._promised(without=sequence)
        while not self.store.reserve(sequence.stored, num_tokens, promised):
            if not self.prefixes.drop_oldest():
                return False
        sequence.free_slots = self.store.free_slots(sequence.stored)
        return True

    def fork(self, parent: Sequence, twin: Sequence) -> None:
        """Share all tiles; who appends to a shared one copies it first."""
        assert parent.stored is not None, "fork() of a sequence that was not admitted"
        twin.stored = self.store.fork(parent.stored)
        twin.kept = parent.kept
        parent.free_slots = twin.free_slots = 0

    def release(self, sequence: Sequence) -> None:
        """Give back tiles, staging blocks and what was promised."""
        self._reading.discard(sequence)
        self._unstage(sequence)
        if sequence.stored is not None:
            self.store.release(sequence.stored)
        sequence.stored = None
        sequence.free_slots = 0
        sequence.kept = EvictionState()

    def _unstage(self, sequence: Sequence) -> None:
        if len(sequence.blocks):
            blocks = sequence.blocks.ids
            if sequence.replay:
                self._release_reader(sequence.replay)
                blocks = np.concatenate([blocks, sequence.replay.own_blocks])
                sequence.replay = None
            blocks = np.sort(blocks)
            self.pool.release(blocks[::-1])  # the lowest are handed out first
            self.staging.discard(blocks[blocks >= self._resident_blocks])
            sequence.blocks.clear()

    def keep(self, sequence: Sequence) -> None:
        """Hold the stored KV. A prompt that ends while it is staged leaves nothing."""
        kv = self._share(sequence)
        if kv is not None:
            self.prefixes.put(sequence.ids[: sequence.num_cached], kv)
            if self._prefix_bytes:
                self.prefixes.shrink(self._prefix_bytes, self.bytes_held)

    def hold(self, sequence: Sequence) -> KVSnapshot | None:
        """Its stored KV for the caller, without captured queries: what goes on from it is the same after a file."""
        kv = self._share(sequence)
        if kv is None:
            return None
        self.store.set_capture(kv.stored, 0)
        return replace(kv, captured_rows=0)

    def _share(self, sequence: Sequence) -> KVSnapshot | None:
        """Its stored KV for somebody else. A prompt that ends while it is staged leaves nothing."""
        if sequence.stored is None or len(sequence.blocks) or not sequence.num_cached:
            return None
        request = sequence.request
        policy = request.eviction.policy if request.eviction else None
        twin = self.store.fork(sequence.stored)
        kv = KVSnapshot(twin, sequence.kept, policy, sequence.num_cached, request.captured_rows)
        context = request.context
        return replace(kv, base=context.base, base_kept=context.base_kept) if context else kv

    def drop_held(self, kv: KVSnapshot) -> None:
        """Give back what `hold` gave."""
        self.store.release(kv.stored)

    def share_held(self, kv: KVSnapshot) -> KVSnapshot:
        """The same tiles for one more holder."""
        return replace(kv, stored=self.store.fork(kv.stored))

    def bytes_held(self, kv: KVSnapshot) -> int:
        """Bytes of what `hold` gave, shared ones in full."""
        return self.store.nbytes_of(kv.stored)

    def dump_held(self, kv: KVSnapshot) -> SnapshotArrays:
        """What `hold` gave, as arrays."""
        return held_arrays.dump(self.store, kv)

    def load_held(self, held: SnapshotArrays, policy: Policy | None, base: int, base_kept: int) -> KVSnapshot:
        """The same from arrays, checked. Raises ContextFileError, and OutOfMemory where there is no room."""
        kv = held_arrays.load(self.store, [heads for _, heads in self._heads], held, policy)
        if not (0 <= base <= kv.num_tokens and 0 <= base_kept <= base):
            self.store.release(kv.stored)
            raise ContextFileError(f"base must be in 0..{kv.num_tokens}, got {base} with {base_kept} kept")
        return replace(kv, base=base, base_kept=base_kept)

    def drop_kept(self) -> None:
        """Give back the KV of ended sequences."""
        self.prefixes.clear()

    # -- one step ------------------------------------------------------------------------------------------------------

    def bind(self, request: ov.InferRequest) -> None:
        """Make the staging blocks the cache inputs of `request`, if it has some."""
        if self._pages_prompts:
            self.staging.bind(request)

    def step_inputs(self, rows: Items[ScheduledTokens]) -> dict[str, np.ndarray]:
        """Rows of staged prompts first; the others follow."""
        staged = [row for row in rows if len(row.sequence.blocks)]
        order = staged + [row for row in rows if not len(row.sequence.blocks)]
        num_staged_rows = sum(row.num_tokens for row in staged)
        staged_kind = STAGED if self._pages_prompts else PREFILL
        ends: dict[Sequence, int] = {}
        entries = []
        begin = 0
        for row in order:
            s = row.sequence
            kind = staged_kind if begin < num_staged_rows else STORED
            assert s.stored is not None, "a planned row of a sequence that was not admitted"
            reduction = s.reduction_of(row.samples)
            if isinstance(s, Reader):  # scores are over what is there when this step's rows are
                self.store.attach_prefill(s.stored, s.blocks.ids, s.num_cached + row.num_tokens)
            entries.append(PlanEntry(s.stored, begin, row.num_tokens, s.num_cached, kind, reduction))
            begin += row.num_tokens
            ends[s] = begin
        return {
            **(self._paged_inputs(staged, num_staged_rows, begin) if self._pages_prompts else {}),
            **row_inputs(order),
            SAMPLED_ROWS: np.array([ends[row.sequence] - 1 for row in rows if row.samples], np.int64),
            CRUSH_STORE: self._store_id,
            CRUSH_PLAN: write_plan(begin, num_staged_rows if self._pages_prompts else 0, entries),
        }

    def _paged_inputs(
        self, staged: Items[ScheduledTokens], num_staged_rows: int, num_rows: int
    ) -> dict[str, np.ndarray]:
        """What PagedAttention gets: all rows of a step with prompts, else none."""
        # Where it is skipped its last output stays, and is converted again in every step: so it also gets the rows of
        # the first step after many rows, which leaves a small one.
        is_idle = not staged and 0 < self._last_paged_rows <= num_rows
        paged_rows = 0 if is_idle else num_rows
        self._last_paged_rows = paged_rows or self._last_paged_rows
        paged = {}  # what it was given last may stay where it is skipped
        if paged_rows:
            paged = with_dummy_rows(paged_inputs(staged), num_rows - num_staged_rows, self.pool.num_blocks)
        return {**paged, PAGED_ROWS: np.array([paged_rows], np.int64)}

    def commit(self, rows: Items[ScheduledTokens]) -> list[Sequence]:
        """Adopt prompts that are complete; move what left a recent window into tiles of the target precision."""
        homeless = []
        for row in rows:
            s = row.sequence
            assert s.stored is not None, "commit() of a sequence that was not admitted"
            s = s.reads_for or s
            if len(s.blocks):
                if not s.num_pending and not self._is_replaying(s) and not self._adopt(s):
                    homeless.append(s)
                continue
            assert s.stored is not None
            s.free_slots -= row.num_tokens
            if row.num_tokens > 1 or not s.free_slots:
                self.store.quantize_aged(s.stored)
            is_read = not s.num_pending and s in self._reading
            self._evict(s, is_read=is_read)
            if is_read:
                self._reading.discard(s)
        return homeless

    def _is_replaying(self, sequence: Sequence) -> bool:
        """Whether a complete prompt is to be read again, or not yet to the end; sees to its next reader."""
        replay = sequence.replay
        if replay is None:
            return False
        if replay.reader is not None and replay.reader.num_pending:
            return True
        self._release_reader(replay)
        if replay.advance():
            assert replay.reader is not None
            replay.reader.stored = self.store.create(min(ROWS, self._chunk))
        return replay.reader is not None

    def _release_reader(self, replay: ReplayState) -> None:
        if replay.reader is not None and replay.reader.stored is not None:
            self.store.release(replay.reader.stored)
            replay.reader.stored = None

    def _adopt(self, sequence: Sequence) -> bool:
        assert sequence.stored is not None, "a staged sequence without a place in the store"
        self._reading.discard(sequence)
        start = time.perf_counter()
        try:
            if sequence.request.takers:
                commit_for_each(sequence, lambda eviction: self._choose(sequence, eviction, is_read=True))
                self.store.release(sequence.stored)  # nothing is left of the reading itself
                sequence.stored = None
                self.policy_seconds += time.perf_counter() - start
            else:
                choice = self._choose(sequence, sequence.request.eviction, is_read=True)
                self._fill(sequence.stored, choice)
                if choice:
                    sequence.kept = choice.kept
                    self.policy_seconds += time.perf_counter() - start
        except StoreFull as error:
            _log.warning("request %d ends: %s", sequence.request.request_id, error)
            return False
        self._unstage(sequence)
        return True

    def take(self, staged: Sequence, policy: Policy | None, choice: Choice | None) -> KVSnapshot:
        """What is chosen (None = all) of a prompt on the staging blocks, this memory's or another's on them.

        It may take what kept prefixes have, but nothing that prompts were promised here. Raises StoreFull.
        """
        stored = self.store.create(0)
        try:
            self.store.attach_prefill(stored, staged.blocks.ids, staged.num_cached)
            self._fill(stored, choice)
        except BaseException:
            self.store.release(stored)
            raise
        return KVSnapshot(stored, choice.kept if choice else EvictionState(), policy, staged.num_cached, 0)

    def _fill(self, stored: int, choice: Choice | None) -> None:
        while True:
            try:
                if choice:
                    self.store.commit_prefill(stored, choice.offsets, choice.indices, keep_free=self._promised())
                else:
                    self.store.commit_prefill(stored, keep_free=self._promised())
                return
            except StoreFull:
                if not self.prefixes.drop_oldest():
                    raise

    def _evict(self, sequence: Sequence, *, is_read: bool) -> None:
        """Let the policy choose again if the stored cache has grown over its budget."""
        start = time.perf_counter()
        choice = self._choose(sequence, sequence.request.eviction, is_read=is_read)
        if choice is None:
            return
        assert sequence.stored is not None
        try:
            self.store.compact(sequence.stored, choice.offsets, choice.indices)
        except StoreFull as error:  # tiles are written anew before the old ones go; the next step tries again
            _log.warning("request %d keeps its cache: %s", sequence.request.request_id, error)
            return
        sequence.kept = choice.kept
        sequence.free_slots = self.store.free_slots(sequence.stored)
        self.policy_seconds += time.perf_counter() - start

    def _choose(self, sequence: Sequence, eviction: EvictionSpec | None, *, is_read: bool) -> Choice | None:
        """What a policy wants to stay of the sequence; None if there is nothing to choose now."""
        is_staged = len(sequence.blocks) > 0
        length, kept = sequence.num_cached, sequence.kept
        if eviction is None or not eviction.wants(length, length - kept.num_evicted, is_read=is_read):
            return None
        if eviction.policy.inputs.replay and sequence.replay is None:  # it goes on from kept KV: nothing is staged
            return None
        assert sequence.stored is not None
        blocks = sequence.blocks.ids
        return self._view.choose(
            eviction,
            sequence.stored,
            length,
            kept,
            (lambda layer: self.staging.read(layer, blocks, length)) if is_staged else None,
            sequence.replay.scores if sequence.replay else None,
        )

    def split_scores(self, rows: Items[ScheduledTokens], outputs: list[np.ndarray]) -> dict[Sequence, AttentionScores]:
        """The scores of each sequence that asked in this step, from one flat output per layer, before `commit`."""
        asking = [row.sequence for row in rows if row.sequence.reduction_of(row.samples)]
        asking.sort(key=lambda s: not len(s.blocks))  # staged first, as in the plan
        scores: dict[Sequence, AttentionScores] = {s: [] for s in asking}
        for layer, output in enumerate(outputs):
            num_heads, num_kv_heads = self._heads[layer]
            lengths = [self._num_tokens(s, layer, head) for s in asking for head in range(num_kv_heads)]
            heads = [x.copy() for x in split_heads(output, num_heads // num_kv_heads, lengths)]
            for index, s in enumerate(asking):
                scores[s].append(heads[index * num_kv_heads : (index + 1) * num_kv_heads])
        return scores

    def _num_tokens(self, sequence: Sequence, layer: int, head: int) -> int:
        assert sequence.stored is not None, "scores of a sequence that was not admitted"
        staged = len(sequence.blocks) > 0
        return sequence.num_cached if staged else self.store.num_tokens(sequence.stored, layer, head)

    # -- figures -------------------------------------------------------------------------------------------------------

    def bytes_of(self, sequence: Sequence) -> int:
        """Bytes of the tiles that a sequence can reach."""
        return 0 if sequence.stored is None else self.store.nbytes_of(sequence.stored)

    def use(self) -> KVCacheUsage:
        """The store's bytes; blocks are those that as many bytes of long prompts would take."""
        used = self.store.nbytes
        staging = self.pool.num_used * self.staging.bytes_per_block
        blocks = -int(-used // self._bytes_per_block) + self.pool.num_used
        return KVCacheUsage(used, self.store.max_bytes, blocks, staging)
