"""The engine over the compressed store: whatever way a prompt takes, the same tokens; every byte comes back."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as ov_genai
import pytest
from covering import rarely
from held import hold
from tiny_models import VOCAB_SIZE, tiny_model

from model_export import export_model
from ov_kvcrush import CacheConfig, CrushError, LLMPipeline, ModelError, RequestError, SchedulerConfig, native
from ov_kvcrush.engine.engine import Engine
from ov_kvcrush.engine.handle import GenerationHandle
from ov_kvcrush.model.graph.attention import AttentionLayer, check_layer
from ov_kvcrush.model.load import load_model
from ov_kvcrush.utils.process_memory import rss_bytes

F32 = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
EXACT = {"key_precision": "f32", "value_precision": "f32"}
Alone = Callable[..., list[list[int]]]


def make_engine(folder: Path, cache: dict[str, Any] | None = None, **scheduler: Any) -> Engine:
    model = load_model(folder, "CPU", F32, "crush")
    settings = SchedulerConfig(**{"max_num_batched_tokens": 64, **scheduler})
    return Engine(model, settings, ov_genai.GenerationConfig(), lambda ids: "", CacheConfig(**(cache or EXACT)))


def add(engine: Engine, index: int, ids: np.ndarray, new_tokens: int = 24, **options: Any) -> GenerationHandle:
    config = ov_genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, **options)
    return hold(engine, engine.add(index, ids, config))


def run(engine: Engine) -> None:
    while engine.has_unfinished():
        engine.step()


def tokens(handle: GenerationHandle) -> list[list[int]]:
    return [output.generated_ids for output in handle.outputs()]


def prompt(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, n)


@pytest.fixture(scope="module")
def alone() -> Alone:
    """Return what a request is answered that has an engine for itself; each model's is the same for all tests."""
    engine_of = cache(make_engine)

    def answer(folder: Path, ids: np.ndarray, **options: Any) -> list[list[int]]:
        engine = engine_of(folder)
        handle = add(engine, 0, ids, **options)
        run(engine)
        assert engine.metrics().kv_cache_size_in_bytes == 0
        return tokens(handle)

    return answer


# -- one result, many ways ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3", "phi3"])
def test_prompt_longer_than_the_staging_pool_gives_the_same_tokens(
    kind: str, tiny_ir: Callable[[str], Path], alone: Alone
) -> None:
    folder, ids = tiny_ir(kind), prompt(150)
    small = make_engine(folder, {**EXACT, "staging_bytes": 1 << 16})
    handle = add(small, 0, ids)
    small.step()
    assert small.metrics().staging_size_in_bytes == 0, "no block is staged"
    run(small)
    assert tokens(handle) == alone(folder, ids)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_later_turn_on_kept_kv_gives_the_tokens_of_a_fresh_prompt(
    kind: str, tiny_ir: Callable[[str], Path], alone: Alone
) -> None:
    folder = tiny_ir(kind)
    engine = make_engine(folder, enable_prefix_caching=True)
    first = add(engine, 0, prompt(90))
    run(engine)
    second = np.concatenate([prompt(90), np.array(tokens(first)[0][:-1]), prompt(40, seed=5)])
    handle = add(engine, 1, second)
    run(engine)
    assert handle.get_stats().num_reused_tokens == 90 + 23
    assert tokens(handle) == alone(folder, second)


def test_prompt_that_shares_a_beginning_inside_a_tile(tiny_ir: Callable[[str], Path], alone: Alone) -> None:
    folder = tiny_ir("llama")
    engine = make_engine(folder, enable_prefix_caching=True)
    add(engine, 0, prompt(100))
    run(engine)
    other = np.concatenate([prompt(77), prompt(20, seed=9)])
    handle = add(engine, 1, other)
    run(engine)
    assert handle.get_stats().num_reused_tokens == 77
    assert tokens(handle) == alone(folder, other)


