"""engine="genai": the same API over openvino_genai.ContinuousBatchingPipeline, for devices other than the CPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as ov_genai

from ov_kvcrush.config import OWN_SCHEDULER_FIELDS, CacheConfig, SchedulerConfig
from ov_kvcrush.core.cache_params import DEFAULT_CACHE_PARAMS, CacheParams
from ov_kvcrush.core.engine_thread import EngineThread
from ov_kvcrush.core.outputs import PipelineMetrics, StepSeconds
from ov_kvcrush.core.request_options import DEFAULT_REQUEST_OPTIONS, RequestOptions
from ov_kvcrush.core.sampling_params import SamplingParams, checked_end_tokens, outside_vocabulary
from ov_kvcrush.core.snapshot import KVSnapshot, SnapshotArrays
from ov_kvcrush.errors import (
    ContextFileError,
    CrushError,
    ModelError,
    RequestError,
    did_you_mean,
    reason_of,
)
from ov_kvcrush.genai.eviction import scheduler_fields, translate
from ov_kvcrush.genai.request import GenaiHandle, GenaiRequest
from ov_kvcrush.model.adapters import NO_ADAPTERS, AdapterParams
from ov_kvcrush.model.hf_config import pick
from ov_kvcrush.model.info import read_json_object
from ov_kvcrush.model.load import check_device
from ov_kvcrush.model.plugin import capped_properties, kept_signal_stack, open_core, paged_precisions
from ov_kvcrush.policies.base import Policy

Status = ov_genai.GenerationStatus

_NO_LIMIT = 1 << 40  # tokens


def genai_cache_properties(config: CacheConfig, properties: dict[str, Any]) -> dict[str, Any]:
    """The properties that say to openvino_genai what `config` says of memory and precisions.

    Raises CrushError naming what it cannot express.
    """
    default = CacheConfig()
    for name in ("recent_tokens", "group_size", "max_bytes", "staging_bytes", "prefix_bytes"):
        value = getattr(config, name)
        if value != getattr(default, name):
            hint = "; use cache_size of scheduler_config" if name == "max_bytes" else ""
            raise CrushError(f"{name} must be left alone with engine='genai', got {value}{hint}")
    if config.sharing:
        raise CrushError(f"shared_layers must be left out with engine='genai', got {dict(config.sharing)}")
    if config.recall_tokens is not None:
        raise CrushError(f"recall_tokens must be left out with engine='genai', got {config.recall_tokens}")
    if config.weights == "packed":
        raise CrushError("weights must be 'auto' or 'plugin' with engine='genai', got 'packed'")
    for name in ("budget_bytes", "quality"):
        if getattr(config, name):
            raise CrushError(
                f"{name} must be left out with engine='genai', got {getattr(config, name)}; it has a budget"
            )
    if config.attention == "crush":
        raise CrushError("attention must be 'auto' or 'paged' with engine='genai', got 'crush'")
    key, value = config.key_precision, config.value_precision
    if config.budget is not None:
        key = value = _precision_for(config)
    paged = paged_precisions(key, value, properties)
    if not paged:
        raise CrushError(
            "key_precision and value_precision must be u8 or u4, or both the type that the model computes in, "
            f"with engine='genai', got {key!r}, {value!r}"
        )
    return paged


def _precision_for(config: CacheConfig) -> str:
    """The most precise type of openvino_genai's cache whose bytes are within the budget: one for all layers.

    Scales and zero points, of channels of keys and of tokens of values, are float32.
    """
    assert isinstance(config.budget, float)
    for precision, of_bf16 in (("u8", 0.57), ("u4", 0.32)):
        if config.budget >= of_bf16:
            return precision
    raise CrushError(
        f"budget must be at least 0.32 with engine='genai', whose cache has u4 at least, got {config.budget:.4g}; a "
        "policy with kept_tokens evicts more"
    )


class GenaiBackend:
    """openvino_genai's continuous batching behind the interface of our own engine.

    vocab_size: logits of the model by its config.json; None if that does not tell.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: ov_genai.Tokenizer,
        device: str,
        scheduler_config: Any,
        properties: dict[str, Any],
        defaults: ov_genai.GenerationConfig,
        policy: Policy | None = None,
    ) -> None:
        device = check_device(open_core(), device)
        self._eviction = translate(policy, device)
        scheduler = to_genai_scheduler_config(scheduler_config)
        if self._eviction:
            scheduler = self._eviction.added_to(scheduler, is_default=scheduler_config is None)
        try:
            with kept_signal_stack():
                self._pipeline = ov_genai.ContinuousBatchingPipeline(
                    str(folder), tokenizer, scheduler, device, **{**capped_properties(), **properties}
                )
        except RuntimeError as error:
            raise ModelError(
                f"model in {str(folder)!r} must load in openvino_genai on {device}, got: {reason_of(error)}"
            ) from None
        self._defaults = defaults
        self.vocab_size = pick(read_json_object(folder / "config.json") or {}, "vocab_size", optional=True)
        self._decode: Callable[[list[int]], str] = tokenizer.decode
        self._requests: dict[int, GenaiRequest] = {}
        self._lock = threading.Lock()
        self._num_steps = 0
        self.thread = EngineThread()
        self.thread.join(self, self._requests)

    def add(
        self,
        request_id: int,
        ids: np.ndarray,
        config: ov_genai.GenerationConfig,
        params: CacheParams = DEFAULT_CACHE_PARAMS,
        options: RequestOptions = DEFAULT_REQUEST_OPTIONS,
    ) -> GenaiHandle:
        """Queue a request. Keeping its KV is up to `enable_prefix_caching` of the scheduler config here, and the policy
        is that of the pipeline.

        Raises RequestError; no other request is touched.
        """
        if params.context or params.return_snapshot or params.prefill_only:
            raise RequestError("context must not be asked for with engine='genai', got one; engine='crush' holds it")
        if params.policy is not None or params.protect:
            field = "policy" if params.policy is not None else "protect"
            raise RequestError(f"{field} must be left out of a request with engine='genai'; give cache_config a policy")
        if options.priority or options.logit_bias:
            field = "priority" if options.priority else "logit_bias"
            raise RequestError(f"{field} must be left out with engine='genai', got one; engine='crush' has it")
        ids = np.asarray(ids, np.int64).reshape(1, -1)
        if not ids.size:
            raise RequestError("prompt must have at least one token, got an empty one")
        outside = outside_vocabulary(ids[0].tolist(), self.vocab_size)
        if outside:
            rule = f"in 0..{self.vocab_size - 1}" if self.vocab_size else "at least 0"
            raise RequestError(f"token ids must be {rule}, got {outside[0]}")
        if config.adapters:
            raise RequestError("adapters must be empty with engine='genai', got some; engine='crush' has them")
        ends = checked_end_tokens(config, self._defaults, self.vocab_size)
        if ends:  # with ignore_eos it would ignore all of them, and without an end token take the model's
            config.ignore_eos = False
            config.eos_token_id = config.eos_token_id if config.eos_token_id in ends else min(ends)
        config.stop_token_ids = set(ends)
        if self._eviction:
            self._eviction.check_request(ids.size, config)
        # For its checks: openvino_genai has fewer.
        SamplingParams.from_config(config, self._defaults, ids.size, _NO_LIMIT, self.vocab_size)
        with self._lock:
            if request_id in self._requests:
                raise RequestError(f"request_id must differ from those of running requests, got {request_id} again")
            try:
                handle = self._pipeline.add_request(request_id, ov.Tensor(ids), config)
            except (RuntimeError, ValueError) as error:
                raise RequestError(f"request must be one that openvino_genai runs, got: {reason_of(error)}") from None
            request = self._requests[request_id] = GenaiRequest(request_id, handle, ids.size, options)
        return GenaiHandle(request, self.thread, self._decode)

    def step(self) -> bool:
        """Run one step and hand out its tokens. False: there was nothing to do."""
        return self.thread.call(self._step)

    def _step(self) -> bool:
        try:
            if has_work := bool(self._pipeline.has_non_finished_requests()):
                self._pipeline.step()
        except Exception as error:  # it does not say whose fault it was, and goes on with none of them
            self.end_all(error)
            raise
        now = time.perf_counter()
        used = self._pipeline.get_metrics().kv_cache_size_in_bytes
        self._num_steps += 1
        for request_id, request in self._running():
            request.peak_kv_bytes = max(request.peak_kv_bytes, used)
            request.steps.append((self._num_steps, StepSeconds(0.0, 0.0, 0.0)))
            request.collect(now)
            if request.status != Status.RUNNING:
                with self._lock:
                    del self._requests[request_id]
        return has_work

    def _running(self) -> list[tuple[int, GenaiRequest]]:
        with self._lock:
            return list(self._requests.items())

    def end_all(self, error: Exception) -> None:
        """End every request with an error."""
        for request_id, request in self._running():
            request.handle.cancel()
            request.fail(error)
            with self._lock:
                del self._requests[request_id]

    def process_aborts(self) -> None:
        """Let openvino_genai drop stopped and cancelled requests: it does so in a step, and leaks them without one."""
        if any(request.was_told_to_end for _, request in self._running()):
            self.step()

    def has_unfinished(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._pipeline.has_non_finished_requests()) or bool(self._requests)

    @property
    def has_driven(self) -> bool:
        """Whether some requests are to be moved on without a caller's `step`."""
        return any(request.is_driven for _, request in self._running())

    @property
    def has_running(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._requests)

    def load_snapshot(self, arrays: SnapshotArrays, policy: Policy | None, base: int, base_kept: int) -> KVSnapshot:
        """Contexts live in the store."""
        raise ContextFileError("context must be loaded with engine='crush', got 'genai'")

    def adapters_of(self, key: str) -> AdapterParams:
        """None are known: no context is read here."""
        return NO_ADAPTERS

    def storage(self) -> dict[str, str]:
        """Not told."""
        raise ContextFileError("context must be loaded with engine='crush', got 'genai'")

    def kv_heads(self) -> list[int]:
        """Not told."""
        return []

    def bf16_kv_bytes(self, num_tokens: int) -> int:
        """Not told."""
        return 0

    def clear_prefixes(self) -> None:
        """Nothing to do: openvino_genai drops kept prefixes itself when it needs their memory."""

    def last_step(self) -> StepSeconds:
        """Zeros: openvino_genai does not tell."""
        return StepSeconds(0.0, 0.0, 0.0)

    def metrics(self) -> PipelineMetrics:
        """openvino_genai's figures; it does not tell blocks and preemptions."""
        m = self._pipeline.get_metrics()
        return PipelineMetrics(
            requests=m.requests,
            scheduled_requests=m.scheduled_requests,
            cache_usage=m.cache_usage,
            max_cache_usage=m.max_cache_usage,
            avg_cache_usage=m.avg_cache_usage,
            kv_cache_size_in_bytes=m.kv_cache_size_in_bytes,
            cache_size_in_bytes=m.cache_size_in_bytes,
            num_used_blocks=0,
            num_preemptions=0,
        )


