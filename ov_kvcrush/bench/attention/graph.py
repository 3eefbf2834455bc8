"""A model that is nothing but attention layers, and what is fed to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset15 as ops

from ov_kvcrush.kvcache.block_pool import BLOCK_SIZE, blocks_for
from ov_kvcrush.model.graph.attention import AttentionLayer

CHUNK = 32 * BLOCK_SIZE  # tokens that are written to a cache at once

_NAME = "layer."  # of an operation, before its index

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
        wanted = {name: width for layer in layers for name, width in widths_of(layer).items()}
        return {name: np.ascontiguousarray(getattr(self, name.split(".")[0])[rows, :n]) for name, n in wanted.items()}


def widths_of(layer: AttentionLayer) -> dict[str, int]:
    """Names and channels of the inputs q, k and v of a layer."""
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
        for name, width in widths_of(layer).items():
            rows.append(parameters.setdefault(name, _parameter(name, [-1, width], ov.Type.f32)))
        for kind in ("key_cache", "value_cache"):
            name = f"{kind}.{index}"
            parameters[name] = _parameter(name, [-1, -1, -1, -1], ov.Type.dynamic)
            rows.append(parameters[name])
        op = _paged_attention(layer, rows, parameters)
        op.set_friendly_name(f"{_NAME}{index}")
        results.append(ops.result(op.output(0)))
    return ov.Model(results, list(parameters.values()))


def index_of(op: ov.Node) -> int:
    """Which of the layers of `attention_model` an operation is."""
    return int(op.get_friendly_name().removeprefix(_NAME))


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
