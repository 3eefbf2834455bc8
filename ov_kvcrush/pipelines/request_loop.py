"""Requests to their end: their tokens to a streamer meanwhile, nothing left running after an error."""

from __future__ import annotations

import itertools
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.contexts.context import Progress
from ov_kvcrush.core.cache_params import CacheParams
from ov_kvcrush.core.draft_metrics import ModelStep, SDPerModelsPerfMetrics
from ov_kvcrush.core.outputs import StepSeconds
from ov_kvcrush.core.perf_metrics import PerfMetrics
from ov_kvcrush.core.request_options import DEFAULT_REQUEST_OPTIONS, RequestOptions
from ov_kvcrush.core.sampling_params import make_generation_config
from ov_kvcrush.errors import OutOfMemory, RequestError
from ov_kvcrush.pipelines.backend import Backend, Handle
from ov_kvcrush.pipelines.streaming import Streamer, make_sink, pump

_FIRST_ID = 1 << 62  # of requests made here; callers of add_request choose theirs below


class RequestLoop:
    """Runs requests of one engine: each call waits in the thread of its caller while the engine moves them on."""

    def __init__(self, backend: Backend, tokenizer: ov_genai.Tokenizer) -> None:
        self._backend = backend
        self._tokenizer = tokenizer
        self._ids = itertools.count(_FIRST_ID)
        self._lock = threading.RLock()  # a signal handler may call stop() while its thread is in here
        self._calls: dict[int, list[list[Handle]]] = {}  # that run, by the identifiers of their threads

    def stop(self, thread: int | None = None) -> None:
        """End the calls of one thread; see PipelineBase.stop."""
        with self._lock:
            asked = threading.get_ident() if thread is None else thread
            if thread is None and asked not in self._calls:
                if len(self._calls) > 1:
                    raise RequestError(
                        f"thread must be that of the call to be ended where several run, got {len(self._calls)}"
                    )
                asked = next(iter(self._calls), asked)
            handles = [handle for call in self._calls.get(asked, ()) for handle in call]
        for handle in handles:
            handle.stop()

    @contextmanager
    def _call(self) -> Iterator[list[Handle]]:
        """The handles of one call: they can be stopped, and are given up where it raises."""
        handles: list[Handle] = []
        thread = threading.get_ident()
        with self._backend.thread.visit():
            with self._lock:
                self._calls.setdefault(thread, []).append(handles)
            try:
                yield handles
            except BaseException:
                self._give_up(handles)
                raise
            finally:
                with self._lock:
                    calls = self._calls[thread]
                    calls[:] = [call for call in calls if call is not handles]
                    if not calls:
                        del self._calls[thread]

    def run(
        self,
        prompts: Sequence[np.ndarray],
        configs: Sequence[ov_genai.GenerationConfig],
        streamer: Streamer | None,
        metrics: PerfMetrics,
        params: Sequence[CacheParams],
        options: RequestOptions = DEFAULT_REQUEST_OPTIONS,
        *,
        may_be_cut: bool = False,
    ) -> list[Handle]:
        """Run prompts to their end together. Fills `metrics`. If anything is raised, none of them is left running.

        may_be_cut: what ends for lack of memory is an answer too, whose status is IGNORED.
        Raises what kept a request from its whole answer: OutOfMemory, RequestTimeout, or what broke.
        """
        start = time.perf_counter()
        # Only the echo of a prompt is wanted: it is read, and the token that comes of it is not shown.
        is_echo = [config.echo and config.max_new_tokens == 0 for config in configs]
        sink = None if is_echo[0] else make_sink(streamer, self._tokenizer, configs[0])
        one = {"max_new_tokens": 1, "min_new_tokens": 0}
        configs = [make_generation_config(c, one) if none else c for c, none in zip(configs, is_echo, strict=True)]
        with self._call() as handles:
            for ids, config, cache in zip(prompts, configs, params, strict=True):
                handles.append(self._backend.add(next(self._ids), ids, config, cache, options))
            for handle in handles:
                handle.drive()
            if sink:
                pump(handles[0], sink)
            for handle in handles:
                handle.wait()
                if not (may_be_cut and isinstance(handle.error, OutOfMemory)):
                    handle.raise_error()
        for handle, none in zip(handles, is_echo, strict=True):
            if none:
                handle.cut(0)
        metrics.generate_s.append(time.perf_counter() - start)
        add_run(metrics, handles)
        return handles

    def prefill(
        self,
        ids: np.ndarray,
        params: CacheParams,
        progress: Progress | None,
        adapters: ov_genai.AdapterConfig | None = None,
    ) -> Handle:
        """Run a prompt without an answer, for the snapshots that `params` asks for. adapters: of a GenerationConfig.

        Raises RequestError if it was stopped, OutOfMemory where a store has no room; then nothing is left of it.
        """
        config = ov_genai.GenerationConfig()
        config.max_new_tokens = 1
        config.adapters = adapters
        num_read = 0
        with self._call() as handles:
            handle = self._backend.add(next(self._ids), ids, config, params)
            handles.append(handle)
            handle.drive()
            for done, total in handle.readings():
                num_read = max(num_read, done)  # one that lost its memory begins again
                if progress:
                    progress(num_read, total)
            handle.wait()
            single = handle.staged if params.return_staged else handle.snapshot
            num_made = len(handle.fan_out_snapshots) if params.fan_out else single is not None
            if num_made == max(len(params.fan_out), 1) and not handle.was_told_to_end:
                return handle
            if isinstance(handle.error, OutOfMemory):
                raise OutOfMemory(
                    f"context must fit into the KV store beside what is there, got {len(ids)} tokens; raise max_bytes"
                ) from handle.error
            handle.raise_error()
            raise RequestError(f"context must be read to its end, got a stop after {num_read} tokens")

    def _give_up(self, handles: list[Handle]) -> None:
        """End requests that nobody waits for any more, and release what they hand out."""
        for handle in handles:
            handle.cancel()
        self._backend.process_aborts()
        for handle in handles:
            for snapshot in (handle.snapshot, *handle.fan_out_snapshots):
                if snapshot is not None:
                    snapshot.release()
            if handle.staged is not None:
                self._backend.thread.call(handle.staged.release)


