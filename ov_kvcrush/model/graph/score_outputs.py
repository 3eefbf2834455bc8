"""Attention scores as extra outputs of a stateful model, in standard operations: they run on any device.

Of each layer and query head: the mean, over the last min(W, T) of a step's T query rows, of the softmax of
`scale * q . k + mask` over all cached tokens and the T new ones. The mask is the layer's own: causal, with its sliding
window if it has one, and without padded tokens. Output `attention_scores.<layer>`: f32 [batch, query heads, context].
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import openvino.opset15 as ops

from ov_kvcrush.errors import ModelError, reason_of
from ov_kvcrush.model.folder import IR_NAME, SCORES_NAME
from ov_kvcrush.model.graph.rewrite import ATTENTION_SCORES
from ov_kvcrush.utils.checks import check_integer

# Inputs of ScaledDotProductAttention. A sixth one would be sinks.
_Q, _K, _V, _MASK, _SCALE, _NUM_INPUTS = 0, 1, 2, 3, 4, 5
_LAST = np.iinfo(np.int64).max


def read_scores_model(folder: str | Path, core: ov.Core | None = None) -> ov.Model:
    """The model with the outputs `attention_scores.<layer>`, over the weights file of the model beside it.

    Raises ModelError if the folder has none, or one that cannot be read.
    """
    xml, weights = (Path(folder) / name for name in (f"{SCORES_NAME}.xml", f"{IR_NAME}.bin"))
    if not xml.is_file():
        raise ModelError(f"model must have {xml.name}, got {folder} without: export it with --attention-scores W")
    try:
        return (core or ov.Core()).read_model(xml, weights)
    except RuntimeError as error:
        raise ModelError(f"{xml} must be a readable OpenVINO model, got: {reason_of(error)}") from None


def add_score_outputs(model: ov.Model, window: int) -> int:
    """Add an output for each layer of a stateful model, W = window; return how many.

    Raises CrushError for a wrong window, ModelError if the model has attention whose scores cannot be told.
    """
    check_integer("window", window, 1)
    layers = [op for op in model.get_ordered_ops() if op.get_type_name() == "ScaledDotProductAttention"]
    if not layers:
        raise ModelError("model must use ScaledDotProductAttention to have attention scores, got a graph without")
    for layer, attention in enumerate(layers):
        _check(attention)
        _mend_repeat(attention)
        scores = _mean_attention(attention, window)
        name = f"{ATTENTION_SCORES}.{layer}"
        scores.set_friendly_name(name)
        scores.output(0).get_tensor().set_names({name})
        model.add_outputs([scores.output(0)])
    model.validate_nodes_and_infer_types()
    return len(layers)


def _check(attention: ov.Node) -> None:
    name, num_inputs = attention.get_friendly_name(), attention.get_input_size()
    if attention.get_attributes()["causal"] or num_inputs <= _MASK:
        raise ModelError(f"attention of layer {name!r} must be given its mask, got one that makes its own")
    if num_inputs > _NUM_INPUTS:
        raise ModelError(f"attention of layer {name!r} must be without sinks, which its scores would leave out")
    shape = attention.input_value(_Q).get_partial_shape()
    if len(shape) != 4 or shape[1].is_dynamic or shape[3].is_dynamic:
        raise ModelError(f"queries of layer {name!r} must be [batch, heads, tokens, head size], got {shape}")


def _mean_attention(attention: ov.Node, window: int) -> ov.Node:
    """f32 [batch, query heads, context]"""
    queries, keys = _last_rows(attention.input_value(_Q), window), _stored_keys(attention)
    num_heads, num_kv_heads, head_size = _length(queries, 1), _length(keys, 1), _length(queries, 3)
    if attention.get_input_size() > _SCALE:
        scale = attention.input_value(_SCALE)
    else:
        scale = ops.constant(np.float32(head_size**-0.5)).output(0)
    rows = ops.multiply(queries, scale).output(0)
    if num_heads != num_kv_heads:  # the heads of a group as more rows of their KV head: [batch, K, G * rows, D]
        rows = ops.reshape(rows, _integers(0, num_kv_heads, -1, head_size), special_zero=True).output(0)
    logits = ops.matmul(rows, keys, transpose_a=False, transpose_b=True).output(0)
    if num_heads != num_kv_heads:
        logits = ops.reshape(logits, _integers(0, num_heads, -1, 0), special_zero=True).output(0)
    mask = _last_rows(attention.input_value(_MASK), window)
    if mask.get_element_type() == ov.Type.boolean:
        logits = ops.select(mask, logits, ops.constant(np.float32(np.finfo(np.float32).min))).output(0)
    else:
        logits = ops.add(logits, mask).output(0)
    return ops.reduce_mean(ops.softmax(logits, -1), _integers(2), keep_dims=False)


def _stored_keys(attention: ov.Node) -> ov.Output:
    """Keys as they are cached, [batch, KV heads, context, D], before each is repeated for the heads of its group."""
    keys = attention.input_value(_K)
    repeat = _repeat(keys)
    if repeat and repeat[1].get_type_name() == "Unsqueeze":
        unsqueeze = repeat[1]
        axis = unsqueeze.input_value(1).get_node()
        if axis.get_type_name() == "Constant" and np.asarray(axis.data).reshape(-1).tolist() in ([2], [-3]):
            return _checked_keys(attention, unsqueeze.input_value(0))
    return _checked_keys(attention, keys)


def _mend_repeat(attention: ov.Node) -> None:
    """Models made from GGUF repeat the cache to a length of 0, meaning its own, which is 1 in a Broadcast.

    The CPU plugin takes the cache before that, unless another operation reads it: as the scores do.
    """
    for value in (attention.input_value(_K), attention.input_value(_V)):
        repeat = _repeat(value)
        if repeat and repeat[0].get_attributes()["mode"] == "bidirectional":
            for target in repeat[0].input_value(1).get_node().inputs():
                node = target.get_source_output().get_node()
                if node.get_type_name() == "Constant" and np.asarray(node.data).tolist() == [0]:
                    target.replace_source_output(_integers(1).output(0))


def _repeat(value: ov.Output) -> tuple[ov.Node, ov.Node] | None:
    """Broadcast and what is before it, if keys or values are the Reshape of a Broadcast."""
    node = value.get_node()
    if node.get_type_name() != "Reshape":
        return None
    broadcast = node.input_value(0).get_node()
    return (broadcast, broadcast.input_value(0).get_node()) if broadcast.get_type_name() == "Broadcast" else None


def _checked_keys(attention: ov.Node, keys: ov.Output) -> ov.Output:
    num_heads, shape = _length(attention.input_value(_Q), 1), keys.get_partial_shape()
    if len(shape) != 4 or shape[1].is_dynamic or num_heads % shape[1].get_length():
        raise ModelError(
            f"keys of layer {attention.get_friendly_name()!r} must be [batch, KV heads, context, head size] "
            f"with a divisor of {num_heads} heads, got {shape}"
        )
    return keys


def _last_rows(value: ov.Output, window: int) -> ov.Output:
    """The last `window` rows of [..., rows, columns], or all; a single row for all stays one."""
    return ops.slice(value, _integers(-window), _integers(_LAST), _integers(1), _integers(-2)).output(0)


def _length(value: ov.Output, axis: int) -> int:
    return int(value.get_partial_shape()[axis].get_length())


def _integers(*values: int) -> ov.Node:
    return ops.constant(np.array(values, np.int64))
