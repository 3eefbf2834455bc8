"""Decode steps over a full cache, of attention alone: OpenVINO's PagedAttention, and CrushAttention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino as ov

from ov_kvcrush import native
from ov_kvcrush.bench.attention.graph import CHUNK, Inputs, Shape, Tokens, attention_model, index_of, widths_of
from ov_kvcrush.kvcache.attention_plan import PlanEntry, write_plan
from ov_kvcrush.kvcache.block_pool import BLOCK_SIZE
from ov_kvcrush.kvcache.block_tensors import BlockTensors, cache_inputs
from ov_kvcrush.kvcache.model_inputs import paged_inputs, with_dummy_rows
from ov_kvcrush.model.graph.attention import AttentionLayer, attention_ops
from ov_kvcrush.model.graph.rewrite import CRUSH_PLAN, CRUSH_STORE, PAGED_ROWS, use_crush_attention
from ov_kvcrush.model.plugin import open_core


class StockAttention:
    """PagedAttention over blocks, compiled for each number of threads.

    properties: OpenVINO's, the types of the cache among them. Raises RuntimeError for those that it does not take.
    """

    def __init__(self, layers: Sequence[AttentionLayer], threads: Sequence[int], properties: dict[str, Any]) -> None:
        self._layers = layers
        self._compiled = _compile(attention_model(layers), threads, properties)
        self._requests = {n: compiled.create_infer_request() for n, compiled in self._compiled.items()}
        self._tensors = cache_inputs(next(iter(self._compiled.values())))
        self.bytes_per_block = sum(x.block_bytes for x in self._tensors)

    @property
    def precisions(self) -> tuple[str, str]:
        """Types of the blocks of keys and of values, by OpenVINO's names."""
        ports = {port.any_name: port.element_type.to_string() for port in next(iter(self._compiled.values())).inputs}
        return ports["key_cache.0"], ports["value_cache.0"]

    def nbytes(self, shape: Shape) -> int:
        """Bytes of the blocks of `shape`."""
        return shape.batch * shape.blocks_each * self.bytes_per_block

    def fill(self, tokens: Tokens, shape: Shape) -> None:
        """Cache these tokens and get ready for the next one of each sequence."""
        self._cache = BlockTensors(self._tensors, lambda _: shape.batch * shape.blocks_each)
        for request in self._requests.values():
            self._cache.bind(request)
        filler = next(iter(self._requests.values()))
        for sequence in range(shape.batch):
            for start in range(0, shape.context, CHUNK):
                rows = np.arange(min(CHUNK, shape.context - start))
                # Each block as a prompt of its own, so that filling takes no attention over all that is there.
                begins = np.append(np.arange(0, len(rows), BLOCK_SIZE), len(rows))
                blocks = sequence * shape.blocks_each + start // BLOCK_SIZE + np.arange(len(begins) - 1)
                past = np.zeros(len(blocks), np.int64)
                _set(filler, _paged(past, begins, blocks, np.arange(len(begins)), BLOCK_SIZE))
                _set(filler, tokens.inputs(self._layers, rows))
                filler.infer()
        ends = np.arange(shape.batch + 1)
        tables = _paged(
            np.full(shape.batch, shape.context), ends, np.arange(shape.batch * shape.blocks_each),
            ends * shape.blocks_each, shape.context + 1,
        )  # fmt: skip
        rows = np.arange(shape.batch) % CHUNK
        for request in self._requests.values():
            _set(request, {**tables, **tokens.inputs(self._layers, rows)})

    def prepare(self, threads: int) -> ov.InferRequest:
        """The request whose `infer` is one decode step; the same step each time."""
        return self._requests[threads]

    def outputs(self, threads: int) -> list[np.ndarray]:
        """What each layer gave in the last step: float32 (B, H * D)."""
        return _outputs(self._requests[threads], len(self._layers))


