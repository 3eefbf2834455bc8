"""Attention alone: a decode step of all layers over a full cache, PagedAttention's and ours, beside memory speed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import openvino as ov

from ov_kvcrush import native
from ov_kvcrush.bench.attention.graph import Shape, Tokens
from ov_kvcrush.bench.attention.memory_speed import MemoryReader, reader_bytes
from ov_kvcrush.bench.attention.steps import CrushAttention, StockAttention
from ov_kvcrush.bench.settings import check_precisions
from ov_kvcrush.cli.console import Report
from ov_kvcrush.cli.environment import usable_threads
from ov_kvcrush.cli.parse import Property, check_at_least, check_numbers
from ov_kvcrush.config import CacheConfig
from ov_kvcrush.errors import CrushError, ModelError, reason_of
from ov_kvcrush.model.folder import IR_NAME, check_model_folder
from ov_kvcrush.model.graph.attention import AttentionLayer, attention_ops, read_layer
from ov_kvcrush.model.graph.rewrite import use_paged_attention
from ov_kvcrush.model.plugin import plugin_precisions
from ov_kvcrush.utils.process_memory import free_memory_bytes

STOCK_PRECISION = "u8"
_WARM_UP = 2  # steps


@dataclass(frozen=True)
class AttentionSettings:
    """What is measured, checked before anything heavy starts.

    contexts: cached tokens of each sequence. batches: sequences. threads: of the inference; () = all of this process.
    key_precision, value_precision: of our store; PagedAttention always has u8, OpenVINO's default.
    Raises CrushError naming the option, its rule and the value.
    """

    contexts: tuple[int, ...] = (1024, 4096, 16384)
    batches: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = ()
    runs: int = 15
    key_precision: str = "u8"
    value_precision: str = "u8"
    properties: Mapping[str, Property] = field(default_factory=dict)

    def __post_init__(self) -> None:
        available = usable_threads() or 1
        object.__setattr__(self, "threads", self.threads or (available,))
        for option, values in (("context", self.contexts), ("batch", self.batches), ("threads", self.threads)):
            check_numbers(option, values)
        if max(self.threads) > available:
            raise CrushError(f"--threads must be at most the {available} of this process, got {max(self.threads)}")
        check_at_least("runs", self.runs, 1)
        check_precisions(self.key_precision, self.value_precision, self.properties)
        if "INFERENCE_NUM_THREADS" in self.properties:
            raise CrushError("--property INFERENCE_NUM_THREADS must be left out with --attention; use --threads")
        if not native.available():
            raise CrushError(f"--attention must have the native library, got none: {native.why_unavailable()}")

    @property
    def shapes(self) -> list[Shape]:
        """All combinations of context and batch."""
        return [Shape(context, batch) for batch in self.batches for context in self.contexts]

    @property
    def num_stages(self) -> int:
        """How often `measure_attention` reports."""
        return 1 + len(self.shapes) * (1 + len(self.threads))


@dataclass(frozen=True)
class AttentionRow:
    """One decode step of all layers. Times are medians over the runs.

    speedup: stock_ms / crush_ms. crush_bytes, stock_bytes: cache that a step reads. crush_gb_s, stock_gb_s: so many
    bytes in so much time, in 1e9 bytes per second. memory_gb_s: what all threads of this process read, measured in
    between. bound_ms: our bytes at that speed. over_bound: crush_ms / bound_ms.
    """

    context: int
    batch: int
    threads: int
    num_layers: int
    key_precision: str
    value_precision: str
    stock_ms: float
    crush_ms: float
    speedup: float
    stock_bytes: int
    crush_bytes: int
    stock_gb_s: float
    crush_gb_s: float
    memory_gb_s: float
    bound_ms: float
    over_bound: float
    stock_ms_each: list[float]
    crush_ms_each: list[float]
    memory_gb_s_each: list[float]


def layers_of(model: Path, num_layers: int | None = None) -> list[AttentionLayer]:
    """The attention layers of an exported model, the first `num_layers` of them. Raises ModelError."""
    check_model_folder(model, tokenizer=False)
    try:
        graph = ov.Core().read_model(model / f"{IR_NAME}.xml")
    except RuntimeError as error:
        raise ModelError(f"model in {str(model)!r} must be readable, got: {reason_of(error)}") from None
    use_paged_attention(graph)
    layers = [read_layer(op) for op in attention_ops(graph)]
    if num_layers is not None and num_layers > len(layers):
        raise CrushError(f"--layers must be at most the model's {len(layers)}, got {num_layers}")
    return layers[:num_layers]


class _Bench:
    """Both models, compiled for each number of threads, and what reads memory beside them."""

    def __init__(self, layers: list[AttentionLayer], settings: AttentionSettings) -> None:
        properties: dict[str, Any] = dict(settings.properties)
        store = {name: getattr(settings, f"{name}_precision") for name in ("key", "value")}
        defaults = CacheConfig()
        store |= {name: getattr(defaults, name) for name in ("recent_tokens", "group_size")}
        try:
            compute = plugin_precisions(properties).inference
            stock = {**properties, "KV_CACHE_PRECISION": STOCK_PRECISION}
            self.stock = StockAttention(layers, settings.threads, stock)
            self.crush = CrushAttention(layers, store, compute, settings.threads, properties)
        except RuntimeError as error:
            raise CrushError(f"--property must be one that the CPU takes, got: {reason_of(error)}") from None
        self.settings = settings
        self.tokens = Tokens.random(layers)
        self.num_layers = len(layers)
        self._check_memory()
        self.reader = MemoryReader(reader_bytes(), usable_threads() or 1)

    def _check_memory(self) -> None:
        shape = max(self.settings.shapes, key=self.stock.nbytes)
        needed, free = self.stock.nbytes(shape) + self.crush.nbytes(shape) + reader_bytes(), free_memory_bytes()
        if needed > free:
            raise CrushError(
                f"--context and --batch must fit into {free >> 20} MiB of free memory, got {shape.context} and "
                f"{shape.batch}, which take {needed >> 20} MiB; --layers takes fewer layers"
            )

    def fill(self, shape: Shape) -> None:
        """Cache the same tokens in both."""
        self.stock.fill(self.tokens, shape)
        self.crush.fill(self.tokens, shape)

    def measure(self, shape: Shape, threads: int) -> AttentionRow:
        """Let both take turns; before each step memory is read elsewhere, as weights are between two layers."""
        times: dict[str, list[float]] = {"stock": [], "crush": []}
        speeds: list[float] = []
        for run in range(-_WARM_UP, self.settings.runs):
            order = ("stock", "crush") if run % 2 else ("crush", "stock")
            for name in order:
                request = (self.stock if name == "stock" else self.crush).prepare(threads)
                speed = self.reader.read()
                start = time.perf_counter()
                request.infer()
                seconds = time.perf_counter() - start
                if run >= 0:
                    times[name].append(1e3 * seconds)
                    speeds.append(speed / 1e9)
        return self._row(shape, threads, times["stock"], times["crush"], speeds)

    def _row(
        self, shape: Shape, threads: int, stock: list[float], crush: list[float], speeds: list[float]
    ) -> AttentionRow:
        stock_ms, crush_ms, memory_gb_s = median(stock), median(crush), median(speeds)
        stock_bytes, crush_bytes = self.stock.nbytes(shape), self.crush.nbytes(shape)
        bound_ms = crush_bytes / memory_gb_s / 1e6
        return AttentionRow(
            context=shape.context,
            batch=shape.batch,
            threads=threads,
            num_layers=self.num_layers,
            key_precision=self.settings.key_precision,
            value_precision=self.settings.value_precision,
            stock_ms=stock_ms,
            crush_ms=crush_ms,
            speedup=stock_ms / crush_ms,
            stock_bytes=stock_bytes,
            crush_bytes=crush_bytes,
            stock_gb_s=stock_bytes / stock_ms / 1e6,
            crush_gb_s=crush_bytes / crush_ms / 1e6,
            memory_gb_s=memory_gb_s,
            bound_ms=bound_ms,
            over_bound=crush_ms / bound_ms,
            stock_ms_each=stock,
            crush_ms_each=crush,
            memory_gb_s_each=speeds,
        )


def measure_attention(
    layers: list[AttentionLayer], settings: AttentionSettings, report: Report
) -> Iterator[AttentionRow]:
    """Yield the rows one by one; `report` is told what begins. Raises CrushError for what cannot be."""
    report("compiling")
    bench = _Bench(layers, settings)
    try:
        for shape in settings.shapes:
            report(f"context {shape.context}, batch {shape.batch}: filling")
            bench.fill(shape)
            for threads in settings.threads:
                report(f"context {shape.context}, batch {shape.batch}, threads {threads}")
                yield bench.measure(shape, threads)
    finally:
        bench.reader.close()
