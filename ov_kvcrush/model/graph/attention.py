"""Shapes and scales of the attention layers of a model, read from its PagedAttention operations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import openvino as ov

from ov_kvcrush.errors import ModelError
from ov_kvcrush.model.plugin import open_core

# Inputs of PagedAttentionExtension.
Q, K, V, KEY_CACHE, VALUE_CACHE, SCALE, SLIDING_WINDOW, ALIBI_SLOPES, SINKS = 0, 1, 2, 3, 4, 9, 10, 11, 20

MIN_HEAD_SIZE, MAX_HEAD_SIZE, HEAD_SIZE_STEP = 32, 256, 16
MAX_GROUP = 16


@dataclass(frozen=True)
class AttentionLayer:
    """One attention operation. window: tokens a token sees, itself included; 0 = all before it. scale: of q . k.

    soft_cap: score = soft_cap * tanh(score / soft_cap), 0 = none. alibi_slopes: of each query head, score += slope *
    (position of the token - position of the row). sinks: of each query head, a score more in the sum of the softmax.
    """

    name: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    window: int
    scale: float
    soft_cap: float = 0.0
    alibi_slopes: tuple[float, ...] = ()
    sinks: tuple[float, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int, int, float, float, tuple[float, ...], tuple[float, ...]]:
        """All but the name, as the native store takes it."""
        return (
            self.num_heads, self.num_kv_heads, self.head_size, self.window, self.scale,
            self.soft_cap, self.alibi_slopes, self.sinks,
        )  # fmt: skip


def attention_ops(model: ov.Model) -> list[ov.Node]:
    """The PagedAttention operations, first layer first."""
    return [op for op in model.get_ordered_ops() if op.get_type_name() == "PagedAttentionExtension"]


def read_layer(op: ov.Node, soft_cap: float = 0.0) -> AttentionLayer:
    """Read one PagedAttention operation. Raises ModelError naming it if CrushAttention cannot stand in for it.

    soft_cap: of the scores, which no operation of OpenVINO has (see `score_terms`).
    """
    info = {key: value.value for key, value in op.get_rt_info().items()}
    name = op.get_friendly_name()
    head_size, num_kv_heads = int(info["k_head_size"]), int(info["num_k_heads"])
    width = op.input_value(Q).get_partial_shape()[-1].get_length()
    layer = AttentionLayer(
        name=name,
        num_heads=width // head_size,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        window=int(_constant(op, SLIDING_WINDOW, name)),
        scale=_scale(op, name, head_size),
        soft_cap=soft_cap,
        alibi_slopes=_per_head(op, ALIBI_SLOPES, name, width // head_size),
        sinks=_per_head(op, SINKS, name, width // head_size),
    )
    if int(info["v_head_size"]) != head_size or int(info["num_v_heads"]) != num_kv_heads:
        raise ModelError(
            f"keys and values of layer {name!r} must have the same heads, "
            f"got {num_kv_heads} x {head_size} and {info['num_v_heads']} x {info['v_head_size']}"
        )
    check_layer(layer)
    return layer


def check_layer(layer: AttentionLayer) -> None:
    """Raise ModelError naming the layer if the kernels do not have its head size or its group."""
    if not MIN_HEAD_SIZE <= layer.head_size <= MAX_HEAD_SIZE or layer.head_size % HEAD_SIZE_STEP:
        raise ModelError(
            f"head size of layer {layer.name!r} must be a multiple of {HEAD_SIZE_STEP} in "
            f"{MIN_HEAD_SIZE}..{MAX_HEAD_SIZE}, got {layer.head_size}; cache_config attention='paged' can run it"
        )
    group, rest = divmod(layer.num_heads, layer.num_kv_heads)
    if rest or not 1 <= group <= MAX_GROUP:
        raise ModelError(
            f"query heads per KV head of layer {layer.name!r} must be an integer in 1..{MAX_GROUP}, "
            f"got {layer.num_heads} / {layer.num_kv_heads}; cache_config attention='paged' can run it"
        )


def _scale(op: ov.Node, name: str, head_size: int) -> float:
    if _is_empty(op.input_value(SCALE)):  # PagedAttention's own default
        return float(1 / np.sqrt(head_size))
    return float(_constant(op, SCALE, name))


def _is_empty(value: ov.Output) -> bool:
    shape = value.get_partial_shape()
    return shape.is_static and 0 in shape.to_shape()


def _per_head(op: ov.Node, index: int, name: str, num_heads: int) -> tuple[float, ...]:
    """An input that has a number for each query head, or none."""
    if _is_empty(op.input_value(index)):
        return ()
    numbers = _constants(op, index, name)
    if len(numbers) != num_heads or not np.isfinite(numbers).all():
        raise ModelError(
            f"ALiBi slopes and sinks of layer {name!r} must be {num_heads} finite numbers, got {len(numbers)}"
        )
    return tuple(map(float, numbers))


def _constant(op: ov.Node, index: int, name: str) -> float:
    return float(_constants(op, index, name)[0])


def _constants(op: ov.Node, index: int, name: str) -> np.ndarray:
    """The numbers that an input is. The windows of gemma3 are small expressions of constants: those are computed."""
    value = op.input_value(index)
    if value.get_node().get_type_name() == "Constant":
        return np.asarray(value.get_node().data).reshape(-1)
    try:
        result = open_core().compile_model(ov.Model([value], []), "CPU")([])[0]
    except RuntimeError:
        raise ModelError(f"scale, sliding window, ALiBi slopes and sinks of layer {name!r} must be constants") from None
    return np.asarray(result).reshape(-1)
