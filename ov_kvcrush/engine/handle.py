"""The caller's side of a request."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import openvino_genai as ov_genai

from ov_kvcrush.core.engine_thread import EngineThread
from ov_kvcrush.core.eviction import EvictionState, PerHead
from ov_kvcrush.core.outputs import GenerationOutput, RequestStats
from ov_kvcrush.core.reading import Readable
from ov_kvcrush.core.request import FinishReason, Request, Sequence
from ov_kvcrush.core.snapshot import KVSnapshot
from ov_kvcrush.core.staged_prompt import StagedPrompt
from ov_kvcrush.core.streamed_request import Status
from ov_kvcrush.kvcache.manager import KVCacheManager


class GenerationHandle(Readable):
    """The caller's side of a request: read what has been generated, stop it, or cancel it; from any thread.

    A request runs while its handle is held. Who adds requests to a ContinuousBatchingPipeline may move all of them on
    with `step`; whoever waits for one, by `read`, `wait` or iterating, has the engine do so by itself from then on.
    """

    request: Request

    def __init__(self, request: Request, cache: KVCacheManager, thread: EngineThread) -> None:
        super().__init__(request, thread, request.decode)
        self._cache = weakref.ref(cache)  # a handle that is kept keeps no cache alive

    def outputs(self) -> list[GenerationOutput]:
        """Everything generated so far: one output for each sequence, in their order. Waits for nothing."""
        return [whole_output(s) for s in self.request.sequences]

    def _final_text(self) -> str | None:
        return self.request.sequences[0].final_text

    # -- ending --------------------------------------------------------------------------------------------------------

    def stop(self, finish_reason: ov_genai.GenerationFinishReason = FinishReason.STOP) -> None:
        """End the request after the running step; what was generated counts as the answer."""
        self._end(Status.STOP, finish_reason)

    def cancel(self) -> None:
        """End the request after the running step; what was generated does not count, and its KV is not kept."""
        self._end(Status.CANCEL, FinishReason.STOP)

    def end_at(self, num_tokens: int, *, is_cancelled: bool) -> None:
        """As of Readable; of a request that had ended, nothing is handed out."""
        super().end_at(num_tokens, is_cancelled=is_cancelled)
        if is_cancelled and self.request.snapshot is not None:
            self.request.snapshot.release()
            self.request.snapshot = None

    @property
    def was_told_to_end(self) -> bool:
        """Whether it was stopped or cancelled, in time or not."""
        return self.request.abort_reason is not None

    def _end(self, status: ov_genai.GenerationStatus, reason: ov_genai.GenerationFinishReason) -> None:
        if self.request.abort_reason is None or status == Status.CANCEL:
            self.request.abort_reason = (status, reason)
            self._thread.wake()

    # -- figures -------------------------------------------------------------------------------------------------------

    @property
    def kept_positions(self) -> PerHead | None:
        """[layer][KV head] int32, ascending: places in the text whose KV the first sequence holds, or held at its end.

        None if no policy has chosen: all of them.
        """
        state = self._state()
        return state.positions_of(self.request.sequences[0].num_cached)

    @property
    def representative_positions(self) -> PerHead | None:
        """Of these, the ones that the last choice kept for others that are like them; None if its policy knows none."""
        return self._state().representatives

    @property
    def snapshot(self) -> KVSnapshot | None:
        """The KV of a request that has ended and was told to return it; the reader releases it."""
        return self.request.snapshot

    @property
    def fan_out_snapshots(self) -> list[KVSnapshot]:
        """The caches made from its prefill, in the order of `CacheParams.fan_out`; the reader releases them."""
        return self.request.fan_out_snapshots

    @property
    def staged(self) -> StagedPrompt | None:
        """The prompt on its staging blocks, of a request that was told to leave it there; the reader releases it."""
        return self.request.staged

    def readings(self) -> Iterator[tuple[int, int]]:
        """After each step of reading the prompt: tokens that were read, and all; those of a second reading count again.

        To the end of the request. Of prompts that are only read.
        """
        seen = num_shown = 0
        is_done = False
        while not is_done:
            seen, is_done = self.wait_change(seen), self.request.stream.is_done
            new = self.request.readings[num_shown:]
            num_shown += len(new)
            yield from new

    def _state(self) -> EvictionState:
        first = self.request.sequences[0]
        cache = self._cache()
        state = cache.eviction_state(first) if cache else EvictionState()  # before it may end in another thread
        return state if first.final_state is None else first.final_state

    def get_stats(self) -> RequestStats:
        """Token counts, moments and bytes of the request so far."""
        request = self.request
        first = request.sequences[0]
        is_search = request.params.beam is not None
        return RequestStats(
            num_input_tokens=request.num_prompt_tokens,
            num_reused_tokens=request.num_reused_tokens,
            arrival=request.arrival,
            token_times=[s.token_times for s in ([request.root] if is_search else request.sequences)],
            kv_bytes=request.peak_kv_bytes,
            kept_tokens=first.num_cached - self._state().num_evicted,
            plan=request.plan,
            steps=request.steps,
            counts_steps=is_search,
            num_drafted=request.num_drafted,
            num_accepted=request.num_accepted,
        )


def whole_output(sequence: Sequence) -> GenerationOutput:
    """All tokens that `sequence` has generated so far; after its end those of its answer."""
    ids = sequence.final_ids if sequence.final_ids is not None else sequence.generated.tolist()
    tops = sequence.top_logprobs[: len(ids)] if sequence.request.params.logprobs > 1 else None
    score, reason, text = sequence.cumulative_logprob, sequence.told_reason, sequence.final_text
    whole = GenerationOutput(ids, sequence.logprobs[: len(ids)], score, reason, text, tops)
    max_read = sequence.request.max_read
    return whole.up_to(max_read) if sequence.index == 0 or max_read == 0 else whole
