"""Every architecture gives Hugging Face's logits, for prompt chunks and decode steps, through the rewritten graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from chunked_logits import CHUNKS, NO_STAGING, logits_at_chunk_ends
from tiny_models import VOCAB_SIZE, kinds

from ov_kvcrush import CacheConfig
from ov_kvcrush.model.graph.rewrite import SAMPLED_ROWS, gather_sampled_rows, use_paged_attention

CACHES = {
    "paged": CacheConfig(attention="paged"),
    "crush": CacheConfig("f32", "f32", staging_bytes=NO_STAGING, attention="crush"),
}


@pytest.mark.parametrize("kind", kinds())
def test_rows_are_gathered_behind_the_last_attention(kind: str, tiny_ir: Callable[[str], Path]) -> None:
    """Not only before the LM head: the last layer's projections see the sampled rows alone."""
    model = ov.Core().read_model(tiny_ir(kind) / "openvino_model.xml")
    use_paged_attention(model)
    gather_sampled_rows(model)
    rows = next(p for p in model.get_parameters() if p.get_friendly_name() == SAMPLED_ROWS)
    readers = [t.get_node().output(0) for t in rows.output(0).get_target_inputs()]
    fed = {t.get_node().get_type_name() for output in readers for t in output.get_target_inputs()}
    assert len(readers) >= 2, "the residual stream and the attention"
    assert fed == {"Add", "MatMul"}


@pytest.mark.parametrize("attention", list(CACHES))
@pytest.mark.parametrize("kind", kinds())
def test_logits_equal_hugging_face(
    kind: str, attention: str, tiny_hf: Callable[[str], Path], tiny_ir: Callable[[str], Path]
) -> None:
    import torch
    import transformers

    ids = np.random.default_rng(1).integers(0, VOCAB_SIZE, sum(CHUNKS))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tiny_hf(kind), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids)[None]).logits[0].numpy()
    ours = logits_at_chunk_ends(tiny_ir(kind), ids, CACHES[attention])
    np.testing.assert_allclose(ours, expected[np.cumsum(CHUNKS) - 1], atol=1e-3, rtol=0)
    # The logits must tell positions apart, or agreement would mean little.
    assert expected.std(axis=1).min() > 0.1
