"""Requests to their end: steps while they run, tokens to a streamer in between, nothing left running after an error."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.contexts.context import Progress
from ov_kvcrush.core.cache_params import CacheParams
from ov_kvcrush.core.outputs import PerfMetrics
from ov_kvcrush.errors import OutOfMemory, RequestError
from ov_kvcrush.pipelines.backend import Backend, Handle
from ov_kvcrush.pipelines.streaming import Streamer, make_sink, pump

RUNNING = ov_genai.GenerationStatus.RUNNING


class RequestLoop:
    """Runs requests of one engine, each call in the thread of its caller."""

    def __init__(self, backend: Backend, tokenizer: ov_genai.Tokenizer) -> None:
        self._backend = backend
        self._tokenizer = tokenizer
        self._ids = itertools.count(1 << 62)  # of requests made here; callers of add_request choose theirs below
        self._active: list[Handle] = []  # of all calls that run, each in its own thread

    def stop(self) -> None:
        """End what runs after its step."""
        for handle in list(self._active):
            handle.stop()

    def run(
        self,
        prompts: Sequence[np.ndarray],
        configs: Sequence[ov_genai.GenerationConfig],
        streamer: Streamer | None,
        metrics: PerfMetrics,
        params: Sequence[CacheParams],
    ) -> list[Handle]:
        """Run prompts to their end together. Fills `metrics`. If anything is raised, none of them is left running."""
        start = time.perf_counter()
        sink = make_sink(streamer, self._tokenizer, configs[0])
        handles: list[Handle] = []
        goes_on = True
        try:
            for ids, config, cache in zip(prompts, configs, params, strict=True):
                handles.append(self._backend.add(next(self._ids), ids, config, cache))
                self._active.append(handles[-1])
            while any(handle.get_status() == RUNNING for handle in handles):
                self._backend.step()
                metrics.inference_s.append(self._backend.last_step().inference)
                metrics.sampling_s.append(self._backend.last_step().sampling)
                if sink and goes_on:
                    goes_on = pump(handles[0], sink)
            if sink:
                if goes_on:  # another thread's step may have brought the last tokens
                    pump(handles[0], sink)
                sink.end()
            self._backend.process_aborts()
        except BaseException:
            self._give_up(handles)
            raise
        finally:
            self._active = [handle for handle in self._active if handle not in handles]
        metrics.generate_s.append(time.perf_counter() - start)
        for handle in handles:
            _add_stats(metrics, handle)
        return handles

    def prefill(self, ids: np.ndarray, params: CacheParams, progress: Progress | None) -> Handle:
        """Run a prompt without an answer, for the snapshots that `params` asks for.

        Raises RequestError if it was stopped, OutOfMemory where a store has no room; then nothing is left of it.
        """
        config = ov_genai.GenerationConfig()
        config.max_new_tokens = 1
        handle = self._backend.add(next(self._ids), ids, config, params)
        self._active.append(handle)
        num_read = 0
        try:
            while handle.get_status() == RUNNING:
                self._backend.step()
                num_read = max(num_read, handle.progress[0])  # one that lost its memory begins again
                if progress:
                    progress(num_read, handle.progress[1])
        except BaseException:
            self._give_up([handle])
            raise
        finally:
            self._active.remove(handle)
        made = handle.fan_out_snapshots
        if len(made) == len(params.fan_out) if params.fan_out else handle.snapshot is not None:
            return handle
        self._give_up([handle])
        if handle.get_status() != ov_genai.GenerationStatus.FINISHED:
            raise RequestError(f"context must be read to its end, got a stop after {num_read} tokens")
        raise OutOfMemory(
            f"context must fit into the KV store beside what is there, got {len(ids)} tokens; raise max_bytes"
        )

    def _give_up(self, handles: list[Handle]) -> None:
        """End requests that nobody waits for any more, and release what they hand out."""
        for handle in handles:
            handle.cancel()
        self._backend.process_aborts()
        for handle in handles:
            for snapshot in (handle.snapshot, *handle.fan_out_snapshots):
                if snapshot is not None:
                    snapshot.release()


def _add_stats(metrics: PerfMetrics, handle: Handle) -> None:
    stats = handle.get_stats()
    metrics.num_input_tokens += stats.num_input_tokens
    metrics.num_reused_tokens += stats.num_reused_tokens
    metrics.kv_bytes += stats.kv_bytes
    if stats.kept_tokens is not None:
        metrics.kept_tokens = (metrics.kept_tokens or 0) + stats.kept_tokens
    for times in stats.token_times:
        metrics.num_generated_tokens += len(times)
        if times:
            metrics.ttft_s.append(times[0] - stats.arrival)
        if len(times) > 1:
            intervals = np.diff(times).tolist()
            metrics.token_intervals_s += intervals
            metrics.tpot_s.append(sum(intervals) / len(intervals))