def test_many_requests_of_every_kind_in_one_step(tiny_ir: Callable[[str], Path], alone: Alone) -> None:
    """Decode rows, staged prompts and prompts through the store share inferences; none notices the others."""
    folder = tiny_ir("qwen2")
    engine = make_engine(folder, {**EXACT, "staging_bytes": 100_000}, max_num_batched_tokens=48)
    prompts = [prompt(n, seed=n) for n in (5, 33, 140, 64, 1, 200)]
    handles = []
    for index, ids in enumerate(prompts):
        handles.append(add(engine, index, ids))
        engine.step()
    run(engine)
    assert [tokens(h) for h in handles] == [alone(folder, ids) for ids in prompts]


def test_sequences_of_one_request_share_the_prompt(tiny_ir: Callable[[str], Path]) -> None:
    engine = make_engine(tiny_ir("llama"))
    handle = add(engine, 0, prompt(200), do_sample=True, num_return_sequences=4, rng_seed=3)
    most = 0
    while engine.has_unfinished():
        engine.step()
        most = max(most, engine.metrics().kv_cache_size_in_bytes)
    whole = engine.cache.store.bytes_for(224)  # type: ignore[attr-defined]
    assert len({tuple(t) for t in tokens(handle)}) == 4
    assert most < 2 * whole, "four copies of the prompt would be more"
    assert engine.metrics().kv_cache_size_in_bytes == 0


def test_quantised_store_answers_like_the_exact_one_on_a_real_model(smollm2: Path) -> None:
    question = "What is the capital of France? Answer in one sentence."
    configs = {
        precision: {"key_precision": precision, "value_precision": precision, "recent_tokens": 0}
        for precision in ("f32", "bf16", "u8", "u4")
    }
    pipe = LLMPipeline(smollm2, cache_config=configs["f32"])
    answers = {
        precision: pipe.with_cache(config).generate(question, max_new_tokens=12)
        for precision, config in configs.items()
    }
    assert all("Paris" in answer for answer in answers.values()), answers


# -- memory ------------------------------------------------------------------------------------------------------------


def test_bytes_follow_the_formula_and_staging_is_empty_after_adoption(tiny_ir: Callable[[str], Path]) -> None:
    engine = make_engine(tiny_ir("llama"), {"key_precision": "u8", "value_precision": "u4"})
    store = engine.cache.store  # type: ignore[attr-defined]
    for n in (31, 32, 33, 64, 150):
        handle = add(engine, 0, prompt(n), new_tokens=8)
        while not tokens(handle)[0]:
            engine.step()
        assert engine.metrics().staging_size_in_bytes == 0
        assert engine.metrics().kv_cache_size_in_bytes == store.nbytes == store.bytes_for(n)
        run(engine)
        assert store.nbytes == 0


def test_limit_is_never_passed_and_all_get_through(tiny_ir: Callable[[str], Path], alone: Alone) -> None:
    folder = tiny_ir("llama")
    probe = make_engine(folder).cache.store  # type: ignore[attr-defined]
    limit = probe.bytes_for(260)
    engine = make_engine(folder, {**EXACT, "max_bytes": limit})
    prompts = [prompt(n, seed=n) for n in (100, 90, 80, 70, 60)]
    handles = [add(engine, i, ids, new_tokens=60) for i, ids in enumerate(prompts)]
    most = 0
    while engine.has_unfinished():
        engine.step()
        most = max(most, engine.metrics().kv_cache_size_in_bytes)
        assert most <= limit
    assert most > limit // 2
    assert engine.metrics().num_preemptions > 0
    assert [tokens(h) for h in handles] == [alone(folder, ids, new_tokens=60) for ids in prompts]


