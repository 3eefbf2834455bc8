"""The compressed KV cache: prompts are prefilled on staging blocks, then live in the store."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import partial

import numpy as np
import openvino as ov

from ov_kvcrush import native
from ov_kvcrush.core.eviction import Choice, EvictionSpec, EvictionState
from ov_kvcrush.core.request import Sequence
from ov_kvcrush.core.snapshot import KVSnapshot
from ov_kvcrush.core.step import ScheduledTokens
from ov_kvcrush.kvcache.admission import Admission
from ov_kvcrush.kvcache.attention_plan import PREFILL, STAGED, STORED, PlanEntry, write_plan
from ov_kvcrush.kvcache.block_pool import BLOCK_SIZE, blocks_for
from ov_kvcrush.kvcache.drafted import max_draft, settle
from ov_kvcrush.kvcache.eviction import CacheView
from ov_kvcrush.kvcache.manager import KVCacheUsage
from ov_kvcrush.kvcache.model_inputs import PrefillInputs, row_inputs, sampled_rows
from ov_kvcrush.kvcache.planning import precisions_of, tiers_of
from ov_kvcrush.kvcache.prefix_cache import PrefixCache, least_common, serves, serves_all_of
from ov_kvcrush.kvcache.replay import ROWS, Reader, ReplayState, hand_out_scores
from ov_kvcrush.kvcache.room import PrefixLimit, Room
from ov_kvcrush.kvcache.sequence_kv import SequenceKV
from ov_kvcrush.kvcache.snapshots import SnapshotStore
from ov_kvcrush.kvcache.staging import Staging, commit_for_each, commit_prefill
from ov_kvcrush.model.graph.rewrite import CRUSH_PLAN, CRUSH_STORE, SAMPLED_ROWS

_log = logging.getLogger(__name__)


class CrushKVCache:
    """Staging blocks of full precision, and the store.

    A fresh prompt gets staging blocks for all its tokens and attends to them, by the store's own kernel or through
    PagedAttention; when it is complete its KV is committed to the store and the blocks are given back. Every other row
    attends through the store: decode rows, prompts that continue a prefix or a context, and prompts that are longer
    than the staging pool. Where a request has a policy, it chooses what a complete prompt leaves, and again whenever
    the cache has grown over its budget.

    heads: (H, K) of each layer. max_prefixes: cached prefixes, None = no limit. chunk: rows of one step, at most.
    prefix_limit: what cached prefixes may hold; None = what is free. pages_prompts: whether the model has
    PagedAttention, for prompts that the store has no kernel for. draft_rows: of one sequence in a step, where some are
    guessed, at most.
    """

    def __init__(
        self,
        store: native.Store,
        heads: list[tuple[int, int]],
        staging: Staging,
        max_prefixes: int | None,
        chunk: int,
        prefix_limit: PrefixLimit | None = None,
        *,
        pages_prompts: bool,
        draft_rows: int = BLOCK_SIZE,
    ) -> None:
        self.store = store
        self.staging = staging
        self.policy_seconds = 0.0
        # What is made of these has no reference to this object: the store goes with it, not with the garbage collector.
        num_heads = sum(num_kv_heads for _, num_kv_heads in heads)
        blocks = staging.pool.num_blocks, staging.tensors.bytes_per_block
        self._admission = Admission(store, num_heads, *blocks, chunk)
        self.prefixes: PrefixCache[KVSnapshot] = PrefixCache(
            lambda kept: store.release(kept.store_id), max_prefixes, serves_all_of
        )
        self._room = Room(store, self._admission, self.prefixes)
        self._fill = partial(commit_prefill, self._room)
        self.snapshots = SnapshotStore(self._room, [num_kv_heads for _, num_kv_heads in heads], self._fill)
        self._prefix_limit = prefix_limit
        self._heads = heads
        self._chunk = chunk
        self._draft_rows = draft_rows
        self._pages_prompts = pages_prompts
        self._view = CacheView(store, heads)
        self._kv: dict[Sequence, SequenceKV] = {}
        self._prefill_inputs = PrefillInputs(staging.pool.num_blocks)
        self._store_id = np.array([store.id], np.int32)
        self._bytes_per_block = store.bytes_for(BLOCK_SIZE * 1024) / 1024
        staging.tensors.register(store)

    @property
    def staged_tokens(self) -> int:
        """Tokens of all staging blocks."""
        return self.staging.num_tokens

    @property
    def is_contended(self) -> bool:
        """Whether other managers have prompts on the staging blocks."""
        return self.staging.is_contended(self._admission.prefilling.values())

    def capacity_tokens(self, eviction: EvictionSpec | None, num_evicted: int = 0) -> int:
        """Tokens of the longest text whose bytes are within the store's limit."""
        return self._admission.capacity_tokens(eviction, num_evicted)

    def refusal(self, num_tokens: int, eviction: EvictionSpec | None, num_evicted: int = 0) -> str | None:
        """Why a prompt can never run; None if it can."""
        return self._admission.refusal(num_tokens, eviction, num_evicted)

    # -- the life of a sequence ----------------------------------------------------------------------------------------

    def allocate(self, sequence: Sequence) -> bool:
        """Promise bytes for all tokens, and give staging blocks where the prompt is fresh and fits the pool."""
        kv = self._reuse(sequence)
        if sequence.request.context and not kv:
            return False
        staged = not kv and blocks_for(len(sequence.ids)) <= self.staging.pool.num_blocks
        num_replay_blocks = self._admission.replay_blocks_of(sequence) if staged else 0
        if staged and not self.staging.has_room_for(sequence, num_replay_blocks):
            return False
        if not kv:
            plan = sequence.request.plan
            precisions = precisions_of(plan) if plan else None
            kv = SequenceKV(store_id=self.store.create(sequence.request.captured_rows, precisions))
        self._kv[sequence] = kv
        self._admission.prefilling[sequence] = kv
        if not self._room.make():
            self.free(sequence)
            sequence.num_cached = 0
            return False
        if staged:
            self.staging.stage(sequence, kv)
            self.store.attach_prefill(kv.store_id, kv.blocks.view, len(sequence.ids))
            if num_replay_blocks:
                kv.replay = ReplayState(sequence, kv.blocks.view, self.staging.allocate(num_replay_blocks))
        return True

    def _reuse(self, sequence: Sequence) -> SequenceKV | None:
        """Start from the request's context, or from a cached prefix if that pays; None = from nothing."""
        sequence.num_cached = 0
        context = sequence.request.context
        if context is not None:
            return self._start_from(sequence, context, context.num_tokens)
        least, salt = least_common(sequence), sequence.request.cache_salt
        found = self.prefixes.match(sequence.ids[:], lambda kept, n: serves(kept, sequence, n), least, salt)
        return self._start_from(sequence, *found) if found else None

    def _start_from(self, sequence: Sequence, snapshot: KVSnapshot, length: int) -> SequenceKV | None:
        is_whole = length == snapshot.num_tokens
        try:
            store_id = self.store.fork(snapshot.store_id, None if is_whole else length)
        except native.StoreFull:
            return None
        self.store.set_capture(store_id, sequence.request.captured_rows)
        if sequence.request.plan:
            self.store.set_precisions(store_id, precisions_of(sequence.request.plan))
        sequence.num_cached = length
        return SequenceKV(store_id=store_id, state=snapshot.state if is_whole else EvictionState())

    def append_slots(self, sequence: Sequence, num_tokens: int) -> bool:
        """Add slots to the store; a staged prompt has its blocks since it was allocated."""
        kv = self._kv[sequence]
        if kv.is_staged or kv.free_slots >= num_tokens:
            return True
        promised = self._admission.promised(without=sequence)
        if not self._room.make_for(lambda: self.store.reserve(kv.store_id, num_tokens, promised), promised):
            return False
        kv.free_slots = self.store.free_slots(kv.store_id)
        return True

    def fork(self, parent: Sequence, twin: Sequence) -> None:
        """Share all tiles; whoever appends to a shared one copies it first."""
        kv = self._kv[parent]
        self._kv[twin] = SequenceKV(store_id=self.store.fork(kv.store_id), state=kv.state)
        kv.free_slots = 0

    def free(self, sequence: Sequence) -> None:
        """Give back tiles, staging blocks and what was promised."""
        self._admission.prefilling.pop(sequence, None)
        kv = self._kv.pop(sequence, None)
        if kv is not None:
            self._unstage(kv)
            self.store.release(kv.store_id)

    def _unstage(self, kv: SequenceKV) -> None:
        if kv.replay:
            self._free_reader(kv.replay)
        self.staging.release(kv)

    def cache_prefix(self, sequence: Sequence) -> None:
        """Keep the stored KV. A prompt that ends while it is staged leaves nothing."""
        snapshot = self._share(sequence)
        if snapshot is not None:
            self.prefixes.put(sequence.ids[: sequence.num_cached], snapshot, sequence.request.cache_salt)
            if self._prefix_limit:
                self._room.shrink(self._prefix_limit.max_bytes, self._prefix_limit.fewest)

    def clear_prefixes(self) -> None:
        """Give back the KV of ended sequences."""
        self.prefixes.clear()

    def snapshot(self, sequence: Sequence) -> KVSnapshot | None:
        """The stored KV without captured queries: what continues it is the same after a file."""
        snapshot = self._share(sequence)
        if snapshot is None:
            return None
        self.store.set_capture(snapshot.store_id, 0)
        return replace(snapshot, captured_rows=0)

    def _share(self, sequence: Sequence) -> KVSnapshot | None:
        kv = self._kv.get(sequence)
        if kv is None or kv.is_staged or not sequence.num_cached:
            return None
        request = sequence.request
        policy = request.eviction.policy if request.eviction else None
        shared = self.store.fork(kv.store_id)
        made = self.snapshots.make(shared, kv.state, policy, sequence.num_cached, request.captured_rows)
        made = replace(made, adapters=request.adapters)
        context = request.context
        return replace(made, base=context.base, base_kept=context.base_kept) if context else made

    # -- what others read ----------------------------------------------------------------------------------------------

    def kv_of(self, sequence: Sequence) -> SequenceKV:
        """What is known of an allocated sequence."""
        return self._kv[sequence]

    def eviction_state(self, sequence: Sequence) -> EvictionState:
        """What policies left of a sequence; nothing chosen where it is not allocated."""
        return kv.state if (kv := self._kv.get(sequence)) else EvictionState()

    def replay(self, sequence: Sequence) -> ReplayState | None:
        """The second reading of its prompt, from its allocation to its commit."""
        return kv.replay if (kv := self._kv.get(sequence)) else None

    def bytes_of(self, sequence: Sequence) -> int:
        """Bytes of the tiles that a sequence can reach."""
        return self.store.nbytes_of(kv.store_id) if (kv := self._kv.get(sequence)) else 0

    def usage(self) -> KVCacheUsage:
        """The store's bytes; blocks are those that as many bytes of long prompts would take."""
        used = self.store.nbytes
        blocks = -int(-used // self._bytes_per_block) + self.staging.pool.num_used
        return KVCacheUsage(used, self.store.max_bytes, blocks, self.staging.used_bytes)

    # -- one step ------------------------------------------------------------------------------------------------------

    def bind(self, request: ov.InferRequest) -> None:
        """Make the staging blocks the cache inputs of `request`, if it has some."""
        if self._pages_prompts:
            self.staging.tensors.bind(request)

    def step_inputs(self, rows: Items[ScheduledTokens]) -> dict[str, np.ndarray]:
        """Rows of staged prompts first; the others follow."""
        order = sorted(rows, key=lambda row: not self._kv[row.sequence].is_staged)
        staged = [row for row in order if self._kv[row.sequence].is_staged]
        num_staged_rows = sum(row.num_tokens for row in staged)
        staged_kind = STAGED if self._pages_prompts else PREFILL
        entries = []
        begin = 0
        for row in order:
            s, kv = row.sequence, self._kv[row.sequence]
            if isinstance(s, Reader):  # scores are over what is there when this step's rows are
                self.store.attach_prefill(kv.store_id, kv.blocks.view, s.num_cached + row.num_tokens)
            kind = staged_kind if kv.is_staged else STORED
            entries.append(PlanEntry(kv.store_id, begin, row.num_tokens, s.num_cached, kind, s.score_reduction))
            begin += row.num_tokens
        tables = [self._kv[row.sequence].blocks.view for row in staged]
        return {
            **(self._prefill_inputs(staged, tables, num_staged_rows, begin) if self._pages_prompts else {}),
            **row_inputs(order),
            SAMPLED_ROWS: sampled_rows(rows, order),
            CRUSH_STORE: self._store_id,
            CRUSH_PLAN: write_plan(begin, num_staged_rows if self._pages_prompts else 0, entries),
        }

    def commit(
        self, rows: Items[ScheduledTokens], scores: Callable[[], list[np.ndarray]]
    ) -> list[tuple[Sequence, Exception | None]]:
        """Commit prompts that are complete to the store; quantise what left a recent window."""
        self.take_scores(rows, scores)
        failed: list[tuple[Sequence, Exception | None]] = []
        for row in rows:
            s = row.sequence.replays or row.sequence
            if row.draft:  # which of its rows stay, `settle` is told
                continue
            try:
                if not self._commit_row(s, row.num_tokens):
                    failed.append((s, None))
            except Exception as error:  # of its policy: the others' rows are not concerned
                failed.append((s, error))
        return failed

    def _commit_row(self, s: Sequence, num_tokens: int) -> bool:
        """False where the store has no room."""
        kv = self._kv[s]
        if kv.is_staged:
            return bool(s.num_pending) or self.replays_on(kv) or self._commit_prefill(s, kv)
        kv.free_slots -= num_tokens
        if num_tokens > 1 or not kv.free_slots:
            self.store.quantize_aged(kv.store_id)
        is_read = not s.num_pending and s in self._admission.prefilling
        self._evict(s, kv, is_read=is_read)
        if is_read:
            del self._admission.prefilling[s]
        return True

    def max_draft(self, sequence: Sequence, most: int) -> int:
        """None where a prompt is not complete; up to the next tile that settles, or the next choice of a policy."""
        kv, is_read = self._kv[sequence], sequence not in self._admission.prefilling
        return max_draft(sequence, kv.state, self._draft_rows, most) if is_read and not kv.is_staged else 0

    def settle(self, sequence: Sequence, num_run: int, num_kept: int) -> None:
        """Take back tokens that were guessed wrong; quantise, and evict, as after a step of one row."""
        settle(self.store, self._kv[sequence], sequence.num_cached, num_run - num_kept)
        self._evict(sequence, self._kv[sequence], is_read=False)

    def take_scores(self, rows: Items[ScheduledTokens], scores: Callable[[], list[np.ndarray]]) -> None:
        """Hand each reader the attention scores of its rows in the step that was just run."""
        hand_out_scores([s for row in rows if isinstance(s := row.sequence, Reader)], self._heads, scores)

    def replays_on(self, kv: SequenceKV) -> bool:
        """Whether a complete prompt is still to be read again; makes its next reader."""
        replay = kv.replay
        if replay is None:
            return False
        if replay.reader is not None and replay.reader.num_pending:
            return True
        self._free_reader(replay)
        if not replay.advance():
            return False
        reader = replay.reader
        assert reader is not None
        own = SequenceKV(store_id=self.store.create(min(ROWS, self._chunk)))
        own.blocks.extend(reader.blocks)
        self._kv[reader] = own
        return True

    def _free_reader(self, replay: ReplayState) -> None:
        own = self._kv.pop(replay.reader, None) if replay.reader else None
        if own is not None:
            self.store.release(own.store_id)

    def _commit_prefill(self, sequence: Sequence, kv: SequenceKV) -> bool:
        """Move what stays of a staged prompt to the store. False where that has no room."""
        del self._admission.prefilling[sequence]
        start = time.perf_counter()
        try:
            if sequence.request.fan_out or sequence.request.returns_staged:
                commit_for_each(sequence, kv.blocks.view, lambda spec: self._choose(sequence, kv, spec, is_read=True))
                self.staging.hold_if_asked(sequence, kv)
                self._unstage(kv)
                self.free(sequence)  # nothing is left of the request itself
                self.policy_seconds += time.perf_counter() - start
                return True
            choice = self._choose(sequence, kv, sequence.request.eviction, is_read=True)
            self._fill(kv.store_id, choice)
        except native.StoreFull as error:
            _log.warning("request %d ends: %s", sequence.request.request_id, error)
            return False
        if choice:
            kv.state = choice.state
            self.policy_seconds += time.perf_counter() - start
        self._unstage(kv)
        return True

    def _evict(self, sequence: Sequence, kv: SequenceKV, *, is_read: bool) -> None:
        """Let the policy choose again if the stored cache has grown over its budget."""
        start = time.perf_counter()
        choice = self._choose(sequence, kv, sequence.request.eviction, is_read=is_read)
        if choice is None:
            return
        try:
            self.store.compact(kv.store_id, choice.offsets, choice.indices, **tiers_of(choice))
        except native.StoreFull as error:  # tiles are written anew before the old ones go; the next step tries again
            _log.warning("request %d keeps its cache: %s", sequence.request.request_id, error)
            return
        kv.state = choice.state
        kv.free_slots = self.store.free_slots(kv.store_id)
        self.policy_seconds += time.perf_counter() - start

    def _choose(
        self, sequence: Sequence, kv: SequenceKV, eviction: EvictionSpec | None, *, is_read: bool
    ) -> Choice | None:
        """What a policy wants to stay of the sequence; None if there is nothing to choose now."""
        length = sequence.num_cached
        if eviction is None or not eviction.wants(length, length - kv.state.num_evicted, is_read=is_read):
            return None
        if eviction.policy.inputs.replay and kv.replay is None:  # it continues other KV: nothing is staged
            return None
        blocks = kv.blocks.view
        return self._view.choose(
            eviction,
            kv.store_id,
            length,
            kv.state,
            (lambda layer: self.staging.tensors.read(layer, blocks, length)) if kv.is_staged else None,
            kv.replay.scores if kv.replay else None,
        )
