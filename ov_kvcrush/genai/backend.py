"""engine="genai": the same API over openvino_genai.ContinuousBatchingPipeline, for devices other than the CPU."""

from __future__ import annotations

import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as ov_genai

from ov_kvcrush.config import CacheConfig, SchedulerConfig
from ov_kvcrush.core.cache_params import DEFAULT_CACHE_PARAMS, CacheParams
from ov_kvcrush.core.outputs import GenerationOutput, PipelineMetrics, RequestStats, StepSeconds
from ov_kvcrush.core.sampling_params import SamplingParams
from ov_kvcrush.core.snapshot import KVSnapshot, SnapshotArrays
from ov_kvcrush.errors import ContextFileError, CrushError, ModelError, RequestError, did_you_mean, reason_of
from ov_kvcrush.genai.eviction import scheduler_fields, translate
from ov_kvcrush.model.load import check_device
from ov_kvcrush.model.plugin import kept_signal_stack, open_core, paged_precisions
from ov_kvcrush.policies.base import Policy

Status = ov_genai.GenerationStatus
FinishReason = ov_genai.GenerationFinishReason

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
    if config.attention == "crush":
        raise CrushError("attention must be 'auto' or 'paged' with engine='genai', got 'crush'")
    key, value = config.key_precision, config.value_precision
    paged = paged_precisions(key, value, properties)
    if not paged:
        raise CrushError(
            "key_precision and value_precision must be u8 or u4, or both the type that the model computes in, "
            f"with engine='genai', got {key!r}, {value!r}"
        )
    return paged


class GenaiHandle:
    """A request of openvino_genai, read after every step so that its tokens have a time.

    It does not tell what it evicted, and keeps its KV.
    """

    kept_positions: None = None
    representative_positions: None = None
    snapshot: None = None
    fan_out_snapshots: list[KVSnapshot] = []  # noqa: RUF012 - nothing is ever added

    def __init__(self, request_id: int, handle: Any, num_input_tokens: int) -> None:
        self.request_id = request_id
        self._handle = handle
        self._num_input_tokens = num_input_tokens
        self._arrival = time.perf_counter()
        self._times: dict[int, list[float]] = {}
        self._new: deque[dict[int, GenerationOutput]] = deque()
        self._outputs: dict[int, GenerationOutput] = {}
        self.peak_kv_bytes = 0
        self.was_told_to_end = False

    def collect(self, now: float) -> None:
        """Take over what the last step generated; openvino_genai hands every token out once."""
        while self._handle.can_read():
            outputs = {i: _output(o) for i, o in self._handle.read().items()}
            for index, output in outputs.items():
                self._times.setdefault(index, []).extend([now] * len(output.generated_ids))
                self._outputs[index] = _joined(self._outputs.get(index), output)
            self._new.append(outputs)

    def get_status(self) -> ov_genai.GenerationStatus:
        """RUNNING, FINISHED, STOP or CANCEL. A request that openvino_genai gave up for lack of memory is IGNORED."""
        return self._handle.get_status()

    def can_read(self) -> bool:
        """Whether `read` would return tokens that were not read before."""
        return bool(self._new)

    def read(self) -> dict[int, GenerationOutput]:
        """Tokens of the oldest unread step, by sequence index. Raises IndexError if there are none."""
        return self._new.popleft()

    def read_all(self) -> list[GenerationOutput]:
        """Everything generated so far, one output for each sequence."""
        return [self._outputs[i] for i in sorted(self._outputs)] or [GenerationOutput([], [], 0.0, FinishReason.NONE)]

    @property
    def progress(self) -> tuple[int, int]:
        """Known at the end only."""
        done = self._num_input_tokens if self._times else 0
        return done, self._num_input_tokens

    def stop(self, finish_reason: ov_genai.GenerationFinishReason = FinishReason.STOP) -> None:
        """End the request; what was generated counts as the answer."""
        self.was_told_to_end = True
        self._handle.stop(finish_reason)

    def cancel(self) -> None:
        """End the request; what was generated does not count."""
        self.was_told_to_end = True
        self._handle.cancel()

    def get_stats(self) -> RequestStats:
        """Token counts, moments and bytes of the request so far. openvino_genai does not tell reused tokens."""
        times = [self._times[i] for i in sorted(self._times)]
        return RequestStats(self._num_input_tokens, 0, self._arrival, times, self.peak_kv_bytes)