def add_run(metrics: PerfMetrics, handles: Sequence[Handle]) -> None:
    """Note requests that ran together: a step of several counts once."""
    steps: dict[int, StepSeconds] = {}
    times: list[list[float]] = []
    arrivals = []
    for handle in handles:
        stats = handle.get_stats()
        steps.update(stats.steps)
        arrivals.append(stats.arrival)
        metrics.num_input_tokens += stats.num_input_tokens
        metrics.num_reused_tokens += stats.num_reused_tokens
        metrics.num_drafted_tokens += stats.num_drafted
        metrics.num_accepted_tokens += stats.num_accepted
        metrics.kv_bytes += stats.kv_bytes
        if stats.kept_tokens is not None:
            metrics.kept_tokens = (metrics.kept_tokens or 0) + stats.kept_tokens
        outputs = handle.outputs()
        if stats.counts_steps:
            times += stats.token_times
            continue
        times += [own[: len(outputs[i].generated_ids)] if i == 0 else own for i, own in enumerate(stats.token_times)]
    metrics.add_tokens(min(arrivals), times)
    ordered = [seconds for _, seconds in sorted(steps.items())]
    metrics.add_steps([s.inference for s in ordered], [s.sampling for s in ordered])


def draft_metrics(metrics: PerfMetrics, handles: Sequence[Handle]) -> SDPerModelsPerfMetrics | None:
    """What model and draft model took for requests that ran together; None without a draft model.

    metrics: of these requests. As in openvino_genai steps that gave no token do not count.
    """
    numbered = dict(step for handle in handles for step in handle.get_stats().steps)
    steps = [numbered[number] for number in sorted(numbered)]
    if not any(step.draft is not None for step in steps):
        return None
    ends = [step.end for step in steps]
    main = []
    for moment, size in zip(metrics.new_token_moments_s, metrics.batch_sizes, strict=True):
        step = steps[min(bisect_left(ends, moment), len(steps) - 1)]
        seconds = step.inference + step.overhead - sum(other.seconds for other in step.draft or ())
        main.append(ModelStep(seconds, step.inference, size))
    draft = [other for step in steps for other in step.draft or () if other.num_tokens]
    return SDPerModelsPerfMetrics.of_call(metrics, main, draft)
