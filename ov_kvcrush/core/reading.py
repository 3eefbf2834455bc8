"""Reading from a request that an engine moves on: waiting, iterating, with asyncio; the same for every engine."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator

import openvino_genai as ov_genai

from ov_kvcrush.core.end_reason import EndReason
from ov_kvcrush.core.engine_thread import EngineThread
from ov_kvcrush.core.outputs import GenerationOutput, RequestStats
from ov_kvcrush.core.perf_metrics import PerfMetrics
from ov_kvcrush.core.stop_strings import StopStringTracker
from ov_kvcrush.core.streamed_request import Status, StreamedRequest
from ov_kvcrush.core.token_stream import Outputs


class Readable(ABC):
    """A request, as far as it is read.

    Whoever waits for it has the engine move it on by itself from then on; else its caller may do so by `step`.
    """

    def __init__(self, request: StreamedRequest, thread: EngineThread, decode: Callable[[list[int]], str]) -> None:
        self.request = request
        self._stream = request.stream
        self._thread = thread
        self._text = StopStringTracker((), decode)

    def __del__(self) -> None:
        request = getattr(self, "request", None)
        if request is not None and not request.is_finished:
            self.cancel()

    @abstractmethod
    def stop(self) -> None:
        """End the request after the running step; what was generated counts as the answer."""

    @abstractmethod
    def cancel(self) -> None:
        """End the request after the running step; what was generated does not count."""

    @abstractmethod
    def outputs(self) -> list[GenerationOutput]:
        """Everything generated so far, read or not: one output for each sequence, in their order. Waits for nothing."""

    @abstractmethod
    def get_stats(self) -> RequestStats:
        """Token counts, moments and bytes of the request so far."""

    def get_perf_metrics(self) -> PerfMetrics:
        """Timings of the request so far, without tokenizer and load time."""
        stats = self.get_stats()
        metrics = PerfMetrics(num_input_tokens=stats.num_input_tokens, num_reused_tokens=stats.num_reused_tokens)
        metrics.kv_bytes, metrics.kept_tokens = stats.kv_bytes, stats.kept_tokens
        metrics.add_tokens(stats.arrival, stats.token_times)
        steps = [seconds for _, seconds in stats.steps]
        metrics.add_steps([s.inference for s in steps], [s.sampling for s in steps])
        return metrics

    def _final_text(self) -> str | None:
        """The text of an ended answer that a stop string cut inside a token."""
        return None

    @property
    def request_id(self) -> int:
        """The id given to `add_request`."""
        return self.request.request_id

    def get_status(self) -> ov_genai.GenerationStatus:
        """RUNNING, FINISHED, STOP, CANCEL, or IGNORED for one that the cache had no room for."""
        return self.request.status

    @property
    def end_reason(self) -> EndReason | None:
        """Why it has ended; None while it runs."""
        return self.request.end_reason

    @property
    def error(self) -> Exception | None:
        """Why there is no whole answer: OutOfMemory, RequestTimeout, or whatever broke it; None if nothing did."""
        return self.request.error

    def end_at(self, num_tokens: int, *, is_cancelled: bool) -> None:
        """Stop or cancel it with the first `num_tokens` of the first sequence as its answer, also one that has ended.

        For a reader who has had enough while the engine went on.
        """
        self.request.max_read = num_tokens
        (self.cancel if is_cancelled else self.stop)()
        self.wait()
        if is_cancelled:
            self.request.status, self.request.end_reason = Status.CANCEL, EndReason.CANCELLED

    def cut(self, num_tokens: int) -> None:
        """Show no more than the first tokens of each answer, though more were made."""
        self.request.max_read = num_tokens

    def raise_error(self) -> None:
        """Raise `error`, if there is one."""
        error = self.error
        if error is not None:
            raise error

    def drive(self) -> None:
        """Have the engine move the request on by itself, without `step`."""
        request = self.request
        if not (self._thread.is_own or request.is_driven or request.is_finished):
            request.is_driven = True
            self._thread.start()
            self._thread.wake()

    def can_read(self) -> bool:
        """Whether `read` would return tokens that were not read before, without waiting."""
        return self._stream.has_new

    def read(self, timeout: float | None = None) -> Outputs:
        """Tokens of the oldest unread step, by sequence index; waits for them.

        Raises IndexError if all were read and none will come, TimeoutError after `timeout` seconds.
        """
        if not self.can_read():
            self.drive()
        outputs = self._stream.read(timeout)
        if outputs is None:
            raise IndexError("all tokens of the request were read")
        return outputs

    def read_all(self) -> list[GenerationOutput]:
        """What was not read yet, to the end, waited for: one output for each sequence; empty if all was read.

        As in openvino_genai, where it hands out each token once, too. `outputs` waits for nothing and takes nothing.
        """
        is_first, found = not self._stream.was_read, dict[int, GenerationOutput]()
        self.drive()
        while (new := self._stream.read()) is not None:
            for index, output in new.items():
                found[index] = found[index].followed_by(output) if index in found else output
        return self.outputs() if found and is_first else [found[index] for index in sorted(found)]

    def __iter__(self) -> Iterator[Outputs]:
        """What `read` returns, to the end. Raises `error` then, if there is one."""
        self.drive()
        while (outputs := self._stream.read()) is not None:
            yield outputs
        self.raise_error()

    async def __aiter__(self) -> AsyncIterator[Outputs]:
        """As `__iter__`, for asyncio: other tasks run while it waits. One task at a time."""
        stream, happened = self._stream, asyncio.Event()
        loop = asyncio.get_running_loop()

        def notify() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(happened.set)

        stream.notify(notify)
        try:
            self.drive()
            while stream.has_new or not stream.is_done:
                if stream.has_new:
                    outputs = stream.read()
                    assert outputs is not None
                    yield outputs
                else:
                    await happened.wait()
                    happened.clear()
        finally:
            stream.notify(None)
        self.raise_error()

    def read_text(self, timeout: float | None = None) -> str:
        """More text of the first sequence, waited for: whole characters, nothing of a stop string; "" at the end.

        It takes what `read` would return. Raises TimeoutError after `timeout` seconds, `error` at the end.
        """
        text = self._text
        shown = len(text.text)
        while len(text.text) == shown:
            if not self.can_read():
                self.drive()
            outputs = self._stream.read(timeout)
            if outputs is None:
                self.raise_error()
                return ""
            for token in outputs[0].generated_ids if 0 in outputs else ():
                text.add(token)
            final = self._final_text()
            if final is not None and outputs[0].finish_reason.name != "NONE":
                text.text = final
        return text.text[shown:]

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end; False after `timeout` seconds."""
        self.drive()
        return self._stream.wait_done(timeout)

    def wait_change(self, seen: int = 0) -> int:
        """Wait until something has happened since the call that returned `seen`; also a step of reading the prompt."""
        self.drive()
        return self._stream.wait_change(seen)

    def on_change(self, callback: Callable[[], None]) -> None:
        """Have `callback` called when there is something to read or the request has ended, and now if there is already.

        The engine's thread calls it and waits for it: it must be quick, and must not raise.
        """
        self._stream.notify(callback)
        self.drive()
