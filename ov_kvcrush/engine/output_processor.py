"""From logits to answers: tokens are accepted, sequences end, requests end, their callers are told."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.core.end_reason import EndReason
from ov_kvcrush.core.outputs import GenerationOutput
from ov_kvcrush.core.request import FinishReason, Request, Sequence
from ov_kvcrush.core.snapshot import KVSnapshot
from ov_kvcrush.core.step import SchedulerOutput
from ov_kvcrush.core.streamed_request import Status
from ov_kvcrush.core.token_stream import Outputs
from ov_kvcrush.engine.beams import Beams
from ov_kvcrush.engine.sampler import Sampled
from ov_kvcrush.engine.scheduler import Scheduler
from ov_kvcrush.engine.token_rounds import Row, SampledRows, sample_each, take_tokens
from ov_kvcrush.errors import OutOfMemory
from ov_kvcrush.kvcache.manager import KVCacheManager

_log = logging.getLogger(__name__)


class OutputProcessor:
    """What happens to sequences after an inference.

    requests: that have not ended, by their ids; guarded by `lock`. own: makes a snapshot the engine's.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        cache: KVCacheManager,
        requests: dict[int, Request],
        lock: threading.Lock,
        own: Callable[[KVSnapshot], KVSnapshot],
    ) -> None:
        self._scheduler = scheduler
        self._cache = cache
        self._requests = requests
        self._lock = lock
        self._own = own
        self._beams = Beams(scheduler, cache)
        self._news: dict[Request, Outputs | None] = {}  # of this step; told when all else is done
        self._ended: list[Request] = []

    # -- tokens --------------------------------------------------------------------------------------------------------

    def process(self, step: SchedulerOutput, logits: np.ndarray) -> float:
        """Choose tokens and end what is complete. Returns the seconds that sampling took."""
        self._end_prefilled(step)
        start = time.perf_counter()
        rows = list(self._due(step, logits))
        due = [SampledRows(member, row, draft) for sequence, row, draft in rows for member in self._members(sequence)]
        take_tokens(due, start, self._sample, self.fail)
        self._take_back([rows for rows in due if rows.draft])
        chosen = [rows.sequence for rows in due if rows.num_taken and not rows.sequence.error]
        searches = self._beams.take(((s, row[0]) for s, row, _ in rows if s.request.params.beam), start)
        sampling_s = time.perf_counter() - start
        for sequence, broke in searches:
            if broke:
                self.fail(sequence, broke)
            else:
                self._end_search(sequence.request, FinishReason.LENGTH)
                self.end_if_complete(sequence.request)
        for member in chosen:
            if member.is_finished:
                self._retire(member)
            self._tell(member)
            self.end_if_complete(member.request)
        return sampling_s

    def _take_back(self, drafted: list[SampledRows]) -> None:
        """Have the cache forget the guessed tokens that are not the sequences'."""
        for rows in drafted:
            sequence, num_run = rows.sequence, 1 + len(rows.draft)
            if sequence.error:  # it has no memory any more
                continue
            sequence.num_cached += rows.num_taken - 1
            sequence.request.num_drafted += len(rows.draft)
            sequence.request.num_accepted += rows.num_taken - 1
            try:
                self._cache.settle(sequence, num_run, rows.num_taken)
            except Exception as error:
                self.fail(sequence, error)

    def _end_prefilled(self, step: SchedulerOutput) -> None:
        """End the requests that wanted nothing but the KV of their prompt."""
        for row in step.rows:
            sequence = row.sequence.replays or row.sequence
            if not sequence.request.prefill_only or sequence.is_finished:
                continue
            self._news.setdefault(sequence.request, None)
            sequence.request.readings.append(self._reading_of(sequence.request))
            if not sequence.num_pending and self._cache.replay(sequence) is None:
                self.finish(sequence, FinishReason.LENGTH)
                self.end_if_complete(sequence.request)

    def _reading_of(self, request: Request) -> tuple[int, int]:
        """Tokens of the prompt that were read, and all of them; those of a second reading count again."""
        first, replayer = request.sequences[0], request.replayer
        num_again = replayer.num_read_again(request.num_prompt_tokens) if replayer else 0
        num_read = min(first.num_cached, request.num_prompt_tokens)
        if num_read == request.num_prompt_tokens:
            replay = self._cache.replay(first)
            done, total = replay.progress if replay else (1, 1)
            num_read += num_again * done // total
        return num_read, request.num_prompt_tokens + num_again

    def _due(self, step: SchedulerOutput, logits: np.ndarray) -> Iterator[tuple[Sequence, np.ndarray, tuple[int, ...]]]:
        """Sequences that get a token now, with their logits (rows, vocabulary) and what was guessed behind the first.

        A prompt that is read twice waits with those it has.
        """
        begin = 0
        for row in step.rows:
            sequence = row.sequence.replays or row.sequence
            if row.samples:
                sequence.held_logits = logits[begin : begin + row.num_samples]
                begin += row.num_samples
            held = sequence.held_logits
            if held is None or sequence.is_finished:  # its KV found no room
                continue
            if self._cache.replay(sequence):
                sequence.held_logits = held.copy()
                continue
            sequence.held_logits = None
            yield sequence, held, row.draft

    def _sample(self, rows: list[Row]) -> list[Sampled | Exception]:
        """The next token of each, or what is wrong with it."""
        return sample_each(rows)

    def _members(self, sequence: Sequence) -> list[Sequence]:
        """The sequences that take their next token from this row: all of a request's when its prompt is complete.

        None for a row of a beam search.
        """
        request = sequence.request
        if request.params.beam:
            return []
        wanted = request.params.num_return_sequences
        if sequence.num_generated or len(request.sequences) >= wanted:
            return [sequence]
        try:
            while len(request.sequences) < wanted:
                request.sequences.append(self._scheduler.fork(sequence, len(request.sequences)))
        except Exception as error:  # none of them has a token yet
            for member in request.sequences:
                self.fail(member, error)
            return []
        return request.sequences

    def _tell(self, sequence: Sequence) -> None:
        """Note what its caller may read now: nothing that may turn out to be the beginning of a stop string."""
        ids, tracker = sequence.final_ids, sequence.stop_tracker
        if ids is None:
            ids = sequence.generated[sequence.num_pushed :].tolist()
            if tracker:
                ids = ids[: max(tracker.num_tokens_within(tracker.safe_length) - sequence.num_pushed, 0)]
        else:
            ids = ids[sequence.num_pushed :]
        if not ids and not sequence.is_finished:
            return
        begin, sequence.num_pushed = sequence.num_pushed, sequence.num_pushed + len(ids)
        logprobs = sequence.logprobs[begin : sequence.num_pushed]
        tops = sequence.top_logprobs[begin : sequence.num_pushed] if sequence.request.params.logprobs > 1 else None
        output = GenerationOutput(ids, logprobs, sequence.cumulative_logprob, sequence.told_reason, None, tops)
        news = self._news.get(sequence.request) or {}
        news[sequence.index] = output
        self._news[sequence.request] = news

    def flush(self) -> None:
        """Tell callers what has happened, when all else of a step is done: they find it so."""
        news, self._news = self._news, {}
        ended, self._ended = self._ended, []
        for request, outputs in news.items():
            request.stream.push(outputs)
        for request in ended:
            request.stream.end()

    # -- the end of sequences ------------------------------------------------------------------------------------------

    def finish(self, sequence: Sequence, reason: ov_genai.GenerationFinishReason, keep: bool = True) -> None:
        """End a sequence; keep: whether what it leaves may be used again."""
        sequence.finish_reason = reason
        self._retire(sequence, keep)
        self._tell(sequence)

    def fail(self, sequence: Sequence, error: Exception) -> None:
        """End a sequence that has no room, or that something broke; others go on."""
        if sequence.is_finished:
            return
        if not isinstance(error, OutOfMemory):
            _log.warning("request %d failed: %r", sequence.request.request_id, error)
        reason = FinishReason.LENGTH if isinstance(error, OutOfMemory) else FinishReason.STOP
        if sequence.request in self._beams:
            sequence = self._end_search(sequence.request, reason, keep=False)[0]
            sequence.error = error
        else:
            sequence.error = error
            self.finish(sequence, reason, keep=False)
        self.end_if_complete(sequence.request)

    def _end_search(
        self, request: Request, reason: ov_genai.GenerationFinishReason, keep: bool = True
    ) -> list[Sequence]:
        """End a beam search with its answers, which callers are told at once; of its KV only the prompt's is kept."""
        self._retire(request.root, keep)
        answers = self._beams.end(request, reason)
        for sequence in answers:
            _settle(sequence)
            self._tell(sequence)
        return answers

    def _retire(self, sequence: Sequence, keep: bool = True) -> None:
        """Settle the answer of an ended sequence, keep its KV if the request wants that, free its memory."""
        _settle(sequence)
        request = sequence.request
        held = sum(self._cache.bytes_of(s) for s in request.sequences)
        request.peak_kv_bytes = max(request.peak_kv_bytes, held)
        try:
            if keep and request.keep_kv and sequence.index == 0:
                self._cache.cache_prefix(sequence)
            if keep and request.returns_snapshot and sequence.index == 0:
                snapshot = self._cache.snapshot(sequence)
                request.snapshot = self._own(snapshot) if snapshot else None
            sequence.final_state = self._cache.eviction_state(sequence)
        except Exception as error:  # the answer is there, what it would have left is not
            _log.warning("request %d leaves no KV: %r", request.request_id, error)
        finally:
            self._scheduler.remove([sequence])

    # -- the end of requests -------------------------------------------------------------------------------------------

    def end_if_complete(self, request: Request) -> None:
        """End a request whose sequences have all ended."""
        if request.is_finished or not all(s.is_finished for s in request.sequences):
            return
        error = next((s.error for s in request.sequences if s.error is not None), None)
        if error is None:
            is_whole = all(s.finish_reason == FinishReason.STOP for s in request.sequences)
            self._end(request, Status.FINISHED, EndReason.STOP if is_whole else EndReason.LENGTH)
        elif isinstance(error, OutOfMemory):
            self._end(request, Status.IGNORED, EndReason.MEMORY, error)
        else:
            self._end(request, Status.CANCEL, EndReason.ERROR, error)

    def _end(
        self, request: Request, status: ov_genai.GenerationStatus, reason: EndReason, error: Exception | None = None
    ) -> None:
        request.end_reason, request.error = reason, error
        self._beams.forget(request)
        request.status = status
        with self._lock:
            self._requests.pop(request.request_id, None)
        self._ended.append(request)

    def end_requests(self, now: float) -> None:
        """End the requests that were told to stop or cancel, and those whose time is over."""
        for request in list(self._requests.values()):
            if request.abort_reason:
                status, reason = request.abort_reason
                is_cancelled = status == Status.CANCEL
                self._finish_all(request, reason, keep=not is_cancelled)
                self._end(request, status, EndReason.CANCELLED if is_cancelled else EndReason.STOP)
            elif now > request.deadline:
                self._finish_all(request, FinishReason.STOP, keep=False)
                error = request.timeout(request.sequences[0].num_generated)
                self._end(request, Status.CANCEL, EndReason.TIMEOUT, error)

    def _finish_all(self, request: Request, reason: ov_genai.GenerationFinishReason, keep: bool) -> None:
        if request in self._beams:
            self._end_search(request, reason, keep)
        for sequence in request.sequences:
            if not sequence.is_finished:
                self.finish(sequence, reason, keep)

    def abort(self, requests: set[Request], error: BaseException) -> None:
        """End requests after an error that may be of any of them. None of them has a whole answer."""
        for request in requests:
            if request.is_finished:
                continue
            self._scheduler.remove([request.root, *request.sequences])
            for sequence in request.sequences:
                if not sequence.is_finished:
                    sequence.finish_reason = FinishReason.STOP
                    _settle(sequence)
            self._end(request, Status.CANCEL, EndReason.ERROR, _own_copy(error))


def _own_copy(error: BaseException) -> Exception:
    """The same error for one of several callers: each raises its own, which grows a traceback."""
    if not isinstance(error, Exception):  # Ctrl-C is of the thread that it hit
        return RuntimeError(f"the step was broken off by {type(error).__name__} in another thread")
    try:
        own = copy.copy(error)
    except Exception:
        return error
    own.__cause__ = error
    return own


def _settle(sequence: Sequence) -> None:
    """Fix the ids, and for a stop string the text, of an ended sequence."""
    ids = sequence.generated.tolist()
    tracker = sequence.stop_tracker
    if tracker and tracker.match:
        length = tracker.match[sequence.request.params.include_stop_str_in_output]
        sequence.final_text = tracker.text[:length]
        ids = ids[: tracker.num_tokens_within(length)]
    sequence.final_ids = ids
