"""Products with compressed weights of steps of few rows: our kernels in the place of the plugin's.

A decode step reads every weight once, so it is as fast as they are read. CrushProduct has the weights a second time, in
the order in which its kernels read them (native/src/kernels/product.hpp). Steps of more rows, prompts, stay with the
plugin: its nodes get the rows of such a step or none, and without rows it skips them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import openvino as ov
import openvino.opset15 as ops
from openvino.utils.node_factory import NodeFactory

from ov_kvcrush import native
from ov_kvcrush.model.graph.compressed import Linear, constant_of, read_linear, users
from ov_kvcrush.model.graph.rewrite import SAMPLED_ROWS, behind, lm_head

FEW_ROWS = 8  # of a step that our kernels compute
# Of a product that stands alone: below, its call costs more than it saves. So does it with weights of 8 bits, which the
# plugin reads at two thirds of the memory's speed; those of 4 bits it reads at an eighth (docs/weights.md).
_LEAST_BYTES = 128 << 10


class _Found(NamedTuple):
    """A part of the graph that one CrushProduct replaces: from the rows x to `out`."""

    x: ov.Output
    out: ov.Node
    linears: tuple[Linear, ...]
    activation: str = "silu"


def use_few_row_products(model: ov.Model, library: str, max_bytes: int) -> tuple[native.Product, ...]:
    """Put CrushProduct behind products of steps of at most FEW_ROWS rows, MLPs first; return the weights it reads.

    An MLP is down(activation(gate(x)) * up(x)), with SiLU or GELU by its tanh. Other products, the projections of
    attention, are among them where their weights have 4 bits. Whatever does not match stays as it is.
    So does all of it where the weights have more than `max_bytes`. The graph needs what is returned alive. Comes after
    `gather_sampled_rows`. library: path of the native library, which is the extension.
    """
    found = [*_mlps(model), *_head(model)]
    found += _projections(model, found)
    if not found or sum(linear.weights.nbytes for part in found for linear in part.linears) > max_bytes:
        return ()
    factory = NodeFactory("opset1")
    factory.add_extension(library)
    parameters = {name: p for p in model.get_parameters() for name in p.output(0).get_names()}
    sampled = parameters[SAMPLED_ROWS]
    gathered = behind(model, sampled)
    plain_rows = {p: _rows_above(p) for p in (sampled, parameters["input_ids"])}
    products = []
    cuts: dict[tuple[str, int], ov.Node] = {}
    for part in found:
        is_sampled = part.x.get_node().get_friendly_name() in gathered
        rows = plain_rows[sampled if is_sampled else parameters["input_ids"]]
        products.append(_replace(part, rows, factory, cuts))
    model.validate_nodes_and_infer_types()
    return tuple(products)


def _replace(part: _Found, rows: ov.Node, factory: NodeFactory, cuts: dict[tuple[str, int], ov.Node]) -> native.Product:
    """cuts: slices of the rows that earlier parts begin with, one for each output that is sliced."""
    product = native.Product([linear.weights for linear in part.linears], part.activation)
    inner = _between(part.x, part.out)
    readers = list(part.x.get_target_inputs())
    key = _key(part.x)
    if key not in cuts:
        zero, one = ops.constant(np.array([0], np.int64)), ops.constant(np.array([1], np.int64))
        cuts[key] = ops.slice(part.x, zero, rows, one, zero)
    cut = cuts[key].get_friendly_name()
    for target in readers:
        name = target.get_node().get_friendly_name()
        if name in inner and name != cut:
            target.replace_source_output(cuts[key].output(0))
    targets = list(part.out.output(0).get_target_inputs())
    attributes = {"product": product.id, "width": product.num_outputs}
    crush = factory.create("CrushProduct", [part.x, part.out.output(0)], attributes)
    for target in targets:
        target.replace_source_output(crush.output(0))
    return product


def _rows_above(parameter: ov.Node) -> ov.Node:
    """i64 (1,): the elements of an input of one dimension, 0 if there are at most FEW_ROWS."""
    rows = ops.shape_of(parameter, "i64")
    few = ops.constant(np.array([FEW_ROWS], np.int64))
    return ops.select(ops.greater(rows, few), rows, ops.constant(np.array([0], np.int64)))


def _mlps(model: ov.Model) -> list[_Found]:
    found = []
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Multiply":
            part = _mlp_around(node)
            if part is not None:
                found.append(part)
    return found


def _mlp_around(product: ov.Node) -> _Found | None:
    """The MLP whose gated hidden channels `product` makes."""
    sources = [value.get_node() for value in product.input_values()]
    for gated, upper in (sources, sources[::-1]):
        activation = _activation(gated)
        if activation is None:
            continue
        gate, up = read_linear(gated.input_value(0).get_node()), read_linear(upper)
        if gate is None or up is None or gate.x != up.x or len({gate.weights.group % 32, up.weights.group % 32}) > 1:
            continue
        for down in _linears_over(product.output(0)):
            hidden = gate.out.output(0).get_partial_shape()[-1].get_length()
            if hidden % 32 == 0 and _is_closed(gate.x, down.out):
                return _Found(gate.x, down.out, (gate, up, down), activation)
    return None


def _activation(node: ov.Node) -> str | None:
    if node.get_type_name() == "Swish":
        beta = constant_of(node.input_value(1).get_node()) if len(node.inputs()) > 1 else None
        return "silu" if len(node.inputs()) == 1 or (beta is not None and np.all(np.asarray(beta.data) == 1)) else None
    if node.get_type_name() == "Gelu" and node.get_attributes()["approximation_mode"].upper() == "TANH":
        return "gelu_tanh"
    return None


def _linears_over(x: ov.Output) -> Iterable[Linear]:
    """Products whose rows are x, those with a correction first."""
    for product in users(x):
        if product.get_type_name() == "MatMul" and product.input_value(0) == x:
            for node in (*users(product.output(0)), product):
                linear = read_linear(node)
                if linear is not None and linear.x == x:
                    yield linear


def _head(model: ov.Model) -> list[_Found]:
    product = lm_head(model)
    for node in (*users(product.output(0)), product):
        linear = read_linear(node)
        if linear is not None and _is_closed(linear.x, linear.out):
            return [_Found(linear.x, linear.out, (linear,))]
    return []


def _projections(model: ov.Model, found: list[_Found]) -> list[_Found]:
    """Products with weights of 4 bits outside of what is found; those with the same rows may share sums of them."""
    taken = {name for part in found for name in _between(part.x, part.out)}
    by_rows: dict[tuple[str, int], list[Linear]] = {}
    for product in model.get_ordered_ops():
        if product.get_type_name() != "MatMul" or product.get_friendly_name() in taken:
            continue
        for node in (*users(product.output(0)), product):
            linear = read_linear(node) if node.get_friendly_name() not in taken else None
            if linear is not None:
                taken.add(linear.out.get_friendly_name())  # it ends the product with the correction, too
                if linear.weights.bits == 4 and linear.weights.nbytes >= _LEAST_BYTES:
                    by_rows.setdefault(_key(linear.x), []).append(linear)
                break
    return [
        _Found(linear.x, linear.out, (linear,))
        for linears in by_rows.values()
        if _is_closed(linears[0].x, *(linear.out for linear in linears))
        for linear in linears
    ]


def _key(x: ov.Output) -> tuple[str, int]:
    return x.get_node().get_friendly_name(), x.get_index()


def _between(x: ov.Output, out: ov.Node) -> dict[str, ov.Node]:
    """The nodes that `out` is made by from x, by name."""
    nodes: dict[str, ov.Node] = {}
    waiting = [out]
    while waiting:
        node = waiting.pop()
        if node.get_friendly_name() not in nodes:
            nodes[node.get_friendly_name()] = node
            waiting += [value.get_node() for value in node.input_values() if value != x]
    return nodes


def _is_closed(x: ov.Output, *outs: ov.Node) -> bool:
    """Whether all but `outs` that depends on x is read on the way to them only, and rows of x are [rows, .., K]."""
    shape = x.get_partial_shape()
    if shape.rank.is_dynamic or len(shape) != 3 or shape[0].is_static or shape[1] != ov.Dimension(1):
        return False
    nodes = {name: node for out in outs for name, node in _between(x, out).items()}
    ends = {out.get_friendly_name() for out in outs}
    depends = {target.get_node().get_friendly_name() for target in x.get_target_inputs()} & nodes.keys()
    waiting = list(depends)
    while waiting:
        node = nodes[waiting.pop()]
        if node.get_friendly_name() in ends:
            continue
        for user in (u for output in node.outputs() for u in users(output)):
            name = user.get_friendly_name()
            if name not in nodes:
                return False
            if name not in depends:
                depends.add(name)
                waiting.append(name)
    return True
