"""A request of openvino_genai: what it has given so far, and its caller's side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import openvino_genai as ov_genai

from ov_kvcrush.core.end_reason import EndReason
from ov_kvcrush.core.engine_thread import EngineThread
from ov_kvcrush.core.outputs import GenerationOutput, RequestStats
from ov_kvcrush.core.reading import Readable
from ov_kvcrush.core.request_options import RequestOptions
from ov_kvcrush.core.snapshot import KVSnapshot
from ov_kvcrush.core.streamed_request import Status, StreamedRequest
from ov_kvcrush.errors import OutOfMemory, RequestTimeout

FinishReason = ov_genai.GenerationFinishReason


class GenaiRequest(StreamedRequest):
    """What a request of openvino_genai has given so far; filled by the engine's thread.

    handle: openvino_genai's.
    """

    def __init__(self, request_id: int, handle: Any, num_input_tokens: int, options: RequestOptions) -> None:
        super().__init__(request_id, options)
        self.handle = handle
        self.num_input_tokens = num_input_tokens
        self.times: dict[int, list[float]] = {}
        self.outputs: dict[int, GenerationOutput] = {}
        self.peak_kv_bytes = 0
        self.was_told_to_end = False

    def collect(self, now: float) -> None:
        """Take over what the last step generated; openvino_genai hands every token out once."""
        status = self.handle.get_status()
        while self.handle.can_read():
            outputs = {i: _output(o) for i, o in self.handle.read().items()}
            for index, output in outputs.items():
                self.times.setdefault(index, []).extend([now] * len(output.generated_ids))
                before = self.outputs.get(index)
                self.outputs[index] = before.followed_by(output) if before else output
            self.stream.push(outputs)
        if status != Status.RUNNING:
            self._end(status)
        elif now > self.deadline and self.error is None:
            self.error = self.timeout(len(self.times.get(0, ())))
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
    staged: None = None
    fan_out_snapshots: list[KVSnapshot] = []  # noqa: RUF012 - nothing is ever added

    request: GenaiRequest

    def __init__(self, request: GenaiRequest, thread: EngineThread, decode: Callable[[list[int]], str]) -> None:
        super().__init__(request, thread, decode)

    @property
    def was_told_to_end(self) -> bool:
        """Whether it was stopped or cancelled, in time or not."""
        return self.request.was_told_to_end

    def outputs(self) -> list[GenerationOutput]:
        """Everything generated so far, one output for each sequence."""
        outputs = self.request.outputs
        found = [outputs[i] for i in sorted(outputs)] or [GenerationOutput([], [], 0.0, FinishReason.NONE)]
        return [found[0].up_to(self.request.max_read), *found[1:]]

    def readings(self) -> Iterator[tuple[int, int]]:
        """Not told."""
        return iter(())

    def stop(self, finish_reason: ov_genai.GenerationFinishReason = FinishReason.STOP) -> None:
        """End the request; what was generated counts as the answer."""
        self.request.was_told_to_end = True
        self.request.handle.stop(finish_reason)
        self._thread.wake()

    def cancel(self) -> None:
        """End the request; what was generated does not count."""
        self.request.was_told_to_end = True
        self.request.handle.cancel()
        self._thread.wake()

    def get_stats(self) -> RequestStats:
        """Token counts, moments and bytes of the request so far. openvino_genai does not tell reused tokens."""
        request = self.request
        times = [request.times[i] for i in sorted(request.times)]
        return RequestStats(
            request.num_input_tokens, 0, request.arrival, times, request.peak_kv_bytes, steps=request.steps
        )


def _output(output: Any) -> GenerationOutput:
    return GenerationOutput(output.generated_ids, output.generated_log_probs, output.score, output.finish_reason)
