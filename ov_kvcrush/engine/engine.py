"""The engine: requests go in, `step` runs one inference for many of them, tokens come out of their handles."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.config import CacheConfig, SchedulerConfig
from ov_kvcrush.core.outputs import GenerationOutput, PipelineMetrics, StepSeconds
from ov_kvcrush.core.request import FinishReason, GenerationHandle, Request, ScoreWindow, Sequence, Status
from ov_kvcrush.core.sampling_params import SamplingParams, refuse_unsupported
from ov_kvcrush.core.snapshot import KVSnapshot
from ov_kvcrush.engine.model_runner import ModelRunner
from ov_kvcrush.engine.output_processor import finish_reason, settle_answer
from ov_kvcrush.engine.sampler import sample
from ov_kvcrush.engine.scheduler import Scheduler, SchedulerOutput
from ov_kvcrush.engine.step_lock import StepLock
from ov_kvcrush.engine.takers import FanOutTarget, takers_of
from ov_kvcrush.errors import RequestError
from ov_kvcrush.kvcache.eviction import EvictionSpec, check_spans
from ov_kvcrush.kvcache.factory import make_kv_cache_manager
from ov_kvcrush.kvcache.manager import KVCacheManager
from ov_kvcrush.model.load import LoadedModel
from ov_kvcrush.pipelines.backend import DEFAULT_CACHE_PARAMS, CacheParams, FanOut, SnapshotArrays
from ov_kvcrush.policies.base import Policy
from ov_kvcrush.policies.registry import name_of

_log = logging.getLogger(__name__)

Decode = Callable[[list[int]], str]


class Engine:
    """Continuous batching over one compiled model.

    `add` may be called from any thread and while a step runs; `step` from one thread at a time (a lock sees to it).
    beside: an engine on the same model, whose staging blocks this one shares; each has its own store and requests, and
    may put what it reads into the other's store. Their steps take turns.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: SchedulerConfig,
        defaults: ov_genai.GenerationConfig,
        decode: Decode,
        cache_config: CacheConfig | None = None,
        beside: Engine | None = None,
    ) -> None:
        self._model = model
        self._config = config
        self._defaults = defaults  # the model's own: its end-of-sequence tokens hold where a request names none
        self._decode = decode  # token ids -> text, for stop strings
        cache_config = cache_config or CacheConfig()
        self._cache_config = cache_config
        self._policy = cache_config.eviction_policy
        self._turns: StepLock = beside._turns if beside else StepLock()
        self.memory: KVCacheManager = make_kv_cache_manager(
            model, config, cache_config, beside.memory if beside else None
        )
        self.scheduler = Scheduler(config, self.memory)
        self._runner = ModelRunner(model, self.memory)
        self._inbox: deque[GenerationHandle] = deque()
        self._dropped: deque[KVSnapshot] = deque()
        self._gone: weakref.WeakSet[KVSnapshot] = weakref.WeakSet()
        self._handles: dict[int, GenerationHandle] = {}
        self._lock = self._turns.lock
        self._add_lock = threading.Lock()
        self._num_steps = 0
        self._usage_sum = 0.0
        self._max_usage = 0.0
        self._policy_s = 0.0  # of all steps
        self._last_step = StepSeconds(0.0, 0.0, 0.0)
        self._turns.join(self)

    def make_beside(self, cache_config: CacheConfig) -> Engine:
        """Another engine on the same model and staging blocks. Raises as `make_kv_cache_manager` does."""
        return Engine(self._model, self._config, self._defaults, self._decode, cache_config, beside=self)

    def max_tokens(self, eviction: EvictionSpec | None, num_evicted: int = 0) -> int:
        """Tokens that prompt and answer of one sequence may have, by the model's context and by the cache's memory."""
        capacity = self.memory.capacity_tokens(eviction, num_evicted)
        return min(capacity, self._model.context_length or capacity)

    def process_aborts(self) -> None:
        """End the requests whose handles were told to stop or cancel, without running a step."""
        with self._lock:
            self._take_in()
            self._end_wanted()
            self._drop_all()

    def has_unfinished(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._handles)

    def metrics(self) -> PipelineMetrics:
        """Requests and cache usage after the last step."""
        use = self.memory.use()
        return PipelineMetrics(
            requests=len(self._handles),
            scheduled_requests=len({s.request.request_id for s in self.scheduler.running}),
            cache_usage=100 * use.used_bytes / use.capacity_bytes,
            max_cache_usage=self._max_usage,
            avg_cache_usage=self._usage_sum / max(self._num_steps, 1),
            kv_cache_size_in_bytes=use.used_bytes,
            cache_size_in_bytes=use.capacity_bytes,
            staging_size_in_bytes=use.staging_bytes,
            num_used_blocks=use.num_used_blocks,
            num_preemptions=self.scheduler.num_preemptions,
        )

    def last_step(self) -> StepSeconds:
        """What the last step took."""
        return self._last_step

    def check_prompt(
        self, ids: np.ndarray, eviction: EvictionSpec | None = None, begun: KVSnapshot | None = None
    ) -> np.ndarray:
        """Return the prompt as int64 (S,); raise RequestError if this model or this cache cannot run it.

        begun: the context that it goes on from.
        """
        ids = np.asarray(ids)
        if ids.size == 0:
            raise RequestError("prompt must have at least one token, got an empty one")
        if not np.issubdtype(ids.dtype, np.integer):
            raise RequestError(f"prompt must be integer token ids, got {ids.dtype}")
        ids = ids.reshape(-1).astype(np.int64)
        outside = ids[(ids < 0) | (ids >= self._model.vocab_size)]
        if len(outside):
            raise RequestError(f"token ids must be in 0..{self._model.vocab_size - 1}, got {outside[0]}")
        context = self._model.context_length
        if context is not None and len(ids) >= context:
            raise RequestError(
                f"prompt must be shorter than the model's context of {context} tokens, got {len(ids)} tokens"
            )
        num_known = begun.num_tokens if begun else 0
        if len(ids) <= num_known:
            raise RequestError("prompt must have at least one token behind its context, got none")
        refusal = self.memory.refusal(len(ids), eviction, begun.kept.num_evicted if begun else 0)
        if refusal:
            raise RequestError(refusal)
        limit = self._config.max_num_batched_tokens
        if not self._config.dynamic_split_fuse and len(ids) - num_known > limit:
            raise RequestError(
                f"prompt must have at most max_num_batched_tokens={limit} tokens with dynamic_split_fuse=False, "
                f"got {len(ids) - num_known}"
            )
        return ids

    def add(
        self,
        request_id: int,
        ids: np.ndarray,
        config: ov_genai.GenerationConfig,
        cache: CacheParams = DEFAULT_CACHE_PARAMS,
        score_window: ScoreWindow | None = None,
    ) -> GenerationHandle:
        """Check a request and queue it for the next step.

        score_window: asks for the attention of the prompt's last tokens, `GenerationHandle.attention_scores`.
        Raises RequestError; no other request is touched.
        """
        if (cache.context or cache.hold or cache.prefill_only) and not self.memory.can_evict:
            raise RequestError("context must not be asked for with attention='paged', got one; engine='crush' holds it")
        eviction = self._eviction(cache, np.size(ids))
        num_evicted = cache.context.kept.num_evicted if cache.context else 0
        ids = self.check_prompt(ids, eviction, cache.context)
        check_spans(cache.protect, len(ids))
        if eviction:
            eviction.check(len(ids))
        eviction = _with_system(eviction, cache)
        refuse_unsupported(config)
        params = SamplingParams.from_config(config, self._defaults, len(ids), self.max_tokens(eviction, num_evicted))
        if score_window and not self._model.has_scores:
            raise RequestError("score_window must be None with attention='paged', which has no scores per head")
        # What goes on from a context is not what its own policy would have left of the prompt.
        keep_kv = (cache.keep_kv or self._config.enable_prefix_caching) and cache.context is None and not cache.others
        takers = takers_of(cache, len(ids), self.memory, lambda other: self._taker(other, cache, ids))
        request = Request(request_id, ids, params, self._decode, keep_kv, score_window, eviction, cache, takers)
        handle = GenerationHandle(request)
        with self._add_lock:
            if request_id in self._handles:
                raise RequestError(f"request_id must differ from those of running requests, got {request_id} again")
            if cache.context is not None and cache.context in self._gone:
                raise RequestError("context must be open, got one that was closed")
            self._handles[request_id] = handle
            self._inbox.append(handle)
        return handle

    def _eviction(self, cache: CacheParams, num_tokens: int) -> EvictionSpec | None:
        """What a request with a prompt of `num_tokens` asks for, or the engine was told; None if all tokens stay."""
        policy = cache.policy or self._policy
        if policy is None or not policy.evicts:
            return None
        if not self.memory.can_evict:
            raise RequestError(f"policy must be 'none' with attention='paged', got {name_of(policy)!r}")
        held = cache.context
        if held is None:
            return EvictionSpec(policy, cache.protect, cache.words, num_tokens)
        begun = held.num_kept - held.base_kept
        return EvictionSpec(policy, cache.protect, cache.words, num_tokens, held.base, held.base_kept, begun)

    def step(self) -> None:
        """Run one inference for as many rows as the plan holds; hand their tokens to the handles.

        Where they wait for staging blocks that an engine beside this one holds, that one's requests move on instead.
        If anything breaks, the requests of the step end and give their memory back before the error goes on.
        """
        with self._lock:
            start = time.perf_counter()
            self._drop()
            self._take_in()
            self._end_wanted()
            self._turns.is_stepping = True
            try:
                plan = self.scheduler.plan()
            except BaseException:  # whose fault it is cannot be told
                self._turns.is_stepping = False
                self._abort({s.request for s in (*self.scheduler.running, *self.scheduler.waiting)})
                raise
            try:
                self._run(plan, start)
            except BaseException:
                self._abort({row.sequence.request for row in plan.rows})
                raise
            finally:
                self._turns.is_stepping = False
            self._drop_all()
            if self.scheduler.waiting and not plan.rows and not plan.out_of_memory:
                self._step_others()

    def _step_others(self) -> None:
        """Move on those that hold staging blocks: they have running sequences, so they do not come back here."""
        for engine in self._turns.engines():
            if engine is not self and engine.scheduler.running:
                engine.step()

    def drop_kept_kv(self) -> None:
        """Give back the KV that ended requests left for reuse."""
        with self._lock:
            self.memory.drop_kept()

    def drop_held(self, kv: KVSnapshot) -> None:
        """Give back KV that a request handed out; while a step runs or requests go on from it, after them.

        It may be called by the garbage collector in any thread, so it waits for nothing.
        """
        self._dropped.append(kv)
        # The collector may run inside a step of this very thread, whose lock it would get.
        if not self._turns.is_stepping and self._lock.acquire(blocking=False):
            try:
                self._drop()
            finally:
                self._lock.release()

    def _drop_all(self) -> None:
        """What could not be given back while the lock was held."""
        for engine in self._turns.engines():
            engine._drop()

    def _drop(self) -> None:
        if not self._add_lock.acquire(blocking=False):  # perhaps held by this very thread; the next step tries again
            return
        try:
            # Who goes on from it may lose its memory, and begins with it again.
            in_use = {handle._request.context for handle in self._handles.values()}
            for _ in range(len(self._dropped)):
                kv = self._dropped.popleft()
                if kv in in_use:
                    self._dropped.append(kv)
                else:
                    self._gone.add(kv)
                    self.memory.drop_held(kv)
        finally:
            self._add_lock.release()

    def share_held(self, kv: KVSnapshot) -> KVSnapshot:
        """The same KV for one more holder."""
        with self._lock:
            return self.memory.share_held(kv)

    def bytes_held(self, kv: KVSnapshot) -> int:
        """Its bytes, shared ones in full."""
        return self.memory.bytes_held(kv)

    def dump_held(self, kv: KVSnapshot) -> SnapshotArrays:
        """It as arrays, for a file."""
        return self.memory.dump_held(kv)

    def load_held(self, held: SnapshotArrays, policy: Policy | None, base: int, base_kept: int) -> KVSnapshot:
        """KV from arrays. Raises ContextFileError for what the store could not have made, OutOfMemory without room."""
        with self._lock:
            return self.memory.load_held(held, policy, base, base_kept)

    def storage(self) -> dict[str, str]:
        """How KV is stored, as far as files must agree in it."""
        config = self._cache_config
        return {
            "key_precision": config.key_precision,
            "value_precision": config.value_precision,
            "recent_precision": self._model.recent_precision,
            "recent_tokens": str(config.recent_tokens),
            "group_size": str(config.group_size),
        }

    def kv_heads(self) -> list[int]:
        """KV heads of each layer."""
        return [layer.num_kv_heads for layer in self._model.layers]

    def _take_in(self) -> None:
        while self._inbox:
            request = self._inbox.popleft()._request
            if not request.is_finished:  # cancelled before it was taken in
                self.scheduler.add(request.sequences[0])

    def _end_wanted(self) -> None:
        for handle in list(self._handles.values()):
            request = handle._request
            if request.abort_reason:
                status, reason = request.abort_reason
                for sequence in request.sequences:
                    if not sequence.is_finished:
                        self._finish(sequence, reason, keep=status != Status.CANCEL)
                self._end(request, status)

    def _run(self, plan: SchedulerOutput, start: float) -> None:
        for sequence in plan.out_of_memory:
            _log.warning(
                "request %d ends after %d tokens: the KV cache of %d tokens is full; give it more memory",
                sequence.request.request_id, len(sequence.ids), self.memory.capacity_tokens(sequence.request.eviction),
            )  # fmt: skip
            self._finish(sequence, FinishReason.LENGTH)
            self._end_if_complete(sequence.request)
        if not plan.rows:
            return
        self._runner.prepare(plan)
        infer_start = time.perf_counter()
        logits = self._runner.infer()
        infer_end = time.perf_counter()
        sampling_s = self._commit(plan, logits)
        self._measure(start, infer_start, infer_end, sampling_s)

    def _cache(self, plan: SchedulerOutput) -> None:
        """Note what is cached now, hand out attention scores, and let the memory settle."""
        for row in plan.rows:
            row.sequence.num_cached += row.num_tokens
        if any(row.sequence.reduction_of(row.samples) for row in plan.rows):
            for sequence, scores in self.memory.split_scores(plan.rows, self._runner.attention_scores()).items():
                sequence.take_scores(scores)
        for sequence in self.memory.commit(plan.rows):
            self._finish(sequence, FinishReason.LENGTH, keep=False)
            self._end_if_complete(sequence.request)

    def _commit(self, plan: SchedulerOutput, logits: np.ndarray) -> float:
        """Note what is cached now, choose tokens, end what is complete. Returns the seconds taken by sampling."""
        self._cache(plan)
        self._end_read(plan)
        start = time.perf_counter()
        now = start
        new: dict[Request, dict[int, GenerationOutput]] = {}
        for sequence, row_logits in self._due(plan, logits):
            for member in self._members(sequence):
                token, logprob = sample(row_logits, member)
                new.setdefault(member.request, {})[member.index] = self._accept(member, token, logprob, now)
        sampling_s = time.perf_counter() - start
        for request, outputs in new.items():
            self._handles[request.request_id].push(outputs)
            for index in outputs:
                if request.sequences[index].is_finished:
                    self._retire(request.sequences[index])
            self._end_if_complete(request)
        return sampling_s

    def _taker(self, other: FanOut, cache: CacheParams, ids: np.ndarray) -> FanOutTarget:
        home = self if other.home is None else other.home
        if not isinstance(home, Engine) or home._turns is not self._turns:
            raise RequestError("pipelines must be the one that reads or made by its beside(), got another")
        eviction = self._eviction(replace(cache, policy=other.policy), len(ids))
        if eviction:
            eviction.check(len(ids))
        home.check_prompt(ids, eviction)
        return FanOutTarget(_with_system(eviction, cache), home.memory)

    def _end_read(self, plan: SchedulerOutput) -> None:
        """End the requests that wanted nothing but their prompt read."""
        for row in plan.rows:
            sequence = row.sequence.reads_for or row.sequence
            is_read = not sequence.num_pending and not sequence.replay
            if sequence.request.prefill_only and is_read and not sequence.is_finished:
                self._finish(sequence, FinishReason.LENGTH)
                self._end_if_complete(sequence.request)

    def _due(self, plan: SchedulerOutput, logits: np.ndarray) -> Iterator[tuple[Sequence, np.ndarray]]:
        """Sequences that get a token now, with their logits. A prompt that is read twice waits with those it has."""
        logits_rows = iter(logits)
        for row in plan.rows:
            sequence = row.sequence.reads_for or row.sequence
            if row.samples:
                sequence.held_logits = next(logits_rows)
            held = sequence.held_logits
            if held is None or sequence.is_finished:  # its KV found no place
                continue
            if sequence.replay:
                sequence.held_logits = held.copy()
                continue
            sequence.held_logits = None
            yield sequence, held

    def _members(self, sequence: Sequence) -> list[Sequence]:
        """The sequences that take their next token from this row: all of a request's when its prompt is complete."""
        request = sequence.request
        wanted = request.params.num_return_sequences
        if sequence.num_generated == 0 and len(request.sequences) < wanted:
            request.sequences += [self.scheduler.fork(sequence, index) for index in range(1, wanted)]
            return request.sequences
        return [sequence]

    def _accept(self, sequence: Sequence, token: int, logprob: float, now: float) -> GenerationOutput:
        sequence.ids.append(token)
        sequence.token_times.append(now)
        sequence.logprobs.append(logprob)
        sequence.cumulative_logprob += logprob
        sequence.finish_reason = finish_reason(sequence, token)
        return GenerationOutput([token], [logprob], sequence.cumulative_logprob, sequence.finish_reason)

    def _finish(self, sequence: Sequence, reason: ov_genai.GenerationFinishReason, keep: bool = True) -> None:
        sequence.finish_reason = reason
        self._retire(sequence, keep)

    def _retire(self, sequence: Sequence, keep: bool = True) -> None:
        """Settle the answer of an ended sequence, keep its KV if the request wants that, give its blocks back."""
        settle_answer(sequence)
        request = sequence.request
        held = sum(self.memory.bytes_of(s) for s in request.sequences)
        request.peak_kv_bytes = max(request.peak_kv_bytes, held)
        if keep and request.keep_kv and sequence.index == 0:
            self.memory.keep(sequence)
        if keep and request.holds and sequence.index == 0:
            request.held = self.memory.hold(sequence)
        sequence.final_kept = sequence.kept
        self.scheduler.remove([sequence])

    def _end_if_complete(self, request: Request) -> None:
        if all(s.is_finished for s in request.sequences):
            self._end(request, Status.FINISHED)

    def _end(self, request: Request, status: ov_genai.GenerationStatus) -> None:
        request.status = status
        with self._add_lock:
            self._handles.pop(request.request_id, None)

    def _abort(self, requests: set[Request]) -> None:
        for request in requests:
            self.scheduler.remove(request.sequences)
            for sequence in request.sequences:
                if not sequence.is_finished:
                    sequence.finish_reason = FinishReason.STOP
            self._end(request, Status.CANCEL)

    def _measure(self, start: float, infer_start: float, infer_end: float, sampling_s: float) -> None:
        use = self.memory.use()
        usage = 100 * use.used_bytes / use.capacity_bytes
        self._num_steps += 1
        self._usage_sum += usage
        self._max_usage = max(self._max_usage, usage)
        inference = infer_end - infer_start
        policy_s, self._policy_s = self.memory.policy_seconds - self._policy_s, self.memory.policy_seconds
        self._last_step = StepSeconds(inference, sampling_s, time.perf_counter() - start - inference, policy_s)


def _with_system(eviction: EvictionSpec | None, cache: CacheParams) -> EvictionSpec | None:
    """The system prompt stays; it is not held against the budget that the caller chose."""
    if eviction is None or cache.system is None:
        return eviction
    return replace(eviction, spans=(*eviction.spans, cache.system))
