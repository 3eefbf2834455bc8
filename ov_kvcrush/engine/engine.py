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
from ov_kvcrush.core.engine_thread import EngineThread
from ov_kvcrush.core.eviction import Choice, EvictionSpec
from ov_kvcrush.core.outputs import PipelineMetrics, StepSeconds
from ov_kvcrush.core.request import Request, Sequence
from ov_kvcrush.core.request_options import DEFAULT_REQUEST_OPTIONS, RequestOptions
from ov_kvcrush.core.snapshot import KVSnapshot, SnapshotArrays
from ov_kvcrush.core.step import SchedulerOutput
from ov_kvcrush.engine.grammar.compiler import GrammarCompiler
from ov_kvcrush.engine.guarded_snapshots import GuardedSnapshots
from ov_kvcrush.engine.handle import GenerationHandle
from ov_kvcrush.engine.input_processor import Decode, InputProcessor
from ov_kvcrush.engine.lookahead.draft_model import DraftModel
from ov_kvcrush.engine.lookahead.drafts import Drafts
from ov_kvcrush.engine.lookahead.prompt_lookup import PromptLookup
from ov_kvcrush.engine.model_runner import ModelRunner
from ov_kvcrush.engine.output_processor import OutputProcessor
from ov_kvcrush.engine.scheduler import Scheduler
from ov_kvcrush.errors import CrushError, OutOfMemory, QueueFull, RequestError
from ov_kvcrush.kvcache.factory import make_kv_cache_manager
from ov_kvcrush.kvcache.manager import KVCacheManager
from ov_kvcrush.kvcache.planning import (
    DefaultPlans,
    default_policy,
    find_profile,
    make_context_planner,
    make_planner,
    recent_precision,
)
from ov_kvcrush.model.adapters import AdapterParams
from ov_kvcrush.model.fingerprints import NOT_SHARED
from ov_kvcrush.model.load import LoadedModel
from ov_kvcrush.policies.base import Policy

_log = logging.getLogger(__name__)


