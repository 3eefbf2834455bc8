"""Who runs in the next step: decode rows first, then prompts in chunks; nobody without the memory for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from ov_kvcrush.config import SchedulerConfig
from ov_kvcrush.core.request import Sequence
from ov_kvcrush.core.step import ScheduledTokens, SchedulerOutput
from ov_kvcrush.kvcache.manager import KVCacheManager
from ov_kvcrush.kvcache.replay import ROWS as REPLAY_ROWS

_MIN_CHUNK = 32  # rows of a prompt that memory is short for: less is not tried


class Scheduler:
    """Waiting and running sequences in the order of their arrival.

    A prompt is admitted with memory for all its tokens; a decoding sequence gets room as it grows. When there is none,
    the sequence that arrived last gives up its KV and waits at the front, to be computed again.
    """

    def __init__(self, config: SchedulerConfig, cache: KVCacheManager) -> None:
        self._config = config
        self._cache = cache
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue."""
        self.waiting.append(sequence)

    def fork(self, parent: Sequence, index: int) -> Sequence:
        """A twin of a running sequence that shares its KV and runs from now on."""
        twin = parent.fork(index)
        self._cache.fork(parent, twin)
        self.running.append(twin)
        return twin

    def remove(self, sequences: Iterable[Sequence]) -> None:
        """Take sequences out, wherever they are, and give their memory back."""
        gone = set(sequences)
        self.running = [s for s in self.running if s not in gone]
        self.waiting = deque(s for s in self.waiting if s not in gone)
        for sequence in gone:
            self._cache.free(sequence)

    def schedule(self) -> SchedulerOutput:
        """Decide the next step and take memory for it. Without rows there is nothing to do."""
        rows: list[ScheduledTokens] = []
        unschedulable: list[Sequence] = []
        budget = self._schedule_decodes(self._config.max_num_batched_tokens, rows, unschedulable)
        budget = self._schedule_running_prompts(budget, rows, unschedulable)
        self._schedule_new_prompts(budget, rows, unschedulable)
        return SchedulerOutput(tuple(rows), tuple(unschedulable))

    # Rows are planned in the order of arrival and the last is preempted first: no planned row loses its KV.
    def _schedule_decodes(self, budget: int, rows: list[ScheduledTokens], unschedulable: list[Sequence]) -> int:
        for sequence in list(self.running):
            if sequence.num_pending == 1 and budget > 0 and sequence in self.running:
                budget -= self._schedule_rows(sequence, 1, rows, unschedulable)
        return budget

    def _schedule_running_prompts(self, budget: int, rows: list[ScheduledTokens], unschedulable: list[Sequence]) -> int:
        for sequence in list(self.running):
            replay = self._cache.replay(sequence)
            if budget > 0 and replay and replay.reader:
                budget -= self._schedule_reader(replay.reader, budget, rows)
            elif sequence.num_pending > 1 and budget > 0 and sequence in self.running:
                budget -= self._schedule_rows(sequence, budget, rows, unschedulable)
        return budget

    def _schedule_new_prompts(self, budget: int, rows: list[ScheduledTokens], unschedulable: list[Sequence]) -> None:
        while self.waiting and budget > 0 and len(self.running) < self._config.max_num_seqs:
            sequence = self.waiting[0]
            if not self._config.dynamic_split_fuse and rows and sequence.num_pending > budget:
                return
            if not self._cache.allocate(sequence):
                if not self.running and not self._cache.is_contended:
                    unschedulable.append(sequence)
                return
            if not sequence.num_generated:
                sequence.request.num_reused_tokens = sequence.num_cached
            self.waiting.popleft()
            self.running.append(sequence)
            scheduled = self._schedule_rows(sequence, budget, rows, unschedulable)
            if not scheduled:
                return
            budget -= scheduled

    def _schedule_reader(self, reader: Sequence, budget: int, rows: list[ScheduledTokens]) -> int:
        """Plan rows of a prompt's second reading, which has had its blocks since the prompt was admitted."""
        num_tokens = min(reader.num_pending, budget, REPLAY_ROWS)
        rows.append(ScheduledTokens(reader, num_tokens, False))
        return num_tokens

    def _schedule_rows(
        self, sequence: Sequence, budget: int, rows: list[ScheduledTokens], unschedulable: list[Sequence]
    ) -> int:
        """Plan up to `budget` pending rows of a running sequence; preempt others for them if it must be."""
        num_tokens = min(sequence.num_pending, budget)
        while not self._cache.append_slots(sequence, num_tokens):
            if num_tokens > _MIN_CHUNK:
                num_tokens = max(num_tokens // 2, _MIN_CHUNK)
                continue
            victim = self.running[-1]
            if victim is sequence and len(self.running) == 1:
                unschedulable.append(sequence)
                return 0
            # A victim with planned rows arrived earlier than it was planned here: this one waits for the next step.
            if any(row.sequence is victim for row in rows):
                return 0
            self._preempt(victim)
            if victim is sequence:
                return 0
        rows.append(ScheduledTokens(sequence, num_tokens, sequence.samples and num_tokens == sequence.num_pending))
        return num_tokens

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self.running.remove(sequence)
        self._cache.free(sequence)
        sequence.num_cached = 0
        sequence.held_logits = None
        self.waiting.appendleft(sequence)
