"""A request of openvino_genai: what it has given so far, and its caller's side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import openvino_genai as ov_genai

from ov_kvcrush.core.end_reason import EndReason
from ov_kvcrush.core.engine_thread import EngineThread
from ov_kvcrush.core.outputs import GenerationOutput, RequestStats, StepSeconds
from ov_kvcrush.core.reading import Readable
from ov_kvcrush.core.snapshot import KVSnapshot
from ov_kvcrush.core.token_stream import TokenStream
from ov_kvcrush.errors import OutOfMemory, RequestTimeout

Status = ov_genai.GenerationStatus
FinishReason = ov_genai.GenerationFinishReason


class GenaiRequest:
    """What a request of openvino_genai has given so far; filled by the engine's thread.

    handle: openvino_genai's. is_driven: whether it is moved on without a caller's `step`.
    """

    def __init__(self, request_id: int, handle: Any, num_input_tokens: int, timeout_s: float | None) -> None:
        self.request_id = request_id
        self.handle = handle
        self.num_input_tokens = num_input_tokens
        self.arrival = time.perf_counter()
        self.timeout_s = timeout_s
        self.times: dict[int, list[float]] = {}
        self.outputs: dict[int, GenerationOutput] = {}
        self.steps: list[tuple[int, StepSeconds]] = []
        self.peak_kv_bytes = 0
        self.was_told_to_end = False
        self.is_driven = False
        self.stream = TokenStream()
        self.status = Status.RUNNING
        self.end_reason: EndReason | None = None
        self.error: Exception | None = None

    def collect(self, now: float) -> None:
        """Take over what the last step generated; openvino_genai hands every token out once."""
        status = self.handle.get_status()
        while self.handle.can_read():
            outputs = {i: _output(o) for i, o in self.handle.read().items()}
            for index, output in outputs.items():
                self.times.setdefault(index, []).extend([now] * len(output.generated_ids))
                self.outputs[index] = _joined(self.outputs.get(index), output)
            self.stream.push(outputs)
        if status != Status.RUNNING:
            self._end(status)
        elif self.timeout_s is not None and now > self.arrival + self.timeout_s and self.error is None:
            self.error = RequestTimeout(f"request must end within timeout_s={self.timeout_s}, got no end until then")
            self.was_told_to_end = True
            self.handle.cancel()

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        self.error = error
        self._end(Status.CANCEL)

    def _end(self, status: ov_genai.GenerationStatus) -> None:
        is_stop = all(output.finish_reason != FinishReason.LENGTH for output in self.outputs.values())
        reasons = {Status.CANCEL: EndReason.CANCELLED, Status.STOP: EndReason.STOP, Status.IGNORED: EndReason.MEMORY}
        self.end_reason = reasons.get(status, EndReason.STOP if is_stop else EndReason.LENGTH)
        if self.error is not None:
            self.end_reason = EndReason.TIMEOUT if isinstance(self.error, RequestTimeout) else EndReason.ERROR
        elif status == Status.IGNORED:
            self.error = OutOfMemory(
                f"prompt and answer must fit into openvino_genai's KV cache, got {self.num_input_tokens} tokens of "
                "prompt; raise cache_size of scheduler_config"
            )
        self.status = status
        self.stream.end()


class GenaiHandle(Readable):
    """A request of openvino_genai, read after every step so that its tokens have a time. It runs while this is held.

    It does not tell what it evicted, and keeps its KV.
    """

    kept_positions: None = None
    representative_positions: None = None
    snapshot: None = None
    fan_out_snapshots: list[KVSnapshot] = []  # noqa: RUF012 - nothing is ever added

    def __init__(self, request: GenaiRequest, thread: EngineThread, decode: Callable[[list[int]], str]) -> None:
        super().__init__(request.stream, thread, decode)
        self.request_id = request.request_id
        self._request = request
        self._max_read: int | None = None

    def __del__(self) -> None:
        request = getattr(self, "_request", None)
        if request is not None and not request.stream.is_done:
            self.cancel()

    def get_status(self) -> ov_genai.GenerationStatus:
        """RUNNING, FINISHED, STOP or CANCEL. A request that openvino_genai gave up for lack of memory is IGNORED."""
        return self._request.status

    @property
    def end_reason(self) -> EndReason | None:
        """Why it has ended; None while it runs."""
        return self._request.end_reason

    @property
    def error(self) -> Exception | None:
        """Why there is no whole answer; None if nothing kept it from being whole."""
        return self._request.error

    @property
    def was_told_to_end(self) -> bool:
        """Whether it was stopped or cancelled, in time or not."""
        return self._request.was_told_to_end

    def _be_driven(self) -> bool:
        request = self._request
        if request.is_driven or request.stream.is_done:
            return False
        request.is_driven = True
        return True

    def _final_text(self) -> None:
        return None

    def read_all(self) -> list[GenerationOutput]:
        """Everything generated so far, one output for each sequence."""
        outputs = self._request.outputs
        found = [outputs[i] for i in sorted(outputs)] or [GenerationOutput([], [], 0.0, FinishReason.NONE)]
        if self._max_read is not None:
            first, limit = found[0], self._max_read
            ids, logprobs = first.generated_ids[:limit], first.generated_log_probs[:limit]
            found[0] = GenerationOutput(ids, logprobs, sum(logprobs), first.finish_reason)
        return found

    def readings(self) -> Iterator[tuple[int, int]]:
        """Not told."""
        return iter(())

    def stop(self, finish_reason: ov_genai.GenerationFinishReason = FinishReason.STOP) -> None:
        """End the request; what was generated counts as the answer."""
        self._request.was_told_to_end = True
        self._request.handle.stop(finish_reason)
        self._thread.wake()

    def cancel(self) -> None:
        """End the request; what was generated does not count."""
        self._request.was_told_to_end = True
        self._request.handle.cancel()
        self._thread.wake()

    def end_at(self, num_tokens: int, *, is_cancelled: bool) -> None:
        """Stop or cancel it with the first `num_tokens` of its first sequence as its answer, also if it has ended."""
        self._max_read = num_tokens
        (self.cancel if is_cancelled else self.stop)()
        self.wait()
        if is_cancelled:
            self._request.status, self._request.end_reason = Status.CANCEL, EndReason.CANCELLED

    def get_stats(self) -> RequestStats:
        """Token counts, moments and bytes of the request so far. openvino_genai does not tell reused tokens."""
        request = self._request
        times = [request.times[i] for i in sorted(request.times)]
        return RequestStats(
            request.num_input_tokens, 0, request.arrival, times, request.peak_kv_bytes, steps=request.steps
        )


def _output(output: Any) -> GenerationOutput:
    return GenerationOutput(output.generated_ids, output.generated_log_probs, output.score, output.finish_reason)


def _joined(before: GenerationOutput | None, new: GenerationOutput) -> GenerationOutput:
    if before is None:
        return new
    return GenerationOutput(
        before.generated_ids + new.generated_ids,
        before.generated_log_probs + new.generated_log_probs,
        new.score,
        new.finish_reason,
    )
