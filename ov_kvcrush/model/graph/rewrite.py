"""Rewrites of a loaded model, one function each. They happen at load: a model with PagedAttention cannot be saved."""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino.opset15 as ops
from openvino.utils.node_factory import NodeFactory

from ov_kvcrush.errors import ModelError, reason_of
from ov_kvcrush.model.graph.attention import ALIBI_SLOPES, SLIDING_WINDOW, K, Q, V, attention_ops
from ov_kvcrush.model.graph.layer_sharing import SharedLayers, store_layers
from ov_kvcrush.model.score_terms import ScoreTerms

# Operations that treat each row of [rows, 1, channels] by itself; their other operands are weights. So does a Reshape
# [0, 0, groups, -1], whose sums correct the zero points of models from GGUF.
_ROW_WISE = frozenset(
    {"Add", "Clamp", "Convert", "Divide", "Gelu", "MatMul", "Multiply", "MVN", "Power", "ReduceMean", "ReduceSum"}
    | {"Relu", "RMS", "Sigmoid", "SoftPlus", "Split", "Sqrt", "Subtract", "Swish", "Tanh", "VariadicSplit"}
)

_ATTENTIONS = ("PagedAttentionExtension", "CrushAttention")

# Inputs of the rewritten model.
SAMPLED_ROWS = "sampled_rows"  # i64 (rows that sample,): the rows whose logits are wanted
PAGED_ROWS = "paged_rows"  # i64 (1,): rows that PagedAttention gets, all or none
CRUSH_STORE = "crush_store"  # i32 (1,): id of the store
CRUSH_PLAN = "crush_plan"  # i32 (n,): see native/src/op/plan.hpp
# Outputs, "attention_scores.<layer of the store>": f32 (n,), empty unless a request asks.
ATTENTION_SCORES = "attention_scores"


def use_paged_attention(model: ov.Model) -> int:
    """Replace stateful attention by PagedAttention, with one block table for all layers; return the number of layers.

    Raises ModelError if the model has attention that the rewrite does not recognise.
    """
    from openvino._offline_transformations import paged_attention_transformation

    before = _count(model, "ScaledDotProductAttention")
    try:
        paged_attention_transformation(model, False, False, False, False, False, False)
    except RuntimeError as error:
        raise ModelError(f"model must have attention that can be paged: {reason_of(error)}") from None
    layers, left = _count(model, "PagedAttentionExtension"), _count(model, "ScaledDotProductAttention")
    if not layers or left or layers != before:
        raise ModelError(
            "model must use ScaledDotProductAttention in every layer (soft-capped or linear attention does not), "
            f"got {layers} of {max(before, layers + left)} layers that can be paged"
        )
    return layers


def restore_mask(model: ov.Model, terms: ScoreTerms) -> None:
    """Give each PagedAttention the slopes and the window that its rewrite did not find.

    Raises ModelError if there are not as many layers as `terms` says.
    """
    layers = attention_ops(model)
    if terms.windows and len(terms.windows) != len(layers):
        raise ModelError(f"model must have {len(terms.windows)} layers as its config.json says, got {len(layers)}")
    for layer, op in enumerate(layers):
        if terms.alibi_slopes:
            slopes = ops.constant(np.array(terms.alibi_slopes, np.float32))
            op.input(ALIBI_SLOPES).replace_source_output(slopes.output(0))
        if terms.windows:
            op.input(SLIDING_WINDOW).replace_source_output(ops.constant(np.int32(terms.windows[layer])).output(0))


