"""One request and its sequences: what it is told, the tokens so far, and how it ends."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.core.cache_params import DEFAULT_CACHE_PARAMS, CacheParams, KVTarget
from ov_kvcrush.core.eviction import EvictionSpec, EvictionState
from ov_kvcrush.core.grammar import TokenGrammar
from ov_kvcrush.core.growable import GrowableArray
from ov_kvcrush.core.lookahead_params import LookaheadParams
from ov_kvcrush.core.request_options import DEFAULT_REQUEST_OPTIONS, RequestOptions
from ov_kvcrush.core.sampling_params import SamplingParams
from ov_kvcrush.core.snapshot import KVSnapshot
from ov_kvcrush.core.staged_prompt import StagedPrompt
from ov_kvcrush.core.stop_strings import StopStringTracker
from ov_kvcrush.core.streamed_request import Status, StreamedRequest
from ov_kvcrush.core.token_counts import TokenCounts
from ov_kvcrush.model.adapters import NO_ADAPTERS, AdapterParams
from ov_kvcrush.policies.plans.plan import CachePlan

FinishReason = ov_genai.GenerationFinishReason

_MAX_CAPTURED_ROWS = 65536  # of the store
MAX_DRAFT_TOKENS = 7  # of a sequence in a step: products and attention are made for eight rows


def _no_decoder(ids: list[int]) -> str:
    raise AssertionError("a request with stop strings needs a decoder")


class Sequence:
    """One growing line of tokens. Its KV is the cache manager's.

    ids: int64, prompt and generated tokens. num_cached: how many of them, from the start, have KV; the others are still
    to be run. position_offset: added to a token's index for its position. replays: the sequence whose prompt this one
    reads a second time. held_logits: of its last token, while the prompt is read a second time or other beams are to
    come.
    score_reduction: how attention scores of its rows are reduced, 0 = none are computed. top_logprobs: {token: log
    probability} of the most probable ones for each generated token, empty if they are not asked for. token_counts: for
    penalties, None before the first one. grammar: what its tokens follow, None = anything.
    num_pushed: generated tokens that were handed out. lacks_memory: it has waited for memory, num_passed others got
    some meanwhile. error: what broke it.
    final_*: set at the end.
    """

    score_reduction = 0

    def __init__(self, request: Request, index: int, ids: GrowableArray) -> None:
        self.request = request
        self.index = index
        self.ids = ids
        self.num_cached = 0
        self.position_offset = 0
        self.replays: Sequence | None = None
        self.held_logits: np.ndarray | None = None
        self.logprobs: list[float] = []
        self.top_logprobs: list[dict[int, float]] = []
        self.token_counts: TokenCounts | None = None
        self.grammar: TokenGrammar | None = None
        self.cumulative_logprob = 0.0
        self.num_pushed = 0
        self.lacks_memory = False
        self.num_passed = 0
        self.last_scheduled = 0
        self.finish_reason = FinishReason.NONE
        self.error: Exception | None = None
        self.final_ids: list[int] | None = None  # without the tokens of a stop string
        self.final_state: EvictionState | None = None
        self.final_text: str | None = None  # by a stop string, which may cut inside a token
        self.token_times: list[float] = []
        tracked = request.params.stop_strings
        self.stop_tracker = StopStringTracker(tracked, request.decode) if tracked else None

    def fork(self, index: int) -> Sequence:
        """A sequence with the same tokens; the caller shares the KV."""
        twin = Sequence(self.request, index, self.ids.copy())
        twin.num_cached = self.num_cached
        twin.logprobs, twin.cumulative_logprob = self.logprobs.copy(), self.cumulative_logprob
        twin.top_logprobs, twin.token_times = self.top_logprobs.copy(), self.token_times.copy()
        twin.token_counts = self.token_counts.copy() if self.token_counts else None
        twin.grammar = self.grammar.fork() if self.grammar else None
        twin.stop_tracker = self.stop_tracker.copy() if self.stop_tracker else None
        return twin

    @property
    def samples(self) -> bool:
        """Whether the last of its pending tokens is to give a new one."""
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
    def generated(self) -> np.ndarray:
        """int64 (num_generated,), a view."""
        return self.ids[self.request.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        """Whether no token will follow."""
        return self.finish_reason != FinishReason.NONE

    @property
    def told_reason(self) -> ov_genai.GenerationFinishReason:
        """`finish_reason` as callers read it: a cancelled answer has none."""
        return FinishReason.NONE if self.request.is_cancelled else self.finish_reason


class Request(StreamedRequest):
    """A prompt, how to sample it, and the sequences that grow from it.

    ids: int64 (S,), checked by the engine before. decode: tokens -> text, for stop strings only. keep_kv: leave the KV
    in the prefix cache at the end. eviction: None = all tokens stay as they are. fan_out: caches to be made from its
    prefill, each with its eviction and its target; nothing is left of the request itself then. staged: what it left on
    staging blocks. lookahead: how tokens are guessed, None = not at all. num_drafted, num_accepted: guessed tokens that
    were run, and those that were right. adapters: that its rows run with. root: the sequence that
    reads the prompt, from which all others fork; it is the first of them but in a beam search.
    """

    def __init__(
        self,
        request_id: int,
        ids: np.ndarray,
        params: SamplingParams,
        decode: Callable[[list[int]], str] = _no_decoder,
        keep_kv: bool = False,
        eviction: EvictionSpec | None = None,
        cache: CacheParams = DEFAULT_CACHE_PARAMS,
        fan_out: tuple[tuple[EvictionSpec | None, KVTarget], ...] = (),
        options: RequestOptions = DEFAULT_REQUEST_OPTIONS,
        lookahead: LookaheadParams | None = None,
        adapters: AdapterParams = NO_ADAPTERS,
    ) -> None:
        super().__init__(request_id, options)
        self.lookahead = lookahead
        self.num_drafted = self.num_accepted = 0
        self.params = params
        self.decode = decode
        self.keep_kv = keep_kv
        self.num_prompt_tokens = len(ids)
        self.num_reused_tokens = 0
        self.peak_kv_bytes = 0
        self.eviction = eviction
        self.context = cache.context
        self.adapters = adapters
        # Keys and values of other adapters are others: they share no prefix.
        self.cache_salt = f"{cache.cache_salt}\0{adapters.key}" if adapters.key else cache.cache_salt
        self.prefill_only = cache.prefill_only
        self.returns_staged = cache.return_staged
        self.staged: StagedPrompt | None = None
        self.staged_prefix = cache.staged
        self.returns_snapshot = (cache.return_snapshot or cache.prefill_only) and not (fan_out or cache.return_staged)
        self.snapshot: KVSnapshot | None = None
        self.fan_out = fan_out
        self.fan_out_snapshots: list[KVSnapshot] = []
        self.readings: list[tuple[int, int]] = []  # of prefill_only: tokens that were read after each step, and all
        capacity = len(ids) + min(params.max_new_tokens, 4096)
        self.root = Sequence(self, 0, GrowableArray(np.int64, ids, capacity))
        self.sequences = [self.root]
        # Written by any thread, acted on by the engine between two steps.
        self.abort_reason: tuple[ov_genai.GenerationStatus, ov_genai.GenerationFinishReason] | None = None

    @property
    def is_cancelled(self) -> bool:
        """Whether its caller has cancelled it before its end."""
        told = self.abort_reason is not None and self.abort_reason[0] == Status.CANCEL
        return told and self.status in (Status.RUNNING, Status.CANCEL)

    @property
    def num_to_fork(self) -> int:
        """Sequences that it will have beside those it has."""
        return max(self.params.num_sequences - len(self.sequences), 0)

    @property
    def plan(self) -> CachePlan | None:
        """How many tokens each head keeps, at which precision; None = the cache's precisions."""
        return self.eviction.plan if self.eviction else None

    @property
    def evictions(self) -> list[EvictionSpec]:
        """Its own eviction and those of its fan-out."""
        return [x for x in (self.eviction, *(eviction for eviction, _ in self.fan_out)) if x]

    @property
    def captured_rows(self) -> int:
        """Query rows to be captured while the request runs. A wider window sees fewer, as in a shorter text.

        Rows that are taken back have overwritten older ones: there are as many more.
        """
        window = max((eviction.window for eviction in self.evictions), default=0)
        spare = MAX_DRAFT_TOKENS if window and self.lookahead else 0
        return min(window + spare, _MAX_CAPTURED_ROWS)

    @property
    def replayer(self) -> EvictionSpec | None:
        """The first of its evictions that has the prompt read twice."""
        return next((x for x in self.evictions if x.num_read_again(self.num_prompt_tokens)), None)

    @property
    def prompt_ids(self) -> np.ndarray:
        """int64 (num_prompt_tokens,), a view."""
        return self.root.ids[: self.num_prompt_tokens]