def test_request_that_can_never_fit_is_refused_with_both_numbers(tiny_ir: Callable[[str], Path], alone: Alone) -> None:
    folder = tiny_ir("llama")
    limit = make_engine(folder).cache.store.bytes_for(128)  # type: ignore[attr-defined]
    engine = make_engine(folder, {**EXACT, "max_bytes": limit})
    other = add(engine, 0, prompt(40))
    with pytest.raises(RequestError, match=rf"KV store of {limit} bytes, got 500 tokens, which take \d+ bytes"):
        add(engine, 1, prompt(500))
    run(engine)
    assert tokens(other) == alone(folder, prompt(40))


def test_one_that_outgrows_the_store_ends_and_the_others_finish(tiny_ir: Callable[[str], Path], alone: Alone) -> None:
    folder = tiny_ir("llama")
    limit = make_engine(folder).cache.store.bytes_for(192)  # type: ignore[attr-defined]
    engine = make_engine(folder, {**EXACT, "max_bytes": limit})
    config = ov_genai.GenerationConfig(max_new_tokens=1000, ignore_eos=True)
    long, short = engine.add(0, prompt(100), config), add(engine, 1, prompt(30, seed=1))
    run(engine)
    assert tokens(short) == alone(folder, prompt(30, seed=1))
    assert 60 < len(tokens(long)[0]) < 1000
    assert engine.metrics().kv_cache_size_in_bytes == 0


def test_process_grows_by_what_the_store_says(tmp_path: Path) -> None:
    """Prompts of 1k are held; the staging blocks they were read on are the operating system's again.

    Of a model whose keys and values take many bytes and hardly any time.
    """
    wide = {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
    export_model(tiny_model("llama", tmp_path / "hf", **wide), tmp_path / "ir", weight_format="fp32")
    model = load_model(tmp_path / "ir", "CPU", {}, "crush")
    engine = Engine(
        model, SchedulerConfig(max_num_batched_tokens=512, max_step_ms=0), ov_genai.GenerationConfig(), lambda ids: "",
        CacheConfig(key_precision="f32", value_precision="f32"),
    )  # fmt: skip

    def hold_prompts(num_prompts: int) -> int:
        rng = np.random.default_rng(0)
        for index in range(num_prompts):
            config = ov_genai.GenerationConfig(max_new_tokens=40, ignore_eos=True)
            hold(engine, engine.add(index, rng.integers(0, VOCAB_SIZE, 1024), config))
        while any(not handle.outputs()[0].generated_ids for handle in vars(engine)["held_handles"]):
            engine.step()
        return rss_bytes()

    hold_prompts(3)  # kernels are compiled and activations are allocated, those of as many prompts
    run(engine)
    gc.collect()
    before = rss_bytes()
    growth, held = hold_prompts(3) - before, engine.metrics().kv_cache_size_in_bytes
    run(engine)
    assert held > 140e6
    assert abs(growth - held) < 0.1 * held, (growth, held)


# -- refusals ----------------------------------------------------------------------------------------------------------


SIZES = r"head size of layer '.+' must be a multiple of 16 in 32\.\.256, got "
GROUPS = r"query heads per KV head of layer '.+' must be an integer in 1\.\.16, got "


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_size", "message"),
    [
        (4, 2, 24, SIZES + "24"), (4, 2, 16, SIZES + "16"), (4, 2, 272, SIZES + "272"),
        (34, 1, 32, GROUPS + "34 / 1"), (3, 2, 32, GROUPS + "3 / 2"), (1, 2, 32, GROUPS + "1 / 2"),
    ],
)  # fmt: skip
def test_heads_that_the_kernels_lack_are_refused(
    num_heads: int, num_kv_heads: int, head_size: int, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        check_layer(AttentionLayer("layer", num_heads, num_kv_heads, head_size, window=0, scale=1.0))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"head_dim": 24}, SIZES + "24"),
        *rarely(
            ({"head_dim": 16}, SIZES + "16"),
            ({"num_attention_heads": 34, "num_key_value_heads": 1, "head_dim": 32}, GROUPS + "34 / 1"),
        ),
    ],
)
def test_models_with_such_heads_are_refused_by_layer_and_run_paged(
    overrides: dict[str, int], message: str, tmp_path: Path
) -> None:
    export_model(tiny_model("llama", tmp_path / "hf", **overrides), tmp_path / "ir", weight_format="fp32")
    with pytest.raises(ModelError, match=message):
        LLMPipeline(tmp_path / "ir")
    pipe = LLMPipeline(tmp_path / "ir", cache_config={"attention": "paged"})
    assert pipe.generate(ov.Tensor(prompt(20)[None]), max_new_tokens=4, ignore_eos=True).tokens[0]