def use_crush_attention(
    model: ov.Model, library: str, *, pages_prompts: bool, shared_layers: SharedLayers = ()
) -> None:
    """Replace each PagedAttention by CrushAttention, or put CrushAttention behind it, to pass on its rows of prompts.

    pages_prompts: PagedAttention stays, for prompts that the store has no kernel for (`native.can_prefill`). Then it is
    skipped by the plugin where it gets no queries, so the queries are cut to `paged_rows`: all rows
    of the step, or none. In a mixed step the rows that are not of a prompt go through it as sequences of one token
    each. Against stock PagedAttention a decode step of SmolLM2 (30 layers, 2 cores, medians of 150 interleaved steps
    of 17 ms) takes 0.3 ms more this way, 0.7 with the output cut too, 1.2 with q, k, v and the output cut to the
    prompt rows, 1.4 with nothing cut. Skipped it still costs 0.02 ms a layer, and so do its inputs and outputs.
    One CrushScores behind all layers has the attention scores.
    library: path of the native library, which is the extension. shared_layers: what `share_layers` did; the layers that
    read another's keys and values append nothing to the store.
    """
    factory = NodeFactory("opset1")
    factory.add_extension(library)
    store, plan = _parameter(CRUSH_STORE, ov.Type.i32, 1), _parameter(CRUSH_PLAN, ov.Type.i32, -1)
    no_rows = ops.constant(np.zeros((0, 1), np.float32))
    layers = attention_ops(model)
    places, readers = store_layers(len(layers), shared_layers), dict(shared_layers)
    for layer, attention in enumerate(layers):
        targets = list(attention.output(0).get_target_inputs())
        rows = attention.output(0) if pages_prompts else no_rows.output(0)
        floats = [*(attention.input_value(i) for i in (Q, K, V)), rows]
        attributes = {"layer": places[layer], "appends": layer not in readers}
        crush = factory.create("CrushAttention", [*floats, store.output(0), plan.output(0)], attributes)
        for target in targets:
            target.replace_source_output(crush.output(0))
    model.add_parameters([store, plan])
    if pages_prompts:
        _cut_queries(model, layers)
    else:
        _remove_unused_parameters(model)
    last = model.outputs[-1].get_node().input_value(0)  # the logits, behind every layer
    scores = factory.create("CrushScores", [last, store.output(0), plan.output(0)], {"layers": max(places) + 1})
    for layer, output in enumerate(scores.outputs()):
        output.get_tensor().set_names({f"{ATTENTION_SCORES}.{layer}"})
    model.add_outputs(scores.outputs())
    model.validate_nodes_and_infer_types()


def _cut_queries(model: ov.Model, layers: list[ov.Node]) -> None:
    paged_rows = _parameter(PAGED_ROWS, ov.Type.i64, 1)
    zero, one = ops.constant(np.array([0], np.int64)), ops.constant(np.array([1], np.int64))
    for attention in layers:
        queries = ops.slice(attention.input_value(Q), zero, paged_rows, one, zero)
        attention.input(Q).replace_source_output(queries.output(0))
    model.add_parameters([paged_rows])


def _remove_unused_parameters(model: ov.Model) -> None:
    used = {value.get_node().get_friendly_name() for op in model.get_ordered_ops() for value in op.input_values()}
    for parameter in list(model.get_parameters()):
        if parameter.get_friendly_name() not in used:
            model.remove_parameter(parameter)


def _parameter(name: str, element_type: ov.Type, size: int) -> ov.Node:
    node = ops.parameter(ov.PartialShape([size]), element_type, name=name)
    node.output(0).get_tensor().set_names({name})
    return node


def gather_sampled_rows(model: ov.Model) -> None:
    """Add the input `sampled_rows` and compute logits for those rows only.

    The rows are picked right after the last attention: its output projection, the last MLP, the norms and the LM head
    treat each row by itself. A prompt chunk of 512 rows, of which at most one is sampled, else computes 512 of each:
    2 to 6 % more time to the first token than now (SmolLM2 of 30 layers, Qwen 0.5B of 24; 2 cores, pairs of runs).
    """
    head = lm_head(model)
    rows = _parameter(SAMPLED_ROWS, ov.Type.i64, -1)
    gathered: dict[tuple[str, int], ov.Output] = {}
    for target in _inputs_after_last_attention(model, head):
        source = target.get_source_output()
        key = (source.get_node().get_friendly_name(), source.get_index())
        if key not in gathered:
            gathered[key] = ops.gather(source, rows, ops.constant(np.int64(0))).output(0)
        target.replace_source_output(gathered[key])
    model.add_parameters([rows])
    model.validate_nodes_and_infer_types()


