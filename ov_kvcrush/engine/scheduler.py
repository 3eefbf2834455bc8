"""Who runs in the next step: decode rows first, then prompts in chunks; nobody without the memory for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from ov_kvcrush.config import SchedulerConfig
from ov_kvcrush.core.request import Sequence
from ov_kvcrush.core.step import ScheduledTokens, SchedulerOutput
from ov_kvcrush.engine.lookahead.drafts import Drafts
from ov_kvcrush.engine.step_pace import StepPace
from ov_kvcrush.kvcache.manager import KVCacheManager
from ov_kvcrush.kvcache.replay import ROWS as REPLAY_ROWS

_MIN_CHUNK = 32  # rows of a prompt that memory is short for: less is not tried
_MAX_PASSED = 32  # that may find memory while one before them does not; then all wait for it
_MAX_TRIES = 4  # prompts in a step that are looked at and find no memory


class Scheduler:
    """Waiting and running sequences.

    A prompt is admitted with memory for all its tokens; a decoding sequence gets room as it grows. When there is none,
    the sequence of the lowest priority that arrived last gives up its KV and waits, to be computed again.

    Prompts run in the order of the moments at which each would be read if it had the machine for itself: a short one
    that comes later goes before a long one, until that has waited for as long as its own reading takes. Where several
    are there, a quarter of the rows is kept for those behind the first.

    drafts: what may follow decoding sequences, run with them where that pays; None = one token a step.
    """

    def __init__(self, config: SchedulerConfig, cache: KVCacheManager, drafts: Drafts | None = None) -> None:
        self._config = config
        self._cache = cache
        self._drafts = drafts
        self.pace = StepPace(config.max_step_ms / 1e3)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order of arrival
        self.num_preemptions = 0
        self._num_steps = 0

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue."""
        self.waiting.append(sequence)

    def fork(self, parent: Sequence, index: int) -> Sequence:
        """A twin of a running sequence that shares its KV and runs from now on."""
        twin = parent.fork(index)
        self.join(parent, twin)
        return twin

    def join(self, parent: Sequence, twin: Sequence) -> None:
        """Have `twin`, which begins with the cached tokens of `parent`, share its KV, and run from now on."""
        self._cache.fork(parent, twin)
        twin.num_cached = parent.num_cached
        self.running.insert(self.running.index(parent) + 1, twin)

    def park(self, sequence: Sequence) -> None:
        """A running sequence runs no more, but keeps its memory until it is removed."""
        self.running.remove(sequence)

    def remove(self, sequences: Iterable[Sequence]) -> None:
        """Take sequences out, wherever they are, and give their memory back."""
        gone = set(sequences)
        self.running = [s for s in self.running if s not in gone]
        self.waiting = deque(s for s in self.waiting if s not in gone)
        for sequence in gone:
            self._cache.free(sequence)
            if self._drafts:
                self._drafts.forget(sequence)

    def schedule(self) -> SchedulerOutput:
        """Decide the next step and take memory for it. Without rows there is nothing to do."""
        self._num_steps += 1
        rows: list[ScheduledTokens] = []
        unschedulable: list[Sequence] = []
        budget = self._schedule_decodes(self._config.max_num_batched_tokens, rows, unschedulable)
        if rows and self._config.dynamic_split_fuse:
            budget = min(budget, self.pace.rows_beside_decodes(budget))
        self._schedule_prompts(budget, rows, unschedulable)
        return SchedulerOutput(tuple(rows), tuple(unschedulable))

    # -- decode rows ---------------------------------------------------------------------------------------------------

    # The last to arrive is preempted first, and nobody's planned row loses its KV: who would need it waits for a step.
    def _schedule_decodes(self, budget: int, rows: list[ScheduledTokens], unschedulable: list[Sequence]) -> int:
        decodes = [s for s in self.running if s.num_pending == 1 and not self._reader_of(s)]
        if len(decodes) > budget:  # those who had to wait come first
            decodes.sort(key=lambda s: s.last_scheduled)
        decodes.sort(key=lambda s: -s.request.options.priority)
        for sequence in decodes:
            if budget > 0 and sequence in self.running:
                budget -= self._schedule_rows(sequence, 1, rows, unschedulable)
                sequence.last_scheduled = self._num_steps
        return budget - self._add_drafts(budget, rows)

    def _add_drafts(self, budget: int, rows: list[ScheduledTokens]) -> int:
        """Let guessed tokens follow the decode rows, as far as there is memory that nobody has to give up for them."""
        if self._drafts is None or not rows or budget <= 0:
            return 0
        num_tokens = 0
        guessed = self._drafts.guess([row.sequence for row in rows], budget)
        for i, (row, draft) in enumerate(zip(rows, guessed, strict=True)):
            if draft and self._cache.append_slots(row.sequence, 1 + len(draft)):
                rows[i] = replace(row, num_tokens=1 + len(draft), draft=draft)
                num_tokens += len(draft)
        return num_tokens

    # -- prompts -------------------------------------------------------------------------------------------------------

    def _schedule_prompts(self, budget: int, rows: list[ScheduledTokens], unschedulable: list[Sequence]) -> None:
        prompts = [s for s in self.running if s.num_pending > 1 or self._reader_of(s)]
        has_seats = len(self.running) < self._config.max_num_seqs
        prompts = sorted((*prompts, *(self.waiting if has_seats else ())), key=self._turn_of)
        if not prompts:
            return
        later = prompts[1:]
        # The first is planned after those behind it where they have rows of their own.
        share = budget // 4 if later and self._pending_of(prompts[0]) > budget - budget // 4 else 0
        if share and self._config.dynamic_split_fuse and prompts[0] in self.running:
            budget -= share - self._schedule_each(later, share, rows, unschedulable)
            later = []
        self._schedule_each([prompts[0], *later], budget, rows, unschedulable)

    def _turn_of(self, sequence: Sequence) -> tuple[bool, int, float]:
        request = sequence.request
        alone = self._pending_of(sequence) * self.pace.row_seconds
        return sequence.num_passed < _MAX_PASSED, -request.options.priority, request.arrival + alone

    def _reader_of(self, sequence: Sequence) -> Sequence | None:
        replay = self._cache.replay(sequence)
        return replay.reader if replay else None

    def _pending_of(self, sequence: Sequence) -> int:
        reader = self._reader_of(sequence)
        return reader.num_pending if reader else sequence.num_pending

    def _schedule_each(
        self, prompts: list[Sequence], budget: int, rows: list[ScheduledTokens], unschedulable: list[Sequence]
    ) -> int:
        """Plan rows of prompts in their order; returns the rows that are left."""
        without_memory: list[Sequence] = []
        is_closed = False  # to those that wait
        for sequence in prompts:
            if budget <= 0:
                break
            if sequence in self.running:
                budget -= self._schedule_running(sequence, budget, rows, unschedulable)
            elif sequence in self.waiting and not is_closed:  # it may have been preempted just now
                if not self._has_seat(sequence) or (
                    not self._config.dynamic_split_fuse and rows and sequence.num_pending > budget
                ):
                    is_closed = True
                elif self._admit(sequence):
                    budget -= self._schedule_running(sequence, budget, rows, unschedulable)
                else:
                    sequence.lacks_memory = True
                    without_memory.append(sequence)
                    is_closed = sequence.num_passed >= _MAX_PASSED or len(without_memory) >= _MAX_TRIES
        if without_memory and not self.running and not self._cache.is_contended:
            unschedulable.append(without_memory[0])
        return budget

    def _has_seat(self, sequence: Sequence) -> bool:
        """Whether `max_num_seqs` leaves room for it and the sequences that it will fork into."""
        if not self.running:
            return True
        taken = len(self.running) + sum(r.num_to_fork for r in {s.request for s in self.running})
        wanted = 0 if any(s.request is sequence.request for s in self.running) else sequence.request.num_to_fork
        return taken + 1 + wanted <= self._config.max_num_seqs

    def _admit(self, sequence: Sequence) -> bool:
        if not self._cache.allocate(sequence):
            return False
        if not sequence.num_generated:
            sequence.request.num_reused_tokens = sequence.num_cached
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.lacks_memory, sequence.num_passed = False, 0
        for passed in self.waiting:
            passed.num_passed += passed.lacks_memory
        return True

    def _schedule_running(
        self, sequence: Sequence, budget: int, rows: list[ScheduledTokens], unschedulable: list[Sequence]
    ) -> int:
        reader = self._reader_of(sequence)
        if reader is not None:
            return self._schedule_reader(reader, budget, rows)
        return self._schedule_rows(sequence, budget, rows, unschedulable)

    def _schedule_reader(self, reader: Sequence, budget: int, rows: list[ScheduledTokens]) -> int:
        """Plan rows of a prompt's second reading, which has had its blocks since the prompt was admitted."""
        num_tokens = min(reader.num_pending, budget, REPLAY_ROWS)
        rows.append(ScheduledTokens(reader, num_tokens, False))
        return num_tokens

    # -- memory --------------------------------------------------------------------------------------------------------

    def _schedule_rows(
        self, sequence: Sequence, budget: int, rows: list[ScheduledTokens], unschedulable: list[Sequence]
    ) -> int:
        """Plan up to `budget` pending rows of a running sequence; preempt others for them if it must be."""
        num_tokens = min(sequence.num_pending, budget)
        while not self._cache.append_slots(sequence, num_tokens):
            if num_tokens > _MIN_CHUNK:
                num_tokens = max(num_tokens // 2, _MIN_CHUNK)
                continue
            victims = self._victims()
            # A victim with planned rows keeps them: this one waits for the next step.
            if any((row.sequence.replays or row.sequence) in victims for row in rows):
                return 0
            if sequence in victims and len(self.running) == len(victims):
                unschedulable.append(sequence)
                return 0
            self._preempt(victims)
            if sequence in victims:
                return 0
        rows.append(ScheduledTokens(sequence, num_tokens, sequence.samples and num_tokens == sequence.num_pending))
        return num_tokens

    def _victims(self) -> list[Sequence]:
        """The last to arrive of the lowest priority; with it all beams of its search, which go on together only."""
        lowest = min(s.request.options.priority for s in self.running)
        last = next(s for s in reversed(self.running) if s.request.options.priority == lowest)
        return [s for s in self.running if s.request is last.request] if last.request.params.beam else [last]

    def _preempt(self, victims: list[Sequence]) -> None:
        """Give up the KV of victims. Beams wait as the sequence that reads their prompt, which they share again."""
        self.num_preemptions += 1
        first = victims[0]
        if first.request.params.beam:
            first = first.request.root
            first.request.sequences = [first]
        self.running = [s for s in self.running if s not in victims]
        for sequence in {first, *victims}:
            self._cache.free(sequence)
            sequence.num_cached = 0
            sequence.held_logits = None
        self.waiting.appendleft(first)