class CrushAttention:
    """CrushAttention over a store of the given types, compiled for each number of threads.

    compute: type that the model computes in, "f32", "bf16" or "f16": that of recent tokens.
    """

    def __init__(
        self,
        layers: Sequence[AttentionLayer],
        store: dict[str, Any],
        compute: str,
        threads: Sequence[int],
        properties: dict[str, Any],
    ) -> None:
        library = native.info()["path"]
        model = attention_model(layers)
        # Layers that do not follow from each other are numbered in the order in which OpenVINO goes through them.
        order = [index_of(op) for op in attention_ops(model)]
        self._layers = [layers[index] for index in order]
        self._options = {**store, "recent": compute}
        self._pages_prompts = not native.can_prefill([layer.shape for layer in layers], compute)
        use_crush_attention(model, library, pages_prompts=self._pages_prompts)
        properties = {**properties, "KV_CACHE_PRECISION": compute}
        self._compiled = _compile(model, threads, properties, library)
        # The one block that all rows outside of prompts are given, if there is PagedAttention.
        self._blocks = BlockTensors(cache_inputs(next(iter(self._compiled.values()))), lambda _: 1)
        self._requests = {n: compiled.create_infer_request() for n, compiled in self._compiled.items()}
        self._store = self._new_store(self._layers)
        self._twins: list[int] = []
        self._has_run: set[int] = set()  # numbers of threads
        for request in self._requests.values():
            self._blocks.bind(request)

    def _new_store(self, layers: Sequence[AttentionLayer]) -> native.Store:
        return native.Store(layers=[layer.shape for layer in layers], **self._options)

    def nbytes(self, shape: Shape) -> int:
        """Bytes that a step over `shape` reads: tiles in use, of layers with a sliding window only those in it."""
        total = 0
        for layer in self._layers:
            store = self._new_store([layer])
            seen = min(layer.window, shape.context) if layer.window else shape.context
            total += store.bytes_for(seen)
            store.close()
        return shape.batch * total

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tiles in the store."""
        return self._store.nbytes

    def fill(self, tokens: Tokens, shape: Shape) -> None:
        """Cache these tokens and get ready for the next one of each sequence."""
        self._release()
        self._store.close()
        self._store = self._new_store(self._layers)
        self._shape = shape
        self._sequences = [self._store.create() for _ in range(shape.batch)]
        for start in range(0, shape.context, CHUNK):
            rows = np.arange(min(CHUNK, shape.context - start))
            inputs = tokens.inputs(self._layers, rows)
            for sequence in self._sequences:
                self._store.reserve(sequence, len(rows))
                for index, layer in enumerate(self._layers):
                    _, k, v = (inputs[name] for name in widths_of(layer))
                    self._store.append(sequence, index, k, v, start)
                self._store.quantize_aged(sequence)
        rows = np.arange(shape.batch) % CHUNK
        tables = with_dummy_rows(paged_inputs([], []), shape.batch, 0) if self._pages_prompts else {}
        for request in self._requests.values():
            store_id = np.array([self._store.id], np.int32)
            _set(request, {**tokens.inputs(self._layers, rows), **tables, CRUSH_STORE: store_id})
        self._has_run = set()

    def prepare(self, threads: int) -> ov.InferRequest:
        """The request whose `infer` is one decode step; the same step each time.

        A step adds a token to the store, so it runs on twins of the sequences, which share all their tiles.
        """
        self._release()
        self._twins = [self._store.fork(sequence) for sequence in self._sequences]
        for twin in self._twins:
            self._store.reserve(twin, 1)
        entries = [PlanEntry(twin, row, 1, self._shape.context) for row, twin in enumerate(self._twins)]
        plan = write_plan(len(entries), 0, entries)
        request = self._requests[threads]
        _set(request, {CRUSH_PLAN: plan})
        if self._pages_prompts:
            # As in the engine: PagedAttention runs once, so that its output has a shape, and is skipped from then on.
            paged_rows = 0 if threads in self._has_run else len(self._twins)
            self._has_run.add(threads)
            _set(request, {PAGED_ROWS: np.array([paged_rows], np.int64)})
        return request

    def _release(self) -> None:
        for twin in self._twins:
            self._store.release(twin)
        self._twins = []

    def outputs(self, threads: int) -> list[np.ndarray]:
        """What each layer gave in the last step: float32 (B, H * D)."""
        return _outputs(self._requests[threads], len(self._layers))


def _compile(
    model: ov.Model, threads: Sequence[int], properties: dict[str, Any], library: str | None = None
) -> dict[int, ov.CompiledModel]:
    core = open_core()
    if library:
        core.add_extension(library)
    return {n: core.compile_model(model, "CPU", {**properties, "INFERENCE_NUM_THREADS": n}) for n in threads}


def _paged(past: np.ndarray, begins: np.ndarray, blocks: np.ndarray, ends: np.ndarray, longest: int) -> Inputs:
    values = {
        "past_lens": past, "subsequence_begins": begins, "block_indices": blocks, "block_indices_begins": ends,
        "max_context_len": np.array(longest),
    }  # fmt: skip
    return {name: np.asarray(value, np.int32) for name, value in values.items()}


def _set(request: ov.InferRequest, inputs: Inputs) -> None:
    for name, value in inputs.items():
        request.set_tensor(name, ov.Tensor(np.asarray(value)))


def _outputs(request: ov.InferRequest, num_layers: int) -> list[np.ndarray]:
    rows = [request.get_output_tensor(i).data for i in range(num_layers)]
    return [x.reshape(x.shape[0], -1).copy() for x in rows]
