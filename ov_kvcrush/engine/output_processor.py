"""From logits to answers: tokens are accepted, sequences end, requests end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.core.outputs import GenerationOutput
from ov_kvcrush.core.request import FinishReason, Request, Sequence, Status
from ov_kvcrush.core.snapshot import KVSnapshot
from ov_kvcrush.core.step import SchedulerOutput
from ov_kvcrush.engine.handle import GenerationHandle
from ov_kvcrush.engine.sampler import Sampled, sample_rows
from ov_kvcrush.engine.scheduler import Scheduler
from ov_kvcrush.kvcache.manager import KVCacheManager


class OutputProcessor:
    """What happens to sequences after an inference.

    handles: of unfinished requests, by their ids; guarded by `lock`. own: makes a snapshot the engine's.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        cache: KVCacheManager,
        handles: dict[int, GenerationHandle],
        lock: threading.Lock,
        own: Callable[[KVSnapshot], KVSnapshot],
    ) -> None:
        self._scheduler = scheduler
        self._cache = cache
        self._handles = handles
        self._lock = lock
        self._own = own

    def process(self, step: SchedulerOutput, logits: np.ndarray) -> float:
        """Choose tokens and end what is complete. Returns the seconds that sampling took."""
        self._end_prefilled(step)
        start = time.perf_counter()
        new: dict[Request, dict[int, GenerationOutput]] = {}
        due = [(member, row) for sequence, row in self._due(step, logits) for member in self._members(sequence)]
        for (member, _), sampled in zip(due, sample_rows(due), strict=True):
            if sampled.token < 0:  # no token is possible: it ends alone
                member.request.abort_reason = (Status.CANCEL, FinishReason.STOP)
                continue
            new.setdefault(member.request, {})[member.index] = _accept(member, sampled, start)
        sampling_s = time.perf_counter() - start
        for request, outputs in new.items():
            self._handles[request.request_id].push(outputs)
            for index in outputs:
                if request.sequences[index].is_finished:
                    self._retire(request.sequences[index])
            self.end_if_complete(request)
        return sampling_s

    def _end_prefilled(self, step: SchedulerOutput) -> None:
        """End the requests that wanted nothing but the KV of their prompt."""
        for row in step.rows:
            sequence = row.sequence.replays or row.sequence
            is_read = not sequence.num_pending and self._cache.replay(sequence) is None
            if sequence.request.prefill_only and is_read and not sequence.is_finished:
                self.finish(sequence, FinishReason.LENGTH)
                self.end_if_complete(sequence.request)

    def _due(self, step: SchedulerOutput, logits: np.ndarray) -> Iterator[tuple[Sequence, np.ndarray]]:
        """Sequences that get a token now, with their logits. A prompt that is read twice waits with those it has."""
        logits_rows = iter(logits)
        for row in step.rows:
            sequence = row.sequence.replays or row.sequence
            if row.samples:
                sequence.held_logits = next(logits_rows)
            held = sequence.held_logits
            if held is None or sequence.is_finished:  # its KV found no room
                continue
            if self._cache.replay(sequence):
                sequence.held_logits = held.copy()
                continue
            sequence.held_logits = None
            yield sequence, held

    def _members(self, sequence: Sequence) -> list[Sequence]:
        """The sequences that take their next token from this row: all of a request's when its prompt is complete."""
        request = sequence.request
        wanted = request.params.num_return_sequences
        if sequence.num_generated == 0 and len(request.sequences) < wanted:
            request.sequences += [self._scheduler.fork(sequence, index) for index in range(1, wanted)]
            return request.sequences
        return [sequence]

    def finish(self, sequence: Sequence, reason: ov_genai.GenerationFinishReason, keep: bool = True) -> None:
        """End a sequence; keep: whether what it leaves may be used again."""
        sequence.finish_reason = reason
        self._retire(sequence, keep)

    def _retire(self, sequence: Sequence, keep: bool = True) -> None:
        """Settle the answer of an ended sequence, keep its KV if the request wants that, free its memory."""
        _settle(sequence)
        request = sequence.request
        held = sum(self._cache.bytes_of(s) for s in request.sequences)
        request.peak_kv_bytes = max(request.peak_kv_bytes, held)
        if keep and request.keep_kv and sequence.index == 0:
            self._cache.cache_prefix(sequence)
        if keep and request.returns_snapshot and sequence.index == 0:
            snapshot = self._cache.snapshot(sequence)
            request.snapshot = self._own(snapshot) if snapshot else None
        sequence.final_state = self._cache.eviction_state(sequence)
        self._scheduler.remove([sequence])

    def end_if_complete(self, request: Request) -> None:
        """End a request whose sequences have all ended."""
        if all(s.is_finished for s in request.sequences):
            self.end(request, Status.FINISHED)

    def end(self, request: Request, status: ov_genai.GenerationStatus) -> None:
        """Set the final status of a request."""
        request.status = status
        with self._lock:
            self._handles.pop(request.request_id, None)

    def process_aborts(self) -> None:
        """End the requests whose handles were told to stop or cancel."""
        for handle in list(self._handles.values()):
            request = handle.request
            if request.abort_reason:
                status, reason = request.abort_reason
                for sequence in request.sequences:
                    if not sequence.is_finished:
                        self.finish(sequence, reason, keep=status != Status.CANCEL)
                self.end(request, status)

    def abort(self, requests: set[Request]) -> None:
        """End requests after an error, without an answer."""
        for request in requests:
            self._scheduler.remove(request.sequences)
            for sequence in request.sequences:
                if not sequence.is_finished:
                    sequence.finish_reason = FinishReason.STOP
            self.end(request, Status.CANCEL)


def _accept(sequence: Sequence, sampled: Sampled, now: float) -> GenerationOutput:
    token, logprob, top = sampled
    sequence.ids.append(token)
    sequence.token_times.append(now)
    sequence.logprobs.append(logprob)
    sequence.cumulative_logprob += logprob
    if top is not None:
        sequence.top_logprobs.append(top)
    sequence.finish_reason = finish_reason(sequence, token)
    tops = None if top is None else [top]
    return GenerationOutput([token], [logprob], sequence.cumulative_logprob, sequence.finish_reason, None, tops)


def finish_reason(sequence: Sequence, token: int) -> ov_genai.GenerationFinishReason:
    """Why `sequence` ends with `token`, NONE if it goes on."""
    params = sequence.request.params
    if sequence.stop_tracker and sequence.stop_tracker.add(token):
        return FinishReason.STOP
    if token in params.stop_token_ids and sequence.num_generated >= params.min_new_tokens:
        return FinishReason.STOP
    if sequence.num_generated >= params.max_new_tokens:
        return FinishReason.LENGTH
    return FinishReason.NONE


def _settle(sequence: Sequence) -> None:
    """Fix the ids, and for a stop string the text, of an ended sequence."""
    ids = sequence.generated.tolist()
    tracker = sequence.stop_tracker
    if tracker and tracker.match:
        length = tracker.match[sequence.request.params.include_stop_str_in_output]
        sequence.final_text = tracker.text[:length]
        ids = ids[: tracker.num_tokens_within(length)]
    sequence.final_ids = ids