def test_without_the_native_library_it_says_so_and_runs(
    tiny_ir: Callable[[str], Path], alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "why_unavailable", lambda: "the native library was not built")
    with pytest.warns(RuntimeWarning, match="not compressed: the native library was not built") as told:
        pipe = LLMPipeline(tiny_ir("llama"), **F32, KV_CACHE_PRECISION="f32")
    assert len([w for w in told if w.category is RuntimeWarning]) == 1
    ids = prompt(60)
    config = ov_genai.GenerationConfig(max_new_tokens=12, ignore_eos=True)
    assert pipe.generate(ov.Tensor(ids[None]), config).tokens == alone(tiny_ir("llama"), ids, new_tokens=12)
    with pytest.raises(CrushError, match="attention must be 'paged' where the native library is missing, got 'crush'"):
        LLMPipeline(tiny_ir("llama"), cache_config={"attention": "crush"})


def test_with_the_native_library_nothing_is_said(tiny_ir: Callable[[str], Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        LLMPipeline(tiny_ir("llama"))


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "precision": ({"key_precision": "u3"}, "key_precision must be one of f32, bf16, f16, u8, u4, u2, got 'u3'"),
    "values": ({"value_precision": 8}, "value_precision must be one of .*, got 8"),
    "recent": ({"recent_tokens": -1}, "recent_tokens must be an integer of at least 0, got -1"),
    "group": ({"group_size": 24}, "group_size must be a multiple of 16, got 24"),
    "limit": ({"max_bytes": 1000}, r"max_bytes must be at least \d+, as a short request takes, got 1000"),
    "staging": ({"staging_bytes": 100}, r"staging_bytes must be at least one block of 32 tokens, \d+ bytes, got 100"),
    "unknown": ({"key_precison": "u8"}, "did you mean 'key_precision'"),
    "attention": (
        {"attention": "page"},
        "attention must be one of auto, crush, paged, got 'page'",
    ),
    "paged": (
        {"attention": "paged", "key_precision": "u4"},
        "key_precision and value_precision must be left alone with attention='paged'",
    ),
}


@pytest.mark.parametrize("name", list(BAD_CONFIGS))
def test_bad_cache_config_is_refused(name: str, tiny_ir: Callable[[str], Path]) -> None:
    config, message = BAD_CONFIGS[name]
    with pytest.raises(CrushError, match=message):
        LLMPipeline(tiny_ir("llama"), cache_config=config)


def test_openvino_names_of_precisions_hold(tiny_ir: Callable[[str], Path]) -> None:
    pipe = LLMPipeline(tiny_ir("llama"), KEY_CACHE_PRECISION=ov.Type.u8, VALUE_CACHE_PRECISION="u4")
    config = pipe._backend.cache.store  # type: ignore[attr-defined]
    ours = CacheConfig(key_precision="u8", value_precision="u4")
    reference = make_engine(tiny_ir("llama"), {"key_precision": "u8", "value_precision": "u4"}).cache.store  # type: ignore[attr-defined]
    assert ours.key_precision == "u8"
    # The recent window is bf16 here and f32 there; what left it takes the same bytes.
    assert config.bytes_for(64000) - config.bytes_for(32000) == reference.bytes_for(64000) - reference.bytes_for(32000)
