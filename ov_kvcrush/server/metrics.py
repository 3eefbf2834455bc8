"""Figures for Prometheus: a registry of its own for each app."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ov_kvcrush.core.outputs import PipelineMetrics, RequestStats

TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
TPOT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
STEP_BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2.5, 5)
E2E_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
_PREFIX = "ov_kvcrush_"
_MOST_STEPS = 65536  # numbers of steps that are remembered, so that each is counted once


class Metrics:
    """What an app counts. All of it may be called from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(_PREFIX + name, text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(_PREFIX + name, text, buckets=buckets, registry=self.registry)

        self.requests = counter("requests", "Requests of the engine by how they ended", "end")
        self.responses = counter("http_responses", "Answers by path and status", "path", "status")
        self.ttft = histogram("time_to_first_token_seconds", "From arrival to the first token", TTFT_BUCKETS)
        self.tpot = histogram("time_per_output_token_seconds", "Mean of a sequence after its first", TPOT_BUCKETS)
        self.e2e = histogram("request_seconds", "From arrival to the last token", E2E_BUCKETS)
        self.step = histogram("step_seconds", "Steps of the engine", STEP_BUCKETS)
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts, reused ones included")
        self.reused_tokens = counter("reused_tokens", "Tokens of prompts whose KV was there")
        self.generation_tokens = counter("generation_tokens", "Tokens of answers")
        self.prefix_lookups = counter("prefix_lookups", "Prompts without a context: each is looked for")
        self.prefix_hits = counter("prefix_hits", "Prompts that began with a cached prefix")
        self.context_lookups = counter("context_lookups", "Requests that named a context")
        self.context_hits = counter("context_hits", "Of these, those whose context was in the store")
        self.context_loads = counter("context_loads", "Contexts that came back from their files")
        self.context_evictions = counter("context_evictions", "Contexts that left the store for their files")
        self._steps: set[int] = set()

    def watch(self, read: Callable[[], PipelineMetrics], contexts: Callable[[], tuple[int, int, int]]) -> None:
        """Show the engine's state whenever somebody asks. contexts: how many there are, in the store, and its bytes."""
        self.registry.register(_EngineState(read, contexts))

    def note(self, end: str, stats: RequestStats, num_generated: int, *, has_context: bool) -> None:
        """Count a request that has ended."""
        self.requests.labels(end).inc()
        self.prompt_tokens.inc(stats.num_input_tokens)
        self.reused_tokens.inc(stats.num_reused_tokens)
        self.generation_tokens.inc(num_generated)
        if not has_context:
            self.prefix_lookups.inc()
            self.prefix_hits.inc(stats.num_reused_tokens > 0)
        times = [moments for moments in stats.token_times if moments]
        if times:
            self.ttft.observe(min(moments[0] for moments in times) - stats.arrival)
            self.e2e.observe(max(moments[-1] for moments in times) - stats.arrival)
        for moments in times:
            if len(moments) > 1:
                self.tpot.observe((moments[-1] - moments[0]) / (len(moments) - 1))
        for number, seconds in stats.steps:
            if number not in self._steps:
                self._steps.add(number)
                self.step.observe(seconds.inference + seconds.overhead)
        if len(self._steps) > _MOST_STEPS:
            self._steps = set(sorted(self._steps)[-_MOST_STEPS // 2 :])

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineState:
    """Gauges that are read when they are asked for."""

    def __init__(self, read: Callable[[], PipelineMetrics], contexts: Callable[[], tuple[int, int, int]]) -> None:
        self._read = read
        self._contexts = contexts

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client's Collector."""
        now = self._read()
        num_contexts, num_resident, context_bytes = self._contexts()
        gauges = {
            "requests_running": ("Requests with memory in the engine", now.scheduled_requests),
            "requests_waiting": ("Requests that wait for their turn", now.requests - now.scheduled_requests),
            "kv_bytes": ("Keys and values in the store", now.kv_cache_size_in_bytes),
            "kv_bytes_limit": ("The most that the store may hold", now.cache_size_in_bytes),
            "kv_staging_bytes": ("Blocks of prompts that are being read", now.staging_size_in_bytes),
            "contexts": ("Contexts, in the store or in files", num_contexts),
            "contexts_resident": ("Contexts in the store", num_resident),
            "context_bytes": ("Bytes of contexts in the store, shared ones counted once", context_bytes),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(_PREFIX + name, text, value)
        yield CounterMetricFamily(_PREFIX + "preemptions", "Sequences that lost their memory", now.num_preemptions)
