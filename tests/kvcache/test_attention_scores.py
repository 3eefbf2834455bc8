"""Attention scores per query head: those of Hugging Face's eager attention, whatever path a prompt takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import openvino_genai as ov_genai
import pytest
from covering import covering, rarely
from eager_attention import eager_attentions
from held import hold
from tiny_models import KINDS, VOCAB_SIZE, tiny_tokenizer
from watch import AttentionScores, Watch

from model_export import export_model
from ov_kvcrush import CacheConfig, SchedulerConfig
from ov_kvcrush.core.cache_params import CacheParams
from ov_kvcrush.engine.engine import Engine
from ov_kvcrush.model.default import default_gguf
from ov_kvcrush.model.load import load_model

pytestmark = pytest.mark.numerics

F32 = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
EXACT = CacheConfig(key_precision="f32", value_precision="f32")
REDUCE = {
    "mean": lambda rows: rows.mean(axis=1),
    "max": lambda rows: rows.max(axis=1),
    "sum_squares": lambda rows: (rows**2).sum(axis=1),
}


def make_engine(folder: Path, cache: CacheConfig = EXACT, chunk: int = 512) -> Engine:
    config = SchedulerConfig(max_num_batched_tokens=chunk, num_kv_blocks=64)
    model = load_model(folder, "CPU", F32, "crush")
    return Engine(model, config, ov_genai.GenerationConfig(), lambda ids: "", cache)


def run(engine: Engine) -> None:
    while engine.has_unfinished():
        engine.step()


def scores_of(engine: Engine, ids: np.ndarray, watch: Watch) -> AttentionScores:
    handle = engine.add(0, ids, ov_genai.GenerationConfig(max_new_tokens=2, ignore_eos=True), CacheParams(policy=watch))
    run(engine)
    assert handle.end_reason
    return watch.scores


def assert_equal(ours: AttentionScores, eager: list[np.ndarray], watch: Watch) -> None:
    assert len(ours) == len(eager)
    for heads, attention in zip(ours, eager, strict=True):
        expected = REDUCE[watch.reduce](attention[:, -watch.window :])
        np.testing.assert_allclose(np.concatenate(heads), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("kind", "reduce"), covering(KINDS, REDUCE))
def test_scores_equal_eager_attention(
    kind: str, reduce: str, tiny_hf: Callable[[str], Path], tiny_ir: Callable[[str], Path]
) -> None:
    ids = np.random.default_rng(2).integers(0, VOCAB_SIZE, 75)
    watch = Watch(window=9, reduce=reduce)
    # Chunks of 24 rows: the window of the last 9 begins in one chunk and ends in the next.
    ours = scores_of(make_engine(tiny_ir(kind), chunk=24), ids, watch)
    assert_equal(ours, eager_attentions(tiny_hf(kind), ids), watch)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_scores_of_a_prompt_read_through_the_store_are_the_same(
    kind: str, tiny_hf: Callable[[str], Path], tiny_ir: Callable[[str], Path]
) -> None:
    """The prompt has 3 blocks, the staging pool fewer."""
    ids = np.random.default_rng(3).integers(0, VOCAB_SIZE, 75)
    watch = Watch(window=9)
    engine = make_engine(tiny_ir(kind), CacheConfig("f32", "f32", staging_bytes=1 << 16), chunk=24)
    assert engine.cache.staging.pool.num_blocks < 3  # type: ignore[attr-defined]
    assert_equal(scores_of(engine, ids, watch), eager_attentions(tiny_hf(kind), ids), watch)


def first_layers(count: int, folder: Path) -> None:
    """Write the first layers of SmolLM2 as a Hugging Face folder in float32.

    The default model's IR rounds some weights of the GGUF file.
    """
    import torch
    import transformers

    with TemporaryDirectory() as fetched:
        gguf = default_gguf(Path(fetched), print)
        transformers.utils.logging.disable_progress_bar()
        options = {"gguf_file": gguf.name}
        model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
    model.model.layers = model.model.layers[:count]
    model.config.num_hidden_layers = count
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)  # an export needs one; the real one is in the default model


@pytest.mark.parametrize("layers", [4, *rarely(30)])
def test_scores_of_a_real_model(layers: int, smollm2: Path, once: Callable[..., Path]) -> None:
    smollm2_hf = once(f"hf/smollm2-{layers}", lambda folder: first_layers(layers, folder))
    ir = once(f"ir/smollm2-{layers}", lambda folder: export_model(smollm2_hf, folder, weight_format="fp32"))
    text = " ".join(f"Sentence {i} says that the sea is {'calm' if i % 3 else 'wild'} today." for i in range(20))
    ids = ov_genai.Tokenizer(str(smollm2)).encode(text).input_ids.data[0].astype(np.int64)
    watch = Watch(window=16)
    assert_equal(scores_of(make_engine(ir), ids, watch), eager_attentions(smollm2_hf, ids), watch)


def test_scores_cost_nothing_unless_asked_for(tiny_ir: Callable[[str], Path]) -> None:
    engine = make_engine(tiny_ir("llama"))
    handle = engine.add(0, np.arange(40), ov_genai.GenerationConfig(max_new_tokens=3, ignore_eos=True))
    while engine.has_unfinished():
        engine.step()
        assert all(not len(scores) for scores in engine._runner.attention_scores())
    assert len(handle.outputs()[0].generated_ids) == 3


def test_only_the_request_that_asks_gets_scores(tiny_ir: Callable[[str], Path]) -> None:
    """Those that it would get alone."""
    ids = [np.random.default_rng(seed).integers(0, VOCAB_SIZE, 40 + seed) for seed in range(3)]
    expected = scores_of(make_engine(tiny_ir("llama")), ids[1], Watch(window=8))
    together, watch = make_engine(tiny_ir("llama")), Watch(window=8)
    config = ov_genai.GenerationConfig(max_new_tokens=5, ignore_eos=True)
    for i in range(3):
        hold(together, together.add(i, ids[i], config, CacheParams(policy=watch if i == 1 else None)))
    run(together)
    for ours, theirs in zip(watch.scores, expected, strict=True):
        np.testing.assert_allclose(np.concatenate(ours), np.concatenate(theirs), atol=1e-5)
