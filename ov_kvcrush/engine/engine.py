"""The engine: requests go in, `step` runs one inference for many of them, tokens come out of their handles."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.config import CacheConfig, SchedulerConfig
from ov_kvcrush.core.cache_params import DEFAULT_CACHE_PARAMS, CacheParams
from ov_kvcrush.core.eviction import Choice
from ov_kvcrush.core.outputs import PipelineMetrics, StepSeconds
from ov_kvcrush.core.request import FinishReason
from ov_kvcrush.core.snapshot import KVSnapshot, SnapshotArrays
from ov_kvcrush.core.step import SchedulerOutput
from ov_kvcrush.engine.guarded_snapshots import GuardedSnapshots
from ov_kvcrush.engine.handle import GenerationHandle
from ov_kvcrush.engine.input_processor import Decode, InputProcessor
from ov_kvcrush.engine.model_runner import ModelRunner
from ov_kvcrush.engine.output_processor import OutputProcessor
from ov_kvcrush.engine.scheduler import Scheduler
from ov_kvcrush.engine.step_lock import StepLock
from ov_kvcrush.errors import CrushError, RequestError
from ov_kvcrush.kvcache.factory import make_kv_cache_manager
from ov_kvcrush.kvcache.manager import KVCacheManager
from ov_kvcrush.model.load import LoadedModel
from ov_kvcrush.policies.base import Policy

_log = logging.getLogger(__name__)


class Engine:
    """Continuous batching over one compiled model.

    `add` may be called from any thread and while a step runs; `step` from one thread at a time (a lock sees to it).
    defaults: the model's generation config. shared: an engine on the same model whose staging blocks and step lock this
    one shares; each has its own store and requests, and what one prefills may be committed to the store of the other.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: SchedulerConfig,
        defaults: ov_genai.GenerationConfig,
        decode: Decode,
        cache_config: CacheConfig | None = None,
        shared: Engine | None = None,
    ) -> None:
        cache_config = cache_config or CacheConfig()
        self._model = model
        self._config = config
        self._defaults = defaults
        self._decode = decode
        self._cache_config = cache_config
        self._step_lock: StepLock = shared._step_lock if shared else StepLock()
        self._lock = self._step_lock.lock
        self.cache: KVCacheManager = make_kv_cache_manager(
            model, config, cache_config, shared.cache if shared else None
        )
        self.scheduler = Scheduler(config, self.cache)
        self._runner = ModelRunner(model, self.cache)
        self._inbox: deque[GenerationHandle] = deque()
        self._handles: dict[int, GenerationHandle] = {}
        self._add_lock = threading.Lock()
        self.snapshots = GuardedSnapshots(self.cache.snapshots, self._step_lock, self._add_lock, self._handles)
        self._input = InputProcessor(model, self.cache, config, cache_config.eviction_policy, defaults, decode)
        self._output = OutputProcessor(self.scheduler, self.cache, self._handles, self._add_lock, self.snapshots.own)
        self._num_steps = 0
        self._usage_sum = 0.0
        self._max_usage = 0.0
        self._policy_s = 0.0  # of all steps
        self._last_step = StepSeconds(0.0, 0.0, 0.0)
        self._step_lock.join(self)

    def with_cache(self, cache_config: CacheConfig) -> Engine:
        """Another engine on the same model and staging blocks, with a store of its own.

        Raises CrushError where this one has no store, and for settings that the two cannot differ in.
        """
        if self.cache.snapshots is None:
            raise CrushError("attention must be 'crush' for a pipeline beside another, got 'paged', which has no store")
        if cache_config.attention == "paged":
            raise CrushError("attention must be 'crush' or 'auto' beside another pipeline, got 'paged'")
        if cache_config.staging_bytes:
            raise CrushError(
                "staging_bytes must be left out beside another pipeline, whose staging blocks are shared, "
                f"got {cache_config.staging_bytes}"
            )
        return Engine(self._model, self._config, self._defaults, self._decode, cache_config, shared=self)

    # -- requests ------------------------------------------------------------------------------------------------------

    def add(
        self,
        request_id: int,
        ids: np.ndarray,
        config: ov_genai.GenerationConfig,
        params: CacheParams = DEFAULT_CACHE_PARAMS,
    ) -> GenerationHandle:
        """Check a request and queue it for the next step. Raises RequestError; no other request is touched."""
        targets: list[tuple[InputProcessor, Engine]] = []
        for target in (asked.target or self for asked in params.fan_out):
            if not isinstance(target, Engine) or target._step_lock is not self._step_lock:
                raise RequestError("pipelines must be the one that reads or made by its with_cache(), got another")
            targets.append((target._input, target))
        request = self._input.make_request(request_id, ids, config, params, targets)
        handle = GenerationHandle(request, self.cache)
        with self._add_lock:
            if request_id in self._handles:
                raise RequestError(f"request_id must differ from those of running requests, got {request_id} again")
            if params.context is not None and self.snapshots.is_gone(params.context):
                raise RequestError("context must be open, got one that was closed")
            self._handles[request_id] = handle
            self._inbox.append(handle)
        return handle

    def process_aborts(self) -> None:
        """End the requests whose handles were told to stop or cancel, without running a step."""
        with self._lock:
            self._take_in()
            self._output.process_aborts()
            self._release_all_dropped()

    def has_unfinished(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._handles)

    @property
    def has_running(self) -> bool:
        """Whether some of its sequences have memory."""
        return bool(self.scheduler.running)

    def _take_in(self) -> None:
        while self._inbox:
            request = self._inbox.popleft().request
            if not request.is_finished:  # cancelled before it was taken in
                self.scheduler.add(request.sequences[0])

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Run one inference for as many rows as are scheduled; hand their tokens to the handles.

        Where they wait for staging blocks that another engine holds, that one's requests move on instead.
        If anything breaks, the requests of the step end and their memory is freed before the error goes on.
        """
        with self._lock:
            start = time.perf_counter()
            self.release_dropped()
            self._take_in()
            self._output.process_aborts()
            self._step_lock.is_stepping = True
            try:
                step = self.scheduler.schedule()
            except BaseException:  # whose fault it is cannot be told
                self._step_lock.is_stepping = False
                self._output.abort({s.request for s in (*self.scheduler.running, *self.scheduler.waiting)})
                raise
            try:
                self._run(step, start)
            except BaseException:
                self._output.abort({row.sequence.request for row in step.rows})
                raise
            finally:
                self._step_lock.is_stepping = False
            self._release_all_dropped()
            if self.scheduler.waiting and not step.rows and not step.out_of_memory:
                self._step_others()

    def _step_others(self) -> None:
        """Move on those that hold staging blocks: they have running sequences, so they do not come back here."""
        for engine in self._step_lock.engines():
            if engine is not self and engine.has_running:
                engine.step()

    def _run(self, step: SchedulerOutput, start: float) -> None:
        for sequence in step.out_of_memory:
            _log.warning(
                "request %d ends after %d tokens: the KV cache of %d tokens is full; give it more memory",
                sequence.request.request_id, len(sequence.ids), self.cache.capacity_tokens(sequence.request.eviction),
            )  # fmt: skip
            self._output.finish(sequence, FinishReason.LENGTH)
            self._output.end_if_complete(sequence.request)
        if not step.rows:
            return
        self._runner.prepare(step)
        infer_start = time.perf_counter()
        logits = self._runner.infer()
        infer_end = time.perf_counter()
        for row in step.rows:
            row.sequence.num_cached += row.num_tokens
        for sequence in self.cache.commit(step.rows, self._runner.attention_scores):
            self._output.finish(sequence, FinishReason.LENGTH, keep=False)
            self._output.end_if_complete(sequence.request)
        sampling_s = self._output.process(step, logits)
        self._measure(start, infer_end - infer_start, sampling_s)

    def _measure(self, start: float, inference_s: float, sampling_s: float) -> None:
        use = self.cache.usage()
        usage = 100 * use.used_bytes / use.capacity_bytes
        self._num_steps += 1
        self._usage_sum += usage
        self._max_usage = max(self._max_usage, usage)
        policy_s, self._policy_s = self.cache.policy_seconds - self._policy_s, self.cache.policy_seconds
        self._last_step = StepSeconds(inference_s, sampling_s, time.perf_counter() - start - inference_s, policy_s)

    # -- KV that outlives requests -------------------------------------------------------------------------------------

    def clear_prefixes(self) -> None:
        """Give back the KV that ended requests left for reuse."""
        with self._lock:
            self.cache.clear_prefixes()

    def commit_snapshot(
        self, blocks: np.ndarray, num_tokens: int, policy: Policy | None, choice: Choice | None
    ) -> KVSnapshot:
        """Take what was chosen (None = all) of a prompt on the shared staging blocks. Raises StoreFull."""
        return self.snapshots.commit(blocks, num_tokens, policy, choice)

    def load_snapshot(self, arrays: SnapshotArrays, policy: Policy | None, base: int, base_kept: int) -> KVSnapshot:
        """KV from arrays. Raises ContextFileError for what the store could not have made, OutOfMemory without room."""
        return self.snapshots.load(arrays, policy, base, base_kept)

    def release_dropped(self) -> None:
        """Give back snapshots that were released while that was not possible. The caller holds the step lock."""
        self.snapshots.release_dropped()

    def _release_all_dropped(self) -> None:
        for engine in self._step_lock.engines():
            engine.release_dropped()

    # -- figures -------------------------------------------------------------------------------------------------------

    def metrics(self) -> PipelineMetrics:
        """Requests and cache usage after the last step."""
        use = self.cache.usage()
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
