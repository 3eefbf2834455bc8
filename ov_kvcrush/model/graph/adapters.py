"""LoRA adapters in the graph: low-rank products beside those that they are for.

out += ((x A^T) * gate) B^T, with the ranks of all adapters side by side: A [R, inputs], B [outputs, R]. The gate
[rows, 1, R] repeats what the step says of each row, its alphas, so rows of different adapters and of none run in one
step, and an alpha of 0 adds exact zeros. A row costs R (inputs + outputs) products with weights in f32 in each such
layer whether or not its request has an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import openvino as ov
import openvino.opset15 as ops

from ov_kvcrush.errors import ModelError
from ov_kvcrush.model.adapters import Adapter, LowRank, tensor_name
from ov_kvcrush.model.graph.rewrite import SAMPLED_ROWS, behind

ADAPTER_ALPHAS = "adapter_alphas"  # f32 (T, adapters): how much of each adapter each row runs with
_PREFIX = "__module."  # of names that the export gives to operations


def use_adapters(model: ov.Model, adapters: Sequence[Adapter]) -> None:
    """Add the input `adapter_alphas` and the adapters' products. Comes after `gather_sampled_rows`.

    Raises ModelError, naming the tensor, for an adapter of another model.
    """
    if not adapters:
        return
    products = _products(model)
    for adapter in adapters:
        for module, low in adapter.layers.items():
            _check(adapter, module, low, products.get(module, []), bool(products))
    parameters = {name: p for p in model.get_parameters() for name in p.output(0).get_names()}
    sampled = parameters[SAMPLED_ROWS]
    gathered = behind(model, sampled)
    alphas = ops.parameter(ov.PartialShape([-1, len(adapters)]), ov.Type.f32, name=ADAPTER_ALPHAS)
    alphas.output(0).get_tensor().set_names({ADAPTER_ALPHAS})
    gates = _Gates(alphas, sampled)
    for module, (product, *_) in products.items():
        parts = [(i, x.layers[module]) for i, x in enumerate(adapters) if module in x.layers]
        if parts:
            _add(product, parts, gates, is_sampled=product.get_friendly_name() in gathered)
    model.add_parameters([alphas])
    model.validate_nodes_and_infer_types()


class _Gates:
    """The gates of products, made once for each choice of adapters and ranks. Of sampled rows they are gathered."""

    def __init__(self, alphas: ov.Node, sampled: ov.Node) -> None:
        self._rows = {False: alphas, True: ops.gather(alphas, sampled, ops.constant(np.int64(0)))}
        self._made: dict[tuple[bool, tuple[int, ...]], ov.Node] = {}

    def __call__(self, parts: list[tuple[int, LowRank]], *, is_sampled: bool) -> ov.Node:
        """f32 [rows, 1, R], or [rows, 1, 1] of one adapter."""
        columns = tuple(i for i, low in parts for _ in range(len(low.a) if len(parts) > 1 else 1))
        key = is_sampled, columns
        if key not in self._made:
            chosen = ops.gather(self._rows[is_sampled], ops.constant(np.array(columns)), ops.constant(np.int64(1)))
            self._made[key] = ops.unsqueeze(chosen, ops.constant(np.int64(1)))
        return self._made[key]


def _add(product: ov.Node, parts: list[tuple[int, LowRank]], gates: _Gates, *, is_sampled: bool) -> None:
    a = np.concatenate([low.a for _, low in parts])
    b = np.concatenate([low.b for _, low in parts], axis=1)
    targets = list(product.output(0).get_target_inputs())
    low_rank = ops.matmul(product.input_value(0), ops.constant(a), False, True)
    gated = ops.multiply(low_rank, gates(parts, is_sampled=is_sampled))
    whole = ops.add(product, ops.matmul(gated, ops.constant(b), False, True))
    for target in targets:
        target.replace_source_output(whole.output(0))


def _products(model: ov.Model) -> dict[str, list[ov.Node]]:
    """Products of rows with weights, by the modules that they were exported from."""
    found: dict[str, list[ov.Node]] = {}
    for node in model.get_ordered_ops():
        name = node.get_friendly_name()
        if node.get_type_name() == "MatMul" and name.startswith(_PREFIX):
            weights, rows = node.input_value(1).get_partial_shape(), node.input_value(0).get_partial_shape()
            if weights.is_static and len(weights) == 2 and len(rows) == 3 and not node.get_attributes()["transpose_a"]:
                found.setdefault(name[len(_PREFIX) :].split("/")[0], []).append(node)
    return found


def _check(adapter: Adapter, module: str, low: LowRank, products: list[ov.Node], has_names: bool) -> None:
    tensor = tensor_name(module, "A")
    if len(products) != 1:
        hint = "" if has_names else "; a model from GGUF does not name its layers: export it from Hugging Face"
        raise ModelError(
            f"adapter {adapter.name!r} must be for this model, got {tensor!r} and no linear layer {module!r} of its "
            f"own in the graph{hint}"
        )
    shape = products[0].input_value(1).get_shape()
    num_outputs, num_inputs = shape if products[0].get_attributes()["transpose_b"] else reversed(shape)
    for name, got, rule in (
        (tensor, low.a.shape, (len(low.a), num_inputs)),
        (tensor_name(module, "B"), low.b.shape, (num_outputs, len(low.a))),
        (f"base_model.model.{module}.base_layer.weight", adapter.base_shapes.get(module), (num_outputs, num_inputs)),
    ):
        if got is not None and tuple(got) != rule:
            raise ModelError(
                f"tensor {name!r} of adapter {adapter.name!r} must be {list(rule)} for this model, got {list(got)}"
            )
