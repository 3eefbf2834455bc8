"""Who runs in the next step: decode rows first, then prompts in chunks; nobody without the memory for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from ov_kvcrush.config import SchedulerConfig
from ov_kvcrush.engine.block_pool import BLOCK_SIZE, BlockPool, blocks_for
from ov_kvcrush.engine.prefix_cache import PrefixCache
from ov_kvcrush.engine.request import Sequence


@dataclass(frozen=True)
class RowPlan:
    """`num_tokens` rows of one sequence, from its first token without KV on; `samples`: the last one gives a token."""

    sequence: Sequence
    num_tokens: int
    samples: bool


@dataclass(frozen=True)
class StepPlan:
    """One inference: whose rows, in this order, and which blocks are copied before."""

    rows: tuple[RowPlan, ...]
    block_copies: tuple[tuple[int, int], ...]  # (source, target)
    out_of_memory: tuple[Sequence, ...]  # alone in the cache and still without room for the next token

    @property
    def num_tokens(self) -> int:
        """Rows of the inference."""
        return sum(row.num_tokens for row in self.rows)


class Scheduler:
    """Waiting and running sequences in the order of their arrival, and the blocks they hold.

    A prompt gets all its blocks when it is admitted, a decoding sequence one at a time. When none is left, kept
    prefixes are dropped first; then the sequence that arrived last gives up its blocks and waits at the front, to be
    computed again.
    """

    def __init__(self, config: SchedulerConfig, pool: BlockPool, prefixes: PrefixCache) -> None:
        self._config = config
        self._pool = pool
        self._prefixes = prefixes
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._copies: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue."""
        self.waiting.append(sequence)

    def fork(self, parent: Sequence, index: int) -> Sequence:
        """A twin of a running sequence that shares its blocks and runs from now on."""
        twin = parent.fork(index)
        twin.blocks.extend(parent.blocks.ids)
        self._pool.share(parent.blocks.ids)
        self.running.append(twin)
        return twin

    def remove(self, sequences: Iterable[Sequence]) -> None:
        """Take sequences out, wherever they are, and give their blocks back."""
        gone = set(sequences)
        self.running = [s for s in self.running if s not in gone]
        self.waiting = deque(s for s in self.waiting if s not in gone)
        for sequence in gone:
            self._release(sequence)

    def plan(self) -> StepPlan:
        """Decide the next step and allocate its blocks. Without rows there is nothing to do."""
        self._copies = []
        rows: list[RowPlan] = []
        stuck: list[Sequence] = []
        budget = self._plan_decodes(self._config.max_num_batched_tokens, rows, stuck)
        budget = self._plan_admitted_prompts(budget, rows)
        self._plan_new_prompts(budget, rows, stuck)
        return StepPlan(tuple(rows), tuple(self._copies), tuple(stuck))

    # Rows are planned in the order of arrival and the last is preempted first: no planned row loses its blocks.
    def _plan_decodes(self, budget: int, rows: list[RowPlan], stuck: list[Sequence]) -> int:
        for sequence in list(self.running):
            if sequence.num_pending != 1 or budget < 1 or sequence not in self.running:
                continue
            if self._make_room(sequence):
                rows.append(RowPlan(sequence, 1, True))
                budget -= 1
            elif sequence in self.running:
                stuck.append(sequence)
        return budget

    def _plan_admitted_prompts(self, budget: int, rows: list[RowPlan]) -> int:
        for sequence in self.running:
            if sequence.num_pending > 1 and budget > 0:
                budget -= self._plan_chunk(sequence, budget, rows)
        return budget

    def _plan_new_prompts(self, budget: int, rows: list[RowPlan], stuck: list[Sequence]) -> None:
        while self.waiting and budget > 0 and len(self.running) < self._config.max_num_seqs:
            sequence = self.waiting[0]
            if not self._config.dynamic_split_fuse and rows and sequence.num_pending > budget:
                return
            if not self._admit(sequence):
                if not self.running:
                    stuck.append(sequence)
                return
            self.waiting.popleft()
            self.running.append(sequence)
            budget -= self._plan_chunk(sequence, budget, rows)

    def _plan_chunk(self, sequence: Sequence, budget: int, rows: list[RowPlan]) -> int:
        num_tokens = min(sequence.num_pending, budget)
        rows.append(RowPlan(sequence, num_tokens, num_tokens == sequence.num_pending))
        return num_tokens

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence the blocks of all its tokens, those of a kept prefix among them."""
        shared, length = self._prefixes.match(sequence.ids[:])

        def missing() -> int:
            # One more when the prefix ends inside a block that stays shared: it is copied before it is written.
            copy = length % BLOCK_SIZE != 0 and self._pool.is_shared(int(shared[-1]))
            return blocks_for(len(sequence.ids)) - len(shared) + copy

        if self._pool.num_free < missing():
            self._prefixes.reclaim(missing())
        if self._pool.num_free < missing():
            self._pool.release(shared)
            return False
        sequence.blocks.extend(shared)
        sequence.num_cached = length
        if not sequence.num_generated:
            sequence.request.num_reused_tokens = length
        self._own_last_block(sequence)
        while len(sequence.blocks) < blocks_for(len(sequence.ids)):
            sequence.blocks.append(self._pool.allocate())
        return True

    def _make_room(self, sequence: Sequence) -> bool:
        """See that the next token of a decoding sequence has a slot of its own; preempt others if it must be."""
        needs_block = blocks_for(sequence.num_cached + 1) > len(sequence.blocks)
        needs_copy = not needs_block and self._pool.is_shared(int(sequence.blocks.ids[-1]))
        if not (needs_block or needs_copy):
            return True
        if not self._pool.num_free:
            self._prefixes.reclaim(1)
        while not self._pool.num_free:
            victim = self.running[-1]
            if victim is sequence:
                if len(self.running) == 1:
                    return False
                self._preempt(victim)
                return False
            self._preempt(victim)
        if needs_block:
            sequence.blocks.append(self._pool.allocate())
        else:
            self._own_last_block(sequence)
        return True

    def _own_last_block(self, sequence: Sequence) -> None:
        """Copy the last block if it is partly filled and has another owner (copy on write)."""
        if sequence.num_cached % BLOCK_SIZE == 0:
            return
        last = sequence.blocks.ids[-1:].copy()
        if self._pool.is_shared(int(last[0])):
            copy = self._pool.allocate()
            self._copies.append((int(last[0]), copy))
            sequence.blocks.replace_last(copy)
            self._pool.release(last)

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_cached = 0
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks.ids)
        sequence.blocks.clear()
