"""One request and its sequences: everything that belongs to it lives here and dies with it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.core.outputs import GenerationOutput, RequestStats
from ov_kvcrush.core.sampling_params import SamplingParams
from ov_kvcrush.core.stop_strings import StopStringTracker
from ov_kvcrush.kvcache.block_pool import BlockTable
from ov_kvcrush.kvcache.eviction import EvictionSpec, EvictionState, PerHead
from ov_kvcrush.pipelines.backend import DEFAULT_CACHE_PARAMS, CacheParams
from ov_kvcrush.utils.checks import check_choice, check_integer

if TYPE_CHECKING:
    from ov_kvcrush.core.snapshot import KVSnapshot
    from ov_kvcrush.engine.takers import FanOutTarget
    from ov_kvcrush.kvcache.replay import ReplayState

FinishReason = ov_genai.GenerationFinishReason
Status = ov_genai.GenerationStatus


# [layer][KV head] float32 (G query heads of the KV head, S cached tokens)
AttentionScores = list[list[np.ndarray]]
REDUCTIONS = {"mean": 1, "max": 2, "sum_squares": 3}  # codes of native/src/attention.hpp
_MAX_CAPTURED_ROWS = 65536  # of the store


@dataclass(frozen=True)
class ScoreWindow:
    """Attention that the last `rows` tokens of a prompt pay to every token, per query head, reduced over those rows.

    reduce: "mean", "max" or "sum_squares". Raises CrushError for anything else.
    """

    rows: int
    reduce: str = "mean"

    def __post_init__(self) -> None:
        check_integer("rows", self.rows, 1)
        check_choice("reduce", self.reduce, REDUCTIONS)


def _no_decoder(ids: list[int]) -> str:
    raise AssertionError("a request with stop strings needs a decoder")


class TokenIds:
    """Prompt and generated tokens of a sequence in one int64 array that grows in place."""

    def __init__(self, prompt: np.ndarray, capacity: int) -> None:
        self._ids = np.empty(max(capacity, len(prompt) + 1), np.int64)
        self._ids[: len(prompt)] = prompt
        self._length = len(prompt)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> np.ndarray:
        return self._ids[: self._length][part]

    def append(self, token: int) -> None:
        """Add one token."""
        if self._length == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
        self._ids[self._length] = token
        self._length += 1

    def copy(self) -> TokenIds:
        """An independent copy."""
        return TokenIds(self[:], len(self._ids))


class Sequence:
    """One growing line of tokens with its KV.

    num_cached tokens, counted from the start, have their KV in memory; the others are still to be run.
    position_offset: what is added to a token's number for its position.
    The next ones are the memory's: blocks hold the KV of a sequence (or stage that of a prompt), `stored` is its place
    in the store, `free_slots` tokens can be appended there as it is, `kept` is what policies left of it, `replay` is
    there while its prompt is read a second time. held_logits: of the prompt's last token meanwhile.
    reads_for: whose prompt this one reads a second time.
    """

    def __init__(self, request: Request, index: int, ids: TokenIds) -> None:
        self.request = request
        self.index = index
        self.ids = ids
        self.num_cached = 0
        self.blocks = BlockTable()
        self.stored: int | None = None
        self.free_slots = 0
        self.kept = EvictionState()
        self.replay: ReplayState | None = None
        self.held_logits: np.ndarray | None = None
        self.reads_for: Sequence | None = None
        self.position_offset = 0
        self.logprobs: list[float] = []
        self.cumulative_logprob = 0.0
        self.finish_reason = FinishReason.NONE
        self.final_ids: list[int] | None = None  # set at the end: without the tokens of a stop string
        self.final_kept: EvictionState | None = None  # set at the end: `kept` before the memory forgets it
        self.final_text: str | None = None  # set at the end by a stop string, which may cut inside a token
        self.token_times: list[float] = []
        tracked = request.params.stop_strings
        self.stop_tracker = StopStringTracker(tracked, request.decode) if tracked else None

    def fork(self, index: int) -> Sequence:
        """A sequence with the same tokens; the caller shares the blocks. Only before the first token is generated."""
        assert not self.num_generated, "fork() after the first generated token"
        twin = Sequence(self.request, index, self.ids.copy())
        twin.num_cached = self.num_cached
        return twin

    def reduction_of(self, samples: bool) -> int:
        """Code of the reduction if attention scores are wanted of rows that sample, or do not; else 0."""
        return self.request.reduction_of(samples)

    def take_scores(self, scores: AttentionScores) -> None:
        """Called with the scores that were asked for."""
        self.request.attention_scores = scores

    @property
    def samples(self) -> bool:
        """Whether its last pending row is to give a token."""
        return not self.request.prefill_only

    @property
    def num_pending(self) -> int:
        """Tokens without KV: 1 while decoding, more for a prompt."""
        return len(self.ids) - self.num_cached

    @property
    def num_generated(self) -> int:
        """Tokens after the prompt."""
        return len(self.ids) - self.request.num_prompt_tokens

    @property
    def left(self) -> EvictionState:
        """What policies left of its cache; after its end, had left then."""
        return self.kept if self.final_kept is None else self.final_kept

    @property
    def generated(self) -> np.ndarray:
        """int64 (num_generated,), a view."""
        return self.ids[self.request.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        """Whether no token will follow."""
        return self.finish_reason != FinishReason.NONE


class Request:
    """A prompt, how to sample it, and the sequences that grow from it.

    ids: int64 (S,), checked by the engine before.
    decode: tokens -> text, needed for stop strings only.
    """

    def __init__(
        self,
        request_id: int,
        ids: np.ndarray,
        params: SamplingParams,
        decode: Callable[[list[int]], str] = _no_decoder,
        keep_kv: bool = False,
        score_window: ScoreWindow | None = None,
        eviction: EvictionSpec | None = None,
        cache: CacheParams = DEFAULT_CACHE_PARAMS,
        takers: tuple[FanOutTarget, ...] = (),
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.decode = decode
        self.keep_kv = keep_kv  # leave the KV in the prefix cache at the end, for the next turn
        self.num_prompt_tokens = len(ids)
        self.num_reused_tokens = 0
        self.peak_kv_bytes = 0
        self.score_window = score_window
        self.eviction = eviction
        self.context = cache.context
        self.holds = (cache.hold or cache.prefill_only) and not takers
        self.prefill_only = cache.prefill_only
        self.held: KVSnapshot | None = None
        self.takers = takers  # of its prompt, when it is read; nothing is left of it then
        self.held_others: list[KVSnapshot] = []
        self.attention_scores: AttentionScores | None = None  # when the prompt is complete, if a window was asked for
        self.status = Status.RUNNING
        self.arrival = time.perf_counter()
        first = Sequence(self, 0, TokenIds(ids, len(ids) + min(params.max_new_tokens, 4096)))
        self.sequences = [first]
        # Written by any thread, acted on by the engine between two steps.
        self.abort_reason: tuple[ov_genai.GenerationStatus, ov_genai.GenerationFinishReason] | None = None

    @property
    def evictions(self) -> list[EvictionSpec]:
        """What it and the takers of its prompt want, as far as that is not all tokens."""
        return [x for x in (self.eviction, *(taker.eviction for taker in self.takers)) if x]

    @property
    def captured_rows(self) -> int:
        """Query rows to be captured while the request runs. A wider window sees fewer, as in a shorter text."""
        asked = self.score_window.rows if self.score_window else 0
        windows = [eviction.window for eviction in self.evictions]
        return min(max([asked, *windows]), _MAX_CAPTURED_ROWS)

    @property
    def replayer(self) -> EvictionSpec | None:
        """Of what the request and its takers want, the first that has the prompt read twice."""
        num_tokens = self.num_prompt_tokens
        wanting = [x for x in self.evictions if x.num_read_again(num_tokens)]
        return wanting[0] if wanting else None

    def reduction_of(self, samples: bool) -> int:
        """Code of the reduction if rows that sample complete the prompt and scores are wanted of it, else 0."""
        if self.score_window is None or not samples or self.sequences[0].num_generated:
            return 0
        return REDUCTIONS[self.score_window.reduce]

    @property
    def progress(self) -> tuple[int, int]:
        """Tokens of the prompt that were read, and all of them; those of a second reading count again."""
        first = self.sequences[0]
        num_again = self.replayer.num_read_again(self.num_prompt_tokens) if self.replayer else 0
        num_read = min(first.num_cached, self.num_prompt_tokens)
        if num_read == self.num_prompt_tokens:
            done, total = first.replay.progress if first.replay else (1, 1)
            num_read += num_again * done // total
        return num_read, self.num_prompt_tokens + num_again

    @property
    def prompt_ids(self) -> np.ndarray:
        """int64 (num_prompt_tokens,), a view."""
        return self.sequences[0].ids[: self.num_prompt_tokens]

    @property
    def is_finished(self) -> bool:
        """Whether every sequence has ended."""
        return self.status != Status.RUNNING


class GenerationHandle:
    """The caller's side of a request: read what has been generated, stop it, or cancel it; from any thread."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._lock = threading.Lock()
        self._new: deque[dict[int, GenerationOutput]] = deque()

    @property
    def request_id(self) -> int:
        """The id given to `add_request`."""
        return self._request.request_id

    def get_status(self) -> ov_genai.GenerationStatus:
        """RUNNING, FINISHED, STOP or CANCEL."""
        return self._request.status

    def can_read(self) -> bool:
        """Whether `read` would return tokens that were not read before."""
        return bool(self._new)

    def read(self) -> dict[int, GenerationOutput]:
        """Tokens of the oldest unread step, by sequence index. Raises IndexError if there are none."""
        with self._lock:
            return self._new.popleft()

    def read_all(self) -> list[GenerationOutput]:
        """Everything generated so far: one output for each sequence, in their order."""
        return [whole_output(s) for s in self._request.sequences]

    @property
    def attention_scores(self) -> AttentionScores | None:
        """Of the prompt, if a score window was asked for and the prompt is complete."""
        return self._request.attention_scores

    @property
    def kept_positions(self) -> PerHead | None:
        """[layer][KV head] int32, ascending: places in the text whose KV the first sequence holds, or held at its end.

        None if no policy has chosen: all of them.
        """
        first = self._request.sequences[0]
        return first.left.positions_of(first.num_cached)

    @property
    def representative_positions(self) -> PerHead | None:
        """Of these, the ones that the last choice kept for others that are like them; None if its policy knows none."""
        return self._request.sequences[0].left.representatives

    @property
    def held(self) -> KVSnapshot | None:
        """The KV of a request that has ended and was told to hold it: the reader's to give back."""
        return self._request.held

    @property
    def held_others(self) -> list[KVSnapshot]:
        """The KV that each of the other policies chose, in their order: the reader's to give back."""
        return self._request.held_others

    @property
    def progress(self) -> tuple[int, int]:
        """Tokens of the prompt that were read, and all of them; both readings where a policy wants two."""
        return self._request.progress

    def stop(self, finish_reason: ov_genai.GenerationFinishReason = FinishReason.STOP) -> None:
        """End the request after the running step; what was generated counts as the answer."""
        self._request.abort_reason = (Status.STOP, finish_reason)

    def cancel(self) -> None:
        """End the request after the running step; what was generated does not count, and its KV is not kept."""
        self._request.abort_reason = (Status.CANCEL, FinishReason.STOP)

    def get_stats(self) -> RequestStats:
        """Token counts, moments and bytes of the request so far."""
        request = self._request
        first = request.sequences[0]
        return RequestStats(
            num_input_tokens=request.num_prompt_tokens,
            num_reused_tokens=request.num_reused_tokens,
            arrival=request.arrival,
            token_times=[s.token_times for s in request.sequences],
            kv_bytes=request.peak_kv_bytes,
            kept_tokens=first.num_cached - first.left.num_evicted,
        )

    def push(self, outputs: dict[int, GenerationOutput]) -> None:
        """Called by the engine with the tokens of one step."""
        with self._lock:
            self._new.append(outputs)


def whole_output(sequence: Sequence) -> GenerationOutput:
    """All tokens that `sequence` has generated so far; after its end those of its answer."""
    ids = sequence.final_ids if sequence.final_ids is not None else sequence.generated.tolist()
    return GenerationOutput(
        ids, sequence.logprobs[: len(ids)], sequence.cumulative_logprob, sequence.finish_reason, sequence.final_text
    )