def to_genai_scheduler_config(options: Any) -> ov_genai.SchedulerConfig:
    """openvino_genai's SchedulerConfig from None, ours, a dict, or its own.

    Without one, prefix caching is on: it is what keeps the KV of a chat between turns there.
    Raises CrushError naming a field that it cannot express.
    """
    if isinstance(options, ov_genai.SchedulerConfig):
        return options
    config = ov_genai.SchedulerConfig()
    if options is None:
        config.max_num_batched_tokens = SchedulerConfig().max_num_batched_tokens
        config.enable_prefix_caching = True
        return config
    values = options
    if isinstance(options, SchedulerConfig):
        values = {name: value for name, value in vars(options).items() if name not in OWN_SCHEDULER_FIELDS}
        for name in OWN_SCHEDULER_FIELDS:
            if getattr(options, name) != getattr(SchedulerConfig(), name):
                raise CrushError(f"{name} must be left alone with engine='genai', got {getattr(options, name)}")
    if not isinstance(values, dict):
        raise CrushError(f"scheduler_config must be a SchedulerConfig or a dict, got {type(options).__name__}")
    known = scheduler_fields(config)
    for name, value in values.items():
        if name not in known:
            hint = did_you_mean(name, known)
            raise CrushError(f"scheduler option must be one of openvino_genai's, got {name!r}{hint}")
        try:
            setattr(config, name, value)
        except TypeError:
            raise CrushError(
                f"{name} must be of the type of {getattr(config, name)!r} with engine='genai', got {value!r}"
            ) from None
    return config