def _output(output: Any) -> GenerationOutput:
    return GenerationOutput(output.generated_ids, output.generated_log_probs, output.score, output.finish_reason)


def _joined(before: GenerationOutput | None, new: GenerationOutput) -> GenerationOutput:
    if before is None:
        return new
    return GenerationOutput(
        before.generated_ids + new.generated_ids,
        before.generated_log_probs + new.generated_log_probs,
        new.score,
        new.finish_reason,
    )


class GenaiBackend:
    """openvino_genai's continuous batching behind the interface of our own engine."""

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
                    str(folder), tokenizer, scheduler, device, **properties
                )
        except RuntimeError as error:
            raise ModelError(
                f"model in {str(folder)!r} must load in openvino_genai on {device}, got: {reason_of(error)}"
            ) from None
        self._defaults = defaults
        self._handles: dict[int, GenaiHandle] = {}
        self._lock = threading.RLock()

    def add(
        self,
        request_id: int,
        ids: np.ndarray,
        config: ov_genai.GenerationConfig,
        params: CacheParams = DEFAULT_CACHE_PARAMS,
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
        ids = np.asarray(ids, np.int64).reshape(1, -1)
        if not ids.size:
            raise RequestError("prompt must have at least one token, got an empty one")
        if config.eos_token_id < 0 and not config.ignore_eos and self._defaults.eos_token_id >= 0:
            config.set_eos_token_id(self._defaults.eos_token_id)
        if self._eviction:
            self._eviction.check_request(ids.size, config)
        if config.num_beams == 1:
            # For its checks: openvino_genai has fewer.
            SamplingParams.from_config(config, self._defaults, ids.size, _NO_LIMIT)
        with self._lock:
            if request_id in self._handles:
                raise RequestError(f"request_id must differ from those of running requests, got {request_id} again")
            try:
                handle = self._pipeline.add_request(request_id, ov.Tensor(ids), config)
            except (RuntimeError, ValueError) as error:
                raise RequestError(f"request must be one that openvino_genai runs, got: {reason_of(error)}") from None
            self._handles[request_id] = GenaiHandle(request_id, handle, ids.size)
            return self._handles[request_id]

    def step(self) -> None:
        """Run one step and collect its tokens."""
        with self._lock:
            if self._pipeline.has_non_finished_requests():
                self._pipeline.step()
            now = time.perf_counter()
            used = self._pipeline.get_metrics().kv_cache_size_in_bytes
            for request_id, handle in list(self._handles.items()):
                handle.peak_kv_bytes = max(handle.peak_kv_bytes, used)
                handle.collect(now)
                if handle.get_status() != Status.RUNNING:
                    del self._handles[request_id]

    def process_aborts(self) -> None:
        """Let openvino_genai drop stopped and cancelled requests: it does so in a step, and leaks them without one."""
        if any(handle.was_told_to_end for handle in self._handles.values()):
            self.step()

    def has_unfinished(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._pipeline.has_non_finished_requests())

    def load_snapshot(self, arrays: SnapshotArrays, policy: Policy | None, base: int, base_kept: int) -> KVSnapshot:
        """Contexts live in the store."""
        raise ContextFileError("context must be loaded with engine='crush', got 'genai'")

    def storage(self) -> dict[str, str]:
        """Not told."""
        raise ContextFileError("context must be loaded with engine='crush', got 'genai'")

    def kv_heads(self) -> list[int]:
        """Not told."""
        return []

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
    values = vars(options) if isinstance(options, SchedulerConfig) else options
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
