"""Rewrites of a loaded model, one function each. They happen at load: a model with PagedAttention cannot be saved."""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino.opset15 as ops

from ov_kvcrush.errors import ModelError

SAMPLED_ROWS = "sampled_rows"  # input of the rewritten model: i64, the rows whose logits are wanted


def use_paged_attention(model: ov.Model) -> int:
    """Replace stateful attention by PagedAttention, with one block table for all layers; return the number of layers.

    Raises ModelError if the model has attention that the rewrite does not recognise.
    """
    from openvino._offline_transformations import paged_attention_transformation

    before = _count(model, "ScaledDotProductAttention")
    try:
        paged_attention_transformation(model, False, False, False, False, False, False)
    except RuntimeError as error:
        raise ModelError(f"model must have attention that can be paged: {_last_line(error)}") from None
    layers, left = _count(model, "PagedAttentionExtension"), _count(model, "ScaledDotProductAttention")
    if not layers or left or layers != before:
        raise ModelError(
            "model must use ScaledDotProductAttention in every layer (soft-capped or linear attention does not), "
            f"got {layers} of {max(before, layers + left)} layers that can be paged"
        )
    return layers


def gather_sampled_rows(model: ov.Model) -> None:
    """Add the input `sampled_rows` and compute logits for those rows only.

    Without it a prompt chunk of 512 rows computes 512 x vocabulary logits, of which one row is used.
    """
    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        if not node.inputs():
            raise ModelError(
                "model must compute its logits by a matrix product, got none on the way back from 'logits'"
            )
        node = node.input_value(0).get_node()
    rows = ops.parameter(ov.PartialShape([-1]), ov.Type.i64, name=SAMPLED_ROWS)
    rows.output(0).get_tensor().set_names({SAMPLED_ROWS})
    gathered = ops.gather(node.input_value(0), rows, ops.constant(np.int64(0)))
    node.input(0).replace_source_output(gathered.output(0))
    model.add_parameters([rows])
    model.validate_nodes_and_infer_types()


def _count(model: ov.Model, type_name: str) -> int:
    return sum(op.get_type_name() == type_name for op in model.get_ops())


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
