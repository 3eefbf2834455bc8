"""What a layer has beside attention is read from its PagedAttention, or refused by the name of the layer."""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino.opset15 as ops
import pytest

from ov_kvcrush.errors import ModelError
from ov_kvcrush.model.default import default_model_path
from ov_kvcrush.model.graph.attention import ALIBI_SLOPES, SINKS, SLIDING_WINDOW, attention_ops, read_layer
from ov_kvcrush.model.graph.rewrite import restore_mask, use_paged_attention
from ov_kvcrush.model.score_terms import ScoreTerms, bloom_slopes, mpt_slopes, score_terms


@pytest.fixture(scope="module")
def paged_model() -> ov.Model:
    """The default model with PagedAttention."""
    model = ov.Core().read_model(default_model_path() / "openvino_model.xml")
    use_paged_attention(model)
    return model


NUMBERS = tuple(i / 8 for i in range(9))  # 9 heads


@pytest.mark.parametrize(
    ("index", "shape", "field"),
    [(ALIBI_SLOPES, [9], "alibi_slopes"), (SINKS, [1, 9, 1, 1], "sinks")],
    ids=["alibi", "sinks"],
)
def test_numbers_of_heads_are_read(paged_model: ov.Model, index: int, shape: list[int], field: str) -> None:
    op = attention_ops(paged_model)[3]
    before = op.input_value(index)
    assert getattr(read_layer(op), field) == ()
    try:
        op.input(index).replace_source_output(ops.constant(np.array(NUMBERS, np.float32).reshape(shape)).output(0))
        layer = read_layer(op, soft_cap=30.0)
        assert getattr(layer, field) == NUMBERS
        assert (layer.num_heads, layer.soft_cap) == (9, 30.0)
        assert layer.shape[5:] == (30.0, layer.alibi_slopes, layer.sinks)
        for wrong in (np.ones(8, np.float32), np.full(9, np.nan, np.float32)):
            op.input(index).replace_source_output(ops.constant(wrong).output(0))
            with pytest.raises(ModelError, match=f"{op.get_friendly_name()}.* must be 9 finite numbers"):
                read_layer(op)
    finally:
        op.input(index).replace_source_output(before)


def test_masks_that_the_rewrite_drops_are_put_back(paged_model: ov.Model) -> None:
    layers = attention_ops(paged_model)
    before = [(op.input_value(ALIBI_SLOPES), op.input_value(SLIDING_WINDOW)) for op in layers]
    windows = tuple(16 * (i % 2) for i in range(len(layers)))
    try:
        restore_mask(paged_model, ScoreTerms(alibi_slopes=NUMBERS, windows=windows))
        found = [read_layer(op) for op in layers]
        assert tuple(layer.window for layer in found) == windows
        assert {layer.alibi_slopes for layer in found} == {NUMBERS}
        with pytest.raises(ModelError, match="must have 2 layers"):
            restore_mask(paged_model, ScoreTerms(windows=(1, 2)))
    finally:
        for op, (slopes, window) in zip(layers, before, strict=True):
            op.input(ALIBI_SLOPES).replace_source_output(slopes)
            op.input(SLIDING_WINDOW).replace_source_output(window)


@pytest.mark.parametrize("num_heads", [1, 4, 6, 12, 25, 32])
def test_slopes_are_those_of_transformers(num_heads: int) -> None:
    import torch
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    bloom = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]
    np.testing.assert_allclose(bloom_slopes(num_heads), bloom.numpy(), rtol=1e-6)
    mpt = build_mpt_alibi_tensor(num_heads, 2, 8)
    np.testing.assert_allclose(mpt_slopes(num_heads, 8), -mpt.reshape(num_heads, 2)[:, 0].numpy(), rtol=1e-6)


@pytest.mark.parametrize("cap", [-1.0, float("inf"), "50", True])
def test_a_cap_that_is_none_is_refused(cap: object) -> None:
    with pytest.raises(ModelError, match="attn_logit_softcapping must be a positive number"):
        score_terms({"attn_logit_softcapping": cap})
