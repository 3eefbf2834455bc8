"""The caller's side of a request."""

from __future__ import annotations

import threading
import weakref
from collections import deque

import openvino_genai as ov_genai

from ov_kvcrush.core.eviction import EvictionState, PerHead
from ov_kvcrush.core.outputs import GenerationOutput, RequestStats
from ov_kvcrush.core.request import FinishReason, Request, Sequence, Status
from ov_kvcrush.core.snapshot import KVSnapshot
from ov_kvcrush.kvcache.manager import KVCacheManager


class GenerationHandle:
    """The caller's side of a request: read what has been generated, stop it, or cancel it; from any thread."""

    def __init__(self, request: Request, cache: KVCacheManager) -> None:
        self.request = request
        self._cache = weakref.ref(cache)  # a handle that is kept keeps no cache alive
        self._lock = threading.Lock()
        self._new: deque[dict[int, GenerationOutput]] = deque()

    @property
    def request_id(self) -> int:
        """The id given to `add_request`."""
        return self.request.request_id

    def get_status(self) -> ov_genai.GenerationStatus:
        """RUNNING, FINISHED, STOP or CANCEL."""
        return self.request.status

    def can_read(self) -> bool:
        """Whether `read` would return tokens that were not read before."""
        return bool(self._new)

    def read(self) -> dict[int, GenerationOutput]:
        """Tokens of the oldest unread step, by sequence index. Raises IndexError if there are none."""
        with self._lock:
            return self._new.popleft()

    def read_all(self) -> list[GenerationOutput]:
        """Everything generated so far: one output for each sequence, in their order."""
        return [whole_output(s) for s in self.request.sequences]

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
    def progress(self) -> tuple[int, int]:
        """Tokens of the prompt that were read, and all of them; those of a second reading count again."""
        request = self.request
        first, replayer = request.sequences[0], request.replayer
        num_again = replayer.num_read_again(request.num_prompt_tokens) if replayer else 0
        num_read = min(first.num_cached, request.num_prompt_tokens)
        if num_read == request.num_prompt_tokens:
            cache = self._cache()
            replay = cache.replay(first) if cache else None
            done, total = replay.progress if replay else (1, 1)
            num_read += num_again * done // total
        return num_read, request.num_prompt_tokens + num_again

    def _state(self) -> EvictionState:
        first = self.request.sequences[0]
        cache = self._cache()
        state = cache.eviction_state(first) if cache else EvictionState()  # before it may end in another thread
        return state if first.final_state is None else first.final_state

    def stop(self, finish_reason: ov_genai.GenerationFinishReason = FinishReason.STOP) -> None:
        """End the request after the running step; what was generated counts as the answer."""
        self.request.abort_reason = (Status.STOP, finish_reason)

    def cancel(self) -> None:
        """End the request after the running step; what was generated does not count, and its KV is not kept."""
        self.request.abort_reason = (Status.CANCEL, FinishReason.STOP)

    def get_stats(self) -> RequestStats:
        """Token counts, moments and bytes of the request so far."""
        request = self.request
        first = request.sequences[0]
        return RequestStats(
            num_input_tokens=request.num_prompt_tokens,
            num_reused_tokens=request.num_reused_tokens,
            arrival=request.arrival,
            token_times=[s.token_times for s in request.sequences],
            kv_bytes=request.peak_kv_bytes,
            kept_tokens=first.num_cached - self._state().num_evicted,
        )

    def push(self, outputs: dict[int, GenerationOutput]) -> None:
        """Called by the engine with the tokens of one step."""
        with self._lock:
            self._new.append(outputs)


def whole_output(sequence: Sequence) -> GenerationOutput:
    """All tokens that `sequence` has generated so far; after its end those of its answer."""
    ids = sequence.final_ids if sequence.final_ids is not None else sequence.generated.tolist()
    return GenerationOutput(
        ids,
        sequence.logprobs[: len(ids)],
        sequence.cumulative_logprob,
        sequence.finish_reason,
        sequence.final_text,
        sequence.top_logprobs[: len(ids)] if sequence.request.params.logprobs > 1 else None,
    )