def lm_head(model: ov.Model) -> ov.Node:
    """The matrix product that gives the logits, looked for backwards from them."""
    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        if not node.inputs():
            raise ModelError(
                "model must compute its logits by a matrix product, got none on the way back from 'logits'"
            )
        node = node.input_value(0).get_node()
    return node


def _inputs_after_last_attention(model: ov.Model, head: ov.Node) -> list[ov.Input]:
    """The inputs through which rows enter the part behind the last attention that treats each row by itself.

    That part grows backwards from the LM head, to the first operations that are not known to be row-wise.
    """
    part = _row_wise_part(_behind_last_attention(model), head)
    targets = [head.input(0), *(target for node in part.values() for target in node.inputs())]
    return [
        target
        for target in targets
        if _is_rows(target.get_partial_shape()) and _source(target).get_friendly_name() not in part
    ]


def _behind_last_attention(model: ov.Model) -> set[str]:
    """Names of the nodes that depend on the last attention of the model."""
    behind: set[str] = set()
    for node in model.get_ordered_ops():
        name = node.get_friendly_name()
        if node.get_type_name() in _ATTENTIONS:
            behind = {name}
        elif any(value.get_node().get_friendly_name() in behind for value in node.input_values()):
            behind.add(name)
    return behind


def _row_wise_part(behind: set[str], head: ov.Node) -> dict[str, ov.Node]:
    part: dict[str, ov.Node] = {}
    waiting = [_source(head.input(0))]
    while waiting:
        node = waiting.pop()
        name = node.get_friendly_name()
        if name in behind and name not in part and _is_row_wise(node):
            part[name] = node
            waiting += [_source(target) for target in node.inputs()]
    # A node that is read from outside the part keeps all its rows, and so do its inputs.
    allowed = {head.get_friendly_name()}
    while True:
        read_outside = [
            name
            for name, node in part.items()
            for output in node.outputs()
            if any(t.get_node().get_friendly_name() not in part.keys() | allowed for t in output.get_target_inputs())
        ]
        if not read_outside:
            return part
        for name in set(read_outside):
            del part[name]


def _is_row_wise(node: ov.Node) -> bool:
    if node.get_type_name() != "Reshape":
        return node.get_type_name() in _ROW_WISE and all(_is_rows(o.partial_shape) for o in node.outputs())
    before, pattern = node.input_value(0).get_partial_shape(), node.input_value(1).get_node()
    if pattern.get_type_name() != "Constant" or not node.get_attributes()["special_zero"]:
        return False
    return _is_rows(before) and len(before) == 3 and np.asarray(pattern.data).ravel()[:2].tolist() == [0, 0]


def _source(target: ov.Input) -> ov.Node:
    return target.get_source_output().get_node()


def _is_rows(shape: ov.PartialShape) -> bool:
    """Whether a tensor has the shape of hidden states, [rows, 1, channels], or has them in groups."""
    return shape.rank.is_static and len(shape) >= 3 and shape[0].is_dynamic and shape[1] == ov.Dimension(1)


def _count(model: ov.Model, type_name: str) -> int:
    return sum(op.get_type_name() == type_name for op in model.get_ops())


def behind(model: ov.Model, source: ov.Node) -> set[str]:
    """Names of the nodes that depend on `source`."""
    found = {source.get_friendly_name()}
    for node in model.get_ordered_ops():
        if any(value.get_node().get_friendly_name() in found for value in node.input_values()):
            found.add(node.get_friendly_name())
    return found