class Engine:
    """Continuous batching over one compiled model.

    Everything may be called from any thread: what touches the cache is done between two steps, by `thread`.
    defaults: the model's generation config. grammars: of structured output; None = it is refused. prompt_lookup:
    whether steps run what followed the last tokens of a text before, too (docs/lookahead.md). draft: a model of
    the same vocabulary whose guesses they run instead.
    shared: an engine on the same model whose staging blocks and thread this
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
        grammars: GrammarCompiler | None = None,
        prompt_lookup: bool = False,
        draft: LoadedModel | None = None,
    ) -> None:
        cache_config = cache_config or CacheConfig()
        self._model = model
        self._config = config
        self._defaults = defaults
        self._decode = decode
        self._cache_config = cache_config
        self.grammars = grammars
        self._prompt_lookup, self._draft = prompt_lookup, draft
        self.thread: EngineThread = shared.thread if shared else EngineThread()
        self.cache: KVCacheManager = make_kv_cache_manager(
            model, config, cache_config, shared.cache if shared else None
        )
        self.drafts = Drafts(PromptLookup(), self.cache) if prompt_lookup else None
        if draft is not None:
            self.drafts = Drafts(DraftModel(draft, config, model.vocab_size), self.cache)
        self.scheduler = Scheduler(config, self.cache, self.drafts)
        self._runner = ModelRunner(model, self.cache)
        self._inbox: deque[Request] = deque()
        self.requests: dict[int, Request] = {}  # that have not ended
        self._add_lock = threading.Lock()
        self.snapshots = GuardedSnapshots(self.cache.snapshots, self.thread, self._add_lock, self.requests)
        profile = find_profile(model, cache_config) if cache_config.is_planned else None
        planner = make_planner(model, cache_config, profile)
        policy = cache_config.eviction_policy or (default_policy(profile) if planner else None)
        of_contexts = make_context_planner(model, cache_config, planner)
        default_plans = DefaultPlans(model, cache_config)
        self._input = InputProcessor(
            model, self.cache, config, policy, defaults, decode, planner, of_contexts, default_plans, grammars,
            looks_ahead=self.drafts is not None,
        )  # fmt: skip
        self._output = OutputProcessor(self.scheduler, self.cache, self.requests, self._add_lock, self.snapshots.own)
        self._num_steps = 0
        self._usage_sum = 0.0
        self._max_usage = 0.0
        self._policy_s = 0.0  # of all steps
        self._last_step = StepSeconds(0.0, 0.0, 0.0)
        self.thread.join(self, self.requests)

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
        return Engine(
            self._model,
            self._config,
            self._defaults,
            self._decode,
            cache_config,
            self,
            self.grammars,
            self._prompt_lookup,
            self._draft,
        )

    # -- requests ------------------------------------------------------------------------------------------------------

    def add(
        self,
        request_id: int,
        ids: np.ndarray,
        config: ov_genai.GenerationConfig,
        params: CacheParams = DEFAULT_CACHE_PARAMS,
        options: RequestOptions = DEFAULT_REQUEST_OPTIONS,
    ) -> GenerationHandle:
        """Check a request and queue it. Raises RequestError, QueueFull; no other request is touched."""
        targets: list[tuple[InputProcessor, Engine]] = []
        for target in (asked.target or self for asked in params.fan_out):
            if not isinstance(target, Engine) or target.thread is not self.thread:
                raise RequestError("pipelines must be the one that reads or made by its with_cache(), got another")
            targets.append((target._input, target))
        request = self._input.make_request(request_id, ids, config, params, targets, options)
        num_waiting, most = len(self._inbox) + len(self.scheduler.waiting), self._config.max_waiting
        if most and num_waiting >= most:
            raise QueueFull(f"requests that wait must be at most max_waiting={most}, got {num_waiting} and one more")
        with self._add_lock:
            if request_id in self.requests:
                raise RequestError(f"request_id must differ from those of running requests, got {request_id} again")
            if params.context is not None and self.snapshots.is_gone(params.context):
                raise RequestError("context must be open, got one that was closed")
            self.requests[request_id] = request
            self._inbox.append(request)
        return GenerationHandle(request, self.cache, self.thread)

    def process_aborts(self) -> None:
        """End the requests whose handles were told to stop or cancel, without running a step."""
        self.thread.call(self._process_aborts)

    def _process_aborts(self) -> None:
        try:
            self._take_in()
            self._output.end_requests(time.perf_counter())
            self.snapshots.release_dropped()
        finally:
            self._output.flush()

    def has_unfinished(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self.requests)

    @property
    def has_driven(self) -> bool:
        """Whether some requests are to be moved on without a caller's `step`, or ended."""
        with self._add_lock:
            return any(request.is_driven for request in self.requests.values())

    @property
    def has_running(self) -> bool:
        """Whether some of its sequences have memory."""
        return bool(self.scheduler.running)

    def _take_in(self) -> None:
        while self._inbox:
            self.scheduler.add(self._inbox.popleft().sequences[0])

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Run one inference for as many rows as are scheduled; hand out their tokens. False: nothing could be done.

        Where they wait for staging blocks that another engine holds, that one's requests move on instead.
        An error that cannot be told to be of one request ends all that are in the step before it goes on.
        """
        return self.thread.call(self._step)

    def _step(self) -> bool:
        start = time.perf_counter()
        num_before = len(self.requests)
        try:
            self._take_in()
            self._output.end_requests(start)
            try:
                step = self.scheduler.schedule()
            except BaseException as error:  # whose fault it is cannot be told
                self._output.abort({s.request for s in (*self.scheduler.running, *self.scheduler.waiting)}, error)
                raise
            try:
                self._run(step, start)
            except BaseException as error:
                self._output.abort({row.sequence.request for row in step.rows}, error)
                raise
        finally:
            self.snapshots.release_dropped()
            self._output.flush()
        if step.rows or len(self.requests) < num_before:
            return True
        return bool(self.scheduler.waiting) and self._step_others()

    def _step_others(self) -> bool:
        """Move on those that hold staging blocks: they have running sequences, so they do not come back here."""
        others = [engine for engine in self.thread.engines() if engine is not self and engine.has_running]
        return any([engine.step() for engine in others])

    def end_all(self, error: Exception) -> None:
        """End every request with an error."""
        self._take_in()
        self._output.abort(set(self.requests.values()), error)
        self._output.flush()

    def _run(self, step: SchedulerOutput, start: float) -> None:
        for sequence in step.out_of_memory:
            self._output.fail(sequence, self._out_of_memory(sequence))
        if not step.rows:
            return
        self._runner.prepare(step)
        infer_start = time.perf_counter()
        logits = self._runner.infer()
        infer_end = time.perf_counter()
        for row in step.rows:
            row.sequence.num_cached += row.num_known
        for sequence, error in self.cache.commit(step.rows, self._runner.attention_scores):
            self._output.fail(sequence, error or self._out_of_memory(sequence))
        sampling_s = self._output.process(step, logits)
        self._measure(step, start, infer_end - infer_start, sampling_s)

    def _out_of_memory(self, sequence: Sequence) -> OutOfMemory:
        self._max_usage = 100.0  # what is left is less than anybody can use
        usage = self.cache.usage()
        what = "context" if sequence.request.prefill_only else "prompt and answer"
        return OutOfMemory(
            f"{what} must fit into the KV store beside what is there, got {len(sequence.ids)} tokens with "
            f"{usage.used_bytes} of {usage.capacity_bytes} bytes in use; raise max_bytes or close contexts"
        )

    def _measure(self, step: SchedulerOutput, start: float, inference_s: float, sampling_s: float) -> None:
        use = self.cache.usage()
        usage = 100 * use.used_bytes / use.capacity_bytes
        self._num_steps += 1
        self._usage_sum += usage
        self._max_usage = max(self._max_usage, usage)
        policy_s, self._policy_s = self.cache.policy_seconds - self._policy_s, self.cache.policy_seconds
        end = time.perf_counter()
        seconds = end - start
        drafted = self.drafts.taken() if self.drafts else None
        self._last_step = StepSeconds(inference_s, sampling_s, seconds - inference_s, policy_s, end, drafted)
        num_decodes = sum(row.is_decode for row in step.rows)
        num_drafts = step.num_draft_tokens
        num_prompt_rows = step.num_tokens - num_decodes - num_drafts
        self.scheduler.pace.note(num_decodes, num_prompt_rows, seconds)
        if self.drafts and not num_prompt_rows:
            self.drafts.pace.note(num_drafts, seconds)
        for request in {row.sequence.request for row in step.rows}:
            request.steps.append((self._num_steps, self._last_step))

    # -- KV that outlives requests -------------------------------------------------------------------------------------

    def clear_prefixes(self) -> None:
        """Give back the KV that ended requests left for reuse."""
        self.thread.call(self.cache.clear_prefixes)

    def commit_snapshot(
        self, blocks: np.ndarray, num_tokens: int, eviction: EvictionSpec | None, choice: Choice | None
    ) -> KVSnapshot:
        """Take what was chosen (None = all) of a prompt on the shared staging blocks. Raises StoreFull."""
        return self.snapshots.commit(blocks, num_tokens, eviction, choice)

    def load_snapshot(self, arrays: SnapshotArrays, policy: Policy | None, base: int, base_kept: int) -> KVSnapshot:
        """KV from arrays. Raises ContextFileError for what the store could not have made, OutOfMemory without room."""
        return self.snapshots.load(arrays, policy, base, base_kept)

    # -- figures -------------------------------------------------------------------------------------------------------

    def metrics(self) -> PipelineMetrics:
        """Requests and cache usage after the last step."""
        use = self.cache.usage()
        return PipelineMetrics(
            requests=len(self.requests),
            scheduled_requests=len({s.request.request_id for s in list(self.scheduler.running)}),
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
            "recent_precision": recent_precision(self._model, config),
            "recent_tokens": str(config.recent_tokens),
            "group_size": str(config.group_size),
            "shared_layers": ", ".join(f"{i}: {j}" for i, j in self._model.shared_layers) or NOT_SHARED,
        }

    def adapters_of(self, key: str) -> AdapterParams:
        """What a context in a file was read with. Raises ContextFileError for adapters that the model has not."""
        return self._model.adapters.from_key(key)

    def kv_heads(self) -> list[int]:
        """KV heads of each layer that stores keys and values."""
        return [layer.num_kv_heads for layer in self._model.layers]

    def bf16_kv_bytes(self, num_tokens: int) -> int:
        """Bytes of a bf16 cache of so many tokens, keys and values of all layers."""
        return num_tokens * sum(2 * 2 * layer.num_kv_heads * layer.head_size for layer in self._model.layers)
