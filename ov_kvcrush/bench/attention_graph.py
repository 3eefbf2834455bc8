"""Models that are nothing but attention layers, with a full cache: OpenVINO's PagedAttention, and CrushAttention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset15 as ops

from ov_kvcrush import native
from ov_kvcrush.engine.block_pool import BLOCK_SIZE, blocks_for
from ov_kvcrush.engine.kv_cache import KVCache
from ov_kvcrush.engine.paged_memory import paged_inputs
from ov_kvcrush.graph.attention import AttentionLayer
from ov_kvcrush.graph.rewrite import CRUSH_PLAN, CRUSH_STORE, PROMPT_ROWS, use_crush_attention

CHUNK = 32 * BLOCK_SIZE  # tokens that are written to a cache at once
_PLAN_VERSION, _STORED, _STAGED, _NO_SCORES = 1, 0, 1, 0  # see native/src/plan.hpp

Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Shape:
    """What is cached: `batch` sequences of `context` tokens each, in every layer."""

    context: int
    batch: int

    @property
    def blocks_each(self) -> int:
        """Blocks of one sequence and its next token."""
        return blocks_for(self.context + 1)


@dataclass(frozen=True)
class Tokens:
    """Random queries, keys and values float32 (CHUNK, channels), for layers of any width: the first channels are taken.

    Keys have a mean of their own in each channel, as real ones have. Every chunk of every layer gets the same ones.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray

    @classmethod
    def random(cls, layers: Sequence[AttentionLayer], seed: int = 0) -> Tokens:
        """Wide enough for `layers`."""
        rng = np.random.default_rng(seed)
        wide = max(x.num_heads * x.head_size for x in layers)
        narrow = max(x.num_kv_heads * x.head_size for x in layers)
        q, k, v = (rng.standard_normal((CHUNK, n), np.float32) for n in (wide, narrow, narrow))
        return cls(q, k + 2 * rng.standard_normal((1, narrow), np.float32), v)

    def inputs(self, layers: Sequence[AttentionLayer], rows: np.ndarray) -> Inputs:
        """The inputs q, k, v of a model of `layers` for these rows of the tokens."""
        wanted = {name: width for layer in layers for name, width in _widths(layer).items()}
        return {
            name: np.ascontiguousarray(getattr(self, name.split(".")[0])[rows, :n]) for name, n in wanted.items()
        }


def _widths(layer: AttentionLayer) -> dict[str, int]:
    q, kv = layer.num_heads * layer.head_size, layer.num_kv_heads * layer.head_size
    return {f"q.{q}": q, f"k.{kv}": kv, f"v.{kv}": kv}


def attention_model(layers: Sequence[AttentionLayer]) -> ov.Model:
    """PagedAttention of these layers, as OpenVINO's own rewrite of a whole model makes it.

    Layers of the same width read the same q, k and v; each writes an output of its own, one after the other.
    """
    i32 = ov.Type.i32
    parameters = {name: _parameter(name, [-1], i32) for name in ("past_lens", "subsequence_begins", "block_indices")}
    parameters["block_indices_begins"] = _parameter("block_indices_begins", [-1], i32)
    parameters["max_context_len"] = _parameter("max_context_len", [], i32)
    results = []
    for index, layer in enumerate(layers):
        rows = []
        for name, width in _widths(layer).items():
            rows.append(parameters.setdefault(name, _parameter(name, [-1, width], ov.Type.f32)))
        for kind in ("key_cache", "value_cache"):
            name = f"{kind}.{index}"
            parameters[name] = _parameter(name, [-1, -1, -1, -1], ov.Type.dynamic)
            rows.append(parameters[name])
        results.append(ops.result(_paged_attention(layer, rows, parameters).output(0)))
    return ov.Model(results, list(parameters.values()))


