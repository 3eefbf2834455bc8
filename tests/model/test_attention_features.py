"""Attention that CrushAttention does not have is refused when a model is loaded, by the name of the layer."""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino.opset15 as ops
import pytest

from ov_kvcrush.errors import ModelError
from ov_kvcrush.model.default import default_model_path
from ov_kvcrush.model.graph.attention import ALIBI_SLOPES, SINKS, attention_ops, read_layer
from ov_kvcrush.model.graph.rewrite import use_paged_attention


@pytest.fixture(scope="module")
def paged_model() -> ov.Model:
    """The default model with PagedAttention."""
    model = ov.Core().read_model(default_model_path() / "openvino_model.xml")
    use_paged_attention(model)
    return model


@pytest.mark.parametrize(
    ("index", "shape", "name"), [(ALIBI_SLOPES, [9], "ALiBi"), (SINKS, [1, 9, 1, 1], "sinks")], ids=["alibi", "sinks"]
)
def test_a_layer_with_more_than_attention_is_refused(
    paged_model: ov.Model, index: int, shape: list[int], name: str
) -> None:
    """Each of 9 heads has a slope, or a sink, of its own."""
    op = attention_ops(paged_model)[3]
    before = op.input_value(index)
    read_layer(op)
    op.input(index).replace_source_output(ops.constant(np.ones(shape, np.float32)).output(0))
    try:
        with pytest.raises(ModelError, match=f"{op.get_friendly_name()}.* must be without {name}"):
            read_layer(op)
    finally:
        op.input(index).replace_source_output(before)
    assert read_layer(op).num_heads == 9
