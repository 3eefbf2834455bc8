"""The engine: requests go in, `step` runs one inference for many of them, tokens come out of their handles."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.config import SchedulerConfig
from ov_kvcrush.engine.answer import finish_reason, settle_answer
from ov_kvcrush.engine.block_pool import BLOCK_SIZE, BlockPool, blocks_for
from ov_kvcrush.engine.kv_cache import KVCache
from ov_kvcrush.engine.prefix_cache import PrefixCache
from ov_kvcrush.engine.request import FinishReason, GenerationHandle, Request, Sequence, Status
from ov_kvcrush.engine.runner import Runner
from ov_kvcrush.engine.sampler import sample
from ov_kvcrush.engine.sampling_params import SamplingParams, refuse_unsupported
from ov_kvcrush.engine.scheduler import Scheduler, StepPlan
from ov_kvcrush.errors import RequestError
from ov_kvcrush.graph.load import LoadedModel
from ov_kvcrush.results import GenerationOutput, PipelineMetrics, StepSeconds

_log = logging.getLogger(__name__)

Decode = Callable[[list[int]], str]


class Engine:
    """Continuous batching over one compiled model.

    `add` may be called from any thread and while a step runs; `step` from one thread at a time (a lock sees to it).
    """

    def __init__(
        self, model: LoadedModel, config: SchedulerConfig, defaults: ov_genai.GenerationConfig, decode: Decode
    ) -> None:
        self._model = model
        self._config = config
        self._defaults = defaults  # the model's own: its end-of-sequence tokens hold where a request names none
        self._decode = decode  # token ids -> text, for stop strings
        self.cache = KVCache(model.compiled, config)
        self.pool = BlockPool(self.cache.num_blocks)
        # Without prefix caching only the conversation that runs keeps its KV between turns.
        self.prefixes = PrefixCache(self.pool, None if config.enable_prefix_caching else 1)
        self.scheduler = Scheduler(config, self.pool, self.prefixes)
        self._runner = Runner(model, self.cache)
        self._inbox: deque[GenerationHandle] = deque()
        self._handles: dict[int, GenerationHandle] = {}
        self._lock = threading.RLock()
        self._add_lock = threading.Lock()
        self._num_steps = 0
        self._usage_sum = 0.0
        self._max_usage = 0.0
        self._last_step = StepSeconds(0.0, 0.0, 0.0)

    @property
    def max_tokens(self) -> int:
        """Tokens that prompt and answer of one sequence may have, by the model's context and by the cache's memory."""
        memory = self.pool.num_blocks * BLOCK_SIZE
        return min(memory, self._model.context_length or memory)

    def end_wanted(self) -> None:
        """End the requests whose handles were told to stop or cancel, without running a step."""
        with self._lock:
            self._take_in()
            self._end_wanted()

    def has_unfinished(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._handles)

    def metrics(self) -> PipelineMetrics:
        """Requests and cache usage after the last step."""
        used, capacity = self.pool.num_used, self.pool.num_blocks
        return PipelineMetrics(
            requests=len(self._handles),
            scheduled_requests=len({s.request.request_id for s in self.scheduler.running}),
            cache_usage=100 * used / capacity,
            max_cache_usage=self._max_usage,
            avg_cache_usage=self._usage_sum / max(self._num_steps, 1),
            kv_cache_size_in_bytes=used * self.cache.bytes_per_block,
            cache_size_in_bytes=self.cache.capacity_bytes,
            num_used_blocks=used,
            num_preemptions=self.scheduler.num_preemptions,
        )

    def last_step(self) -> StepSeconds:
        """What the last step took."""
        return self._last_step

    def check_prompt(self, ids: np.ndarray) -> np.ndarray:
        """Return the prompt as int64 (S,); raise RequestError if this model or this cache cannot run it."""
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
        if blocks_for(len(ids) + 1) > self.pool.num_blocks:
            raise RequestError(
                f"prompt must fit into the KV cache of {self.pool.num_blocks * BLOCK_SIZE} tokens "
                f"({self.cache.capacity_bytes} bytes), got {len(ids)} tokens; raise num_kv_blocks or cache_size"
            )
        limit = self._config.max_num_batched_tokens
        if not self._config.dynamic_split_fuse and len(ids) > limit:
            raise RequestError(
                f"prompt must have at most max_num_batched_tokens={limit} tokens with dynamic_split_fuse=False, "
                f"got {len(ids)}"
            )
        return ids

    def add(
        self, request_id: int, ids: np.ndarray, config: ov_genai.GenerationConfig, keep_kv: bool = False
    ) -> GenerationHandle:
        """Check a request and queue it for the next step. `keep_kv` leaves its KV for a prompt that goes on from it.

        Raises RequestError; no other request is touched.
        """
        ids = self.check_prompt(ids)
        refuse_unsupported(config)
        params = SamplingParams.from_config(config, self._defaults, len(ids), self.max_tokens)
        request = Request(request_id, ids, params, self._decode, keep_kv or self._config.enable_prefix_caching)
        handle = GenerationHandle(request, self.cache.bytes_per_block)
        with self._add_lock:
            if request_id in self._handles:
                raise RequestError(f"request_id must differ from those of running requests, got {request_id} again")
            self._handles[request_id] = handle
            self._inbox.append(handle)
        return handle

    def step(self) -> None:
        """Run one inference for as many rows as the plan holds; hand their tokens to the handles.

        If anything breaks, the requests of the step end and give their memory back before the error goes on.
        """
        with self._lock:
            start = time.perf_counter()
            self._take_in()
            self._end_wanted()
            plan = self.scheduler.plan()
            try:
                self._run(plan, start)
            except BaseException:
                self._abort({row.sequence.request for row in plan.rows})
                raise

    def drop_kept_kv(self) -> None:
        """Give back the KV that ended requests left for reuse."""
        with self._lock:
            self.prefixes.clear()

    def _take_in(self) -> None:
        while self._inbox:
            request = self._inbox.popleft()._request
            if not request.is_finished:  # cancelled before it was taken in
                self.scheduler.add(request.sequences[0])

    def _end_wanted(self) -> None:
        for handle in list(self._handles.values()):
            request = handle._request
            if request.wanted_end:
                status, reason = request.wanted_end
                for sequence in request.sequences:
                    if not sequence.is_finished:
                        self._finish(sequence, reason, keep=status != Status.CANCEL)
                self._end(request, status)

    def _run(self, plan: StepPlan, start: float) -> None:
        for sequence in plan.out_of_memory:
            _log.warning(
                "request %d ends after %d tokens: the KV cache of %d tokens is full; raise num_kv_blocks or cache_size",
                sequence.request.request_id, len(sequence.ids), self.pool.num_blocks * BLOCK_SIZE,
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

    def _commit(self, plan: StepPlan, logits: np.ndarray) -> float:
        """Note what is cached now, choose tokens, end what is complete. Returns the seconds taken by sampling."""
        start = time.perf_counter()
        now = start
        new: dict[Request, dict[int, GenerationOutput]] = {}
        logits_rows = iter(logits)
        for row in plan.rows:
            sequence = row.sequence
            sequence.num_cached += row.num_tokens
            if not row.samples:
                continue
            row_logits = next(logits_rows)
            for member in self._members(sequence):
                token, logprob = sample(row_logits, member)
                new.setdefault(member.request, {})[member.index] = self._accept(member, token, logprob, now)
        sampling_s = time.perf_counter() - start
        for request, outputs in new.items():
            request.peak_blocks = max(request.peak_blocks, sum(len(s.blocks) for s in request.sequences))
            self._handles[request.request_id].push(outputs)
            for index in outputs:
                if request.sequences[index].is_finished:
                    self._retire(request.sequences[index])
            self._end_if_complete(request)
        return sampling_s

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
        if keep and sequence.request.keep_kv and sequence.index == 0 and sequence.num_cached:
            self.prefixes.put(sequence.ids[: sequence.num_cached], sequence.blocks.ids)
        self.scheduler.remove([sequence])

    def _end_if_complete(self, request: Request) -> None:
        if all(s.is_finished for s in request.sequences):
            self._end(request, Status.FINISHED)

    def _end(self, request: Request, status: Status) -> None:
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
        usage = 100 * self.pool.num_used / self.pool.num_blocks
        self._num_steps += 1
        self._usage_sum += usage
        self._max_usage = max(self._max_usage, usage)
        inference = infer_end - infer_start
        self._last_step = StepSeconds(inference, sampling_s, time.perf_counter() - start - inference)