def _paged_attention(layer: AttentionLayer, rows: list[ov.Node], parameters: dict[str, ov.Node]) -> ov.Node:
    from openvino.op import _PagedAttentionExtension

    def number(value: float, dtype: Any = np.int32) -> ov.Node:
        return ops.constant(np.array(value, dtype))

    def none(dtype: Any = np.int32, rank: int = 1) -> ov.Node:
        return ops.constant(np.zeros((0,) * rank, dtype))

    f32 = np.float32
    inputs = [
        *rows,
        *(parameters[x] for x in ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")),
        *(number(layer.scale, f32), number(layer.window), none(f32), parameters["max_context_len"]),
        *(none(), none(), none(), none(f32), none(f32), number(0), number(0), none(f32, 4), number(0)),
        *(none(), none(), none(), none(), none(np.uint8), none()),
    ]
    op = _PagedAttentionExtension([node.output(0) for node in inputs])
    for kind in "kv":
        op.get_rt_info()[f"num_{kind}_heads"] = layer.num_kv_heads
        op.get_rt_info()[f"{kind}_head_size"] = layer.head_size
    return op


def _parameter(name: str, shape: list[int], element_type: ov.Type) -> ov.Node:
    node = ops.parameter(ov.PartialShape(shape), element_type, name=name)
    node.output(0).get_tensor().set_names({name})
    return node


class StockAttention:
    """PagedAttention over blocks of `precision` ("u8", ...), compiled for each number of threads.

    properties: OpenVINO's. Raises RuntimeError for those that it does not take.
    """

    def __init__(
        self, layers: Sequence[AttentionLayer], precision: str, threads: Sequence[int], properties: dict[str, Any]
    ) -> None:
        self._layers = layers
        properties = {**properties, "KV_CACHE_PRECISION": precision}
        self._compiled = _compile(attention_model(layers), threads, properties)
        self._requests = {n: compiled.create_infer_request() for n, compiled in self._compiled.items()}
        self.bytes_per_block = KVCache(next(iter(self._compiled.values())), lambda _: 1).bytes_per_block

    def nbytes(self, shape: Shape) -> int:
        """Bytes of the blocks of `shape`."""
        return shape.batch * shape.blocks_each * self.bytes_per_block

    def fill(self, tokens: Tokens, shape: Shape) -> None:
        """Cache these tokens and get ready for the next one of each sequence."""
        compiled = next(iter(self._compiled.values()))
        self._cache = KVCache(compiled, lambda _: shape.batch * shape.blocks_each)
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
        self._layers = layers
        self._options = {**store, "recent": compute}
        library = native.info()["path"]
        model = attention_model(layers)
        use_crush_attention(model, library)
        properties = {**properties, "KV_CACHE_PRECISION": compute}
        self._compiled = _compile(model, threads, properties, library)
        # Of blocks for prompts there must be one, though no prompt is read.
        self._blocks = KVCache(next(iter(self._compiled.values())), lambda _: 1)
        self._requests = {n: compiled.create_infer_request() for n, compiled in self._compiled.items()}
        self._store = self._new_store(layers)
        self._twins: list[int] = []
        for request in self._requests.values():
            self._blocks.bind(request)
            self._run_prompt_row(request)
            _set(request, {**paged_inputs([]), PROMPT_ROWS: np.zeros(1, np.int64)})

    def _run_prompt_row(self, request: ov.InferRequest) -> None:
        """Let PagedAttention give an output once: the plugin skips operations that read an empty tensor, so that
        CrushAttention would never run."""
        sequence = self._store.create()
        plan = [_PLAN_VERSION, 1, 1, 1, sequence, 0, 1, 0, _STAGED, _NO_SCORES]
        rows = Tokens.random(self._layers).inputs(self._layers, np.arange(1))
        tables = _paged(np.zeros(1), np.arange(2), np.zeros(1), np.arange(2), 1)
        store_id = np.array([self._store.id], np.int32)
        crush = {PROMPT_ROWS: np.ones(1, np.int64), CRUSH_STORE: store_id, CRUSH_PLAN: np.array(plan, np.int32)}
        _set(request, {**rows, **tables, **crush})
        request.infer()
        self._store.release(sequence)

    def _new_store(self, layers: Sequence[AttentionLayer]) -> native.Store:
        shapes = [(x.num_heads, x.num_kv_heads, x.head_size, x.window, x.scale) for x in layers]
        return native.Store(layers=shapes, **self._options)

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
                    _, k, v = (inputs[name] for name in _widths(layer))
                    self._store.append(sequence, index, k, v, start)
                self._store.settle(sequence)
        rows = np.arange(shape.batch) % CHUNK
        for request in self._requests.values():
            store_id = np.array([self._store.id], np.int32)
            _set(request, {**tokens.inputs(self._layers, rows), CRUSH_STORE: store_id})

    def prepare(self, threads: int) -> ov.InferRequest:
        """The request whose `infer` is one decode step; the same step each time.

        A step adds a token to the store, so it runs on twins of the sequences, which share all their tiles.
        """
        self._release()
        self._twins = [self._store.fork(sequence) for sequence in self._sequences]
        plan = [_PLAN_VERSION, len(self._twins), 0, len(self._twins)]
        for row, twin in enumerate(self._twins):
            self._store.reserve(twin, 1)
            plan += [twin, row, 1, self._shape.context, _STORED, _NO_SCORES]
        request = self._requests[threads]
        _set(request, {CRUSH_PLAN: np.array(plan, np.int32)})
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
    core = ov.Core()
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
        request.set_tensor(name, ov.Tensor(value))


def _outputs(request: ov.InferRequest, num_layers: int) -> list[np.ndarray]:
    rows = [request.get_output_tensor(i).data for i in range(num_layers)]
    return [x.reshape(x.shape[0], -1).copy() for x in rows]
