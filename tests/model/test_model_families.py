"""Every text architecture that optimum-intel exports gives Hugging Face's logits, or is refused with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import EXPORTED, VARIANTS, VOCAB_SIZE, model_type, tiny_architecture
from chunked_logits import CHUNKS, NO_STAGING, logits_at_chunk_ends
from native_stores import PREFILL_ISAS

from model_export import export_model
from ov_kvcrush import CacheConfig, native
from ov_kvcrush.errors import ModelError
from ov_kvcrush.model import load
from ov_kvcrush.model.support import unsupported_reason

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
# Each mechanism once: soft cap, sinks and experts, ALiBi that OpenVINO's rewrite finds, ALiBi and windows that it drops
# (with learned positions). Partial rotary positions, parallel blocks and windows are in test_architectures.py.
ALWAYS = ("gemma2", "gpt_oss", "bloom", "mpt", "gpt_neo")
CAPPED = ("gemma2",)
TERMS = ("gemma2", "gpt_oss", "bloom")  # caps and windows, sinks and windows, slopes
CACHES = {
    "paged": CacheConfig(attention="paged"),
    "staged": CacheConfig("f32", "f32", attention="crush"),
    "stored": CacheConfig("f32", "f32", staging_bytes=NO_STAGING, attention="crush"),
}


def kinds() -> list[Any]:
    return [
        pytest.param(kind, marks=() if kind in ALWAYS else pytest.mark.exhaustive) for kind in (*EXPORTED, *VARIANTS)
    ]


@pytest.mark.parametrize("kind", kinds())
def test_logits_equal_hugging_face(kind: str, once: Callable[[str, Callable[[Path], object]], Path]) -> None:
    """Prompts in chunks and single tokens, from staging blocks, from the store and through PagedAttention alone."""
    import torch
    import transformers

    source = once(f"hf/family-{kind}", lambda folder: tiny_architecture(kind, folder))
    folder = once(f"ir/family-{kind}", lambda out: export_model(source, out, weight_format="fp32"))
    ids = np.random.default_rng(1).integers(0, VOCAB_SIZE, sum(CHUNKS))
    # Falcon's eager attention adds ALiBi twice; the others' sdpa leaves caps and sinks out.
    how = "sdpa" if kind == "falcon-alibi" else "eager"
    reference = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation=how)
    with torch.no_grad():
        expected = reference.eval()(torch.from_numpy(ids)[None]).logits[0].numpy()
    assert expected.std(axis=1).min() > 0.1, "logits must tell tokens apart"
    for name, cache in CACHES.items():
        if name == "paged" and kind in CAPPED:
            with pytest.raises(ModelError, match=r"attn_logit_softcapping=.*'paged'"):
                logits_at_chunk_ends(folder, ids, cache)
            continue
        got = logits_at_chunk_ends(folder, ids, cache)
        np.testing.assert_allclose(got, expected[np.cumsum(CHUNKS) - 1], atol=1e-3, rtol=0, err_msg=name)


@pytest.mark.parametrize("isa", PREFILL_ISAS)
@pytest.mark.parametrize("kind", TERMS)
def test_prompts_that_bf16_products_read_without_paged_attention(
    isa: str, kind: str, once: Callable[[str, Callable[[Path], object]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the attention is in bf16; what it leaves off is little beside windows, caps, slopes and sinks."""
    source = once(f"hf/family-{kind}", lambda folder: tiny_architecture(kind, folder))
    folder = once(f"ir/family-{kind}", lambda out: export_model(source, out, weight_format="fp32"))
    ids = np.random.default_rng(1).integers(0, VOCAB_SIZE, sum(CHUNKS))
    expected = logits_at_chunk_ends(folder, ids, CACHES["staged"])
    can_prefill, make_store, precisions = native.can_prefill, native.Store, load.plugin_precisions

    def error(has_terms: bool) -> float:
        def store(layers: list[Any], **options: Any) -> native.Store:
            shapes = layers if has_terms else [(*shape[:3], 0, shape[4]) for shape in layers]
            return make_store(layers=shapes, isa=isa, **options)

        with monkeypatch.context() as patch:
            patch.setattr(native, "can_prefill", partial(can_prefill, isa=isa))
            patch.setattr(native, "Store", store)
            patch.setattr(load, "plugin_precisions", lambda given: precisions(given)._replace(inference="bf16"))
            got = logits_at_chunk_ends(folder, ids, CacheConfig("bf16", "bf16", attention="crush"))
        return float(np.linalg.norm(got - expected))

    assert 0 < error(True) < error(False) / 8


def table() -> dict[str, str]:
    """Each architecture of the docs and what they say of it."""
    rows = re.findall(r"^\| `([\w-]+)` \| (\w+) \|.*\|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == len({name for name, _ in rows}), "each architecture once"
    return dict(rows)


def test_the_table_lists_what_optimum_exports() -> None:
    from optimum.exporters.openvino import model_configs  # noqa: F401, registers them
    from optimum.exporters.tasks import TasksManager

    types = TasksManager._LIBRARY_TO_SUPPORTED_MODEL_TYPES["transformers"]
    exported = {name for name, libraries in types.items() if "text-generation" in libraries.get("openvino", {})}
    assert set(table()) == exported


def test_the_table_says_what_is_tested_and_refused() -> None:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    for name, says in table().items():
        config = transformers.CONFIG_MAPPING[name]().to_dict() if name in transformers.CONFIG_MAPPING else {}
        config = {**config, "model_type": name, "architectures": [CLASSES.get(name, "OwnForCausalLM")]}
        reason = unsupported_reason(config)
        assert (reason is None) == (says == "yes") == (name in EXPORTED), f"{name}: {reason}"
    assert {model_type(kind) for kind in VARIANTS} <= set(EXPORTED)


def test_code_of_its_own_is_for_who_trusts_it() -> None:
    config = {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"]}
    assert "trust_remote_code" in str(unsupported_reason(config))
    assert unsupported_reason(config, trust_remote_code=True) is None
    alibi = {"model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "num_hidden_layers": 40}
    assert "ALiBi" in str(unsupported_reason(alibi, trust_remote_code=True))
