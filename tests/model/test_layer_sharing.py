"""Layers that read the keys and values of another: the same numbers as in eager code, and nothing of their own."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from chunked_logits import CHUNKS, F32, NO_STAGING, logits_at_chunk_ends
from eviction_runs import (
    EXACT,
    Tracer,
    add,
    assert_logits_equal,
    eager_model,
    make_engine,
    prompt,
    read_prompt,
    run,
    small,
    tokens,
)
from shared_reference import shared_logits, sharing
from tiny_models import HEAD_SIZE, HIDDEN_SIZE, NUM_HEADS, NUM_KV_HEADS, VOCAB_SIZE, tiny_model

from model_export import export_model
from ov_kvcrush import CacheConfig, CrushError, LLMPipeline, native
from ov_kvcrush.engine.engine import Engine
from ov_kvcrush.eval.likelihood.perplexity import distributions, log_softmax
from ov_kvcrush.model.graph.layer_sharing import store_layers
from ov_kvcrush.model.load import LoadedModel, load_model

NUM_LAYERS = 5
SHARED = {2: 0, 4: 1}  # of the model with five layers
TWO_OF_ONE = {1: 0, 2: 0, 4: 3}
# gemma3 has windows in layers 0, 1 and 3; phi3 and gpt_neox make queries, keys and values by one product.
MAPS = {"qwen2": {1: 0}, "gemma3": {1: 0, 3: 0}, "phi3": {1: 0}, "gpt_neox": {1: 0}}
CACHES: dict[str, dict[str, Any]] = {"staged": {}, "stored": {"staging_bytes": NO_STAGING}}
IDS = np.random.default_rng(1).integers(0, VOCAB_SIZE, sum(CHUNKS))
ATOL = 1e-3  # of logits whose size is about 10

Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("hf") / "llama", num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def folder(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ir") / "llama"
    export_model(hf, out, weight_format="fp32")
    return out


def config(shared: Mapping[int, int], **cache: Any) -> CacheConfig:
    return CacheConfig(**{**EXACT, "attention": "crush", "shared_layers": shared, **cache})


def engine(folder: Path, shared: Mapping[int, int] = SHARED) -> Engine:
    return make_engine(folder, {**EXACT, "shared_layers": shared})


# -- what is computed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", list(CACHES))
@pytest.mark.parametrize("shared", [SHARED, TWO_OF_ONE], ids=str)
def test_logits_are_those_of_eager_code(shared: dict[int, int], cache: str, hf: Path, folder: Path) -> None:
    expected = shared_logits(hf, IDS, shared)
    ours = logits_at_chunk_ends(folder, IDS, config(shared, **CACHES[cache]))
    np.testing.assert_allclose(ours, expected[np.cumsum(CHUNKS) - 1], atol=ATOL, rtol=0)
    # Sharing must change the logits, or agreement would mean little.
    assert np.abs(expected - shared_logits(hf, IDS, {})).max() > 100 * ATOL


@pytest.mark.parametrize("cache", list(CACHES))
@pytest.mark.parametrize("kind", list(MAPS))
def test_every_architecture_can_share(kind: str, cache: str, tiny_hf: Folders, tiny_ir: Folders) -> None:
    expected = shared_logits(tiny_hf(kind), IDS, MAPS[kind])
    ours = logits_at_chunk_ends(tiny_ir(kind), IDS, config(MAPS[kind], **CACHES[cache]))
    np.testing.assert_allclose(ours, expected[np.cumsum(CHUNKS) - 1], atol=ATOL, rtol=0)
    assert np.abs(expected - shared_logits(tiny_hf(kind), IDS, {})).max() > 100 * ATOL


@pytest.mark.parametrize("num_context", [1, 33, len(IDS) - 1])
def test_a_prompt_and_decoded_tokens_give_the_same(num_context: int, hf: Path, folder: Path) -> None:
    model = load_model(folder, "CPU", F32, "crush", config(SHARED).sharing)
    rows = distributions(model, config(SHARED), IDS, num_context).logprobs
    expected = [log_softmax(row) for row in shared_logits(hf, IDS, SHARED)[num_context - 1 : -1]]
    np.testing.assert_allclose(rows, expected, atol=ATOL, rtol=0)


def test_the_plugins_own_precision_is_nearer_to_the_shared_model_than_to_the_other(hf: Path, folder: Path) -> None:
    """That is bf16 on processors that have it, where CrushAttention may read prompts without PagedAttention."""
    ours = logits_at_chunk_ends(folder, IDS, config(SHARED), {})
    to_shared, to_other = (
        np.linalg.norm(ours - shared_logits(hf, IDS, shared)[np.cumsum(CHUNKS) - 1], axis=1) for shared in (SHARED, {})
    )
    assert (to_shared < to_other / 2)[np.array(CHUNKS).cumsum() > 2].all()


def test_steps_of_many_requests_give_what_each_gives_alone(folder: Path) -> None:
    lengths = (5, 40, 90, 33)
    alone = []
    for index, length in enumerate(lengths):
        one = engine(folder)
        handle = add(one, 0, prompt(length, index))
        run(one)
        alone.append(tokens(handle))
    together = engine(folder)
    handles = [add(together, i, prompt(length, i)) for i, length in enumerate(lengths)]
    run(together)
    assert [tokens(handle) for handle in handles] == alone
    other = engine(folder, {})
    unshared = [add(other, i, prompt(length, i)) for i, length in enumerate(lengths)]
    run(other)
    assert [tokens(handle) for handle in unshared] != alone


# -- what is there -----------------------------------------------------------------------------------------------------


def loaded(folder: Path, shared: Mapping[int, int]) -> LoadedModel:
    return load_model(folder, "CPU", F32, "crush", config(shared).sharing)


def layers_of(model: LoadedModel, kind: str) -> list[ov.Node]:
    """The plugin's own operations of a kind."""
    ops = model.compiled.get_runtime_model().get_ops()
    return [op for op in ops if op.get_rt_info()["layerType"].value == kind]


@pytest.mark.parametrize("shared", [SHARED, TWO_OF_ONE], ids=str)
def test_projections_of_sharing_layers_are_not_compiled(shared: dict[int, int], folder: Path) -> None:
    before, after = loaded(folder, {}), loaded(folder, shared)
    products, weights = (
        [len(layers_of(x, "FullyConnected")) for x in (before, after)],
        [sum(math.prod(op.get_output_shape(0)) for op in layers_of(x, "Const")) for x in (before, after)],
    )
    assert products[0] - products[1] == 2 * len(shared)
    assert weights[0] - weights[1] >= 2 * len(shared) * HIDDEN_SIZE * NUM_KV_HEADS * HEAD_SIZE


@pytest.mark.parametrize("shared", [SHARED, TWO_OF_ONE], ids=str)
def test_bytes_are_those_of_the_layers_that_store(shared: dict[int, int], folder: Path) -> None:
    used = []
    for chosen in ({}, shared):
        here = engine(folder, chosen)
        line = read_prompt(here, add(here, 0, prompt(70)))
        memory: Any = here.cache
        used.append((memory.bytes_of(line), memory.staging.tensors.bytes_per_block, memory.store.bytes_for(1000)))
    num_stored = NUM_LAYERS - len(shared)
    assert [NUM_LAYERS * x for x in used[1]] == [num_stored * x for x in used[0]]


def test_a_layer_that_is_read_has_its_own_queries_captured(folder: Path) -> None:
    """Layers 0 and 1 come before all sharing: policies see of them what they see without it."""
    seen = []
    for shared in ({}, SHARED):
        here = engine(folder, shared)
        line = read_prompt(here, add(here, 0, prompt(70), small({"name": "snapkv"}, kept_tokens=1000)))
        memory: Any = here.cache
        seen.append([memory.store.captured(memory.kv_of(line).store_id, layer) for layer in range(2)])
    for (rows, places), (other_rows, other_places) in zip(*seen, strict=True):
        assert len(rows)
        assert rows.shape[1:] == (NUM_HEADS * HEAD_SIZE,)
        np.testing.assert_array_equal(places, other_places)
        np.testing.assert_allclose(rows, other_rows, atol=1e-4)


@pytest.mark.parametrize("name", ["snapkv", "h2o", "kvcrush", "kvzip"])
def test_what_a_policy_leaves_is_what_all_readers_of_a_layer_see(name: str, hf: Path, folder: Path) -> None:
    here = engine(folder)
    tracer = Tracer(here, 110)
    handle = add(here, 0, prompt(90), small({"name": name}))
    tracer.run()
    (trace,) = tracer.of(handle)
    assert not trace.sees[0][:, -12].all(), "the policy must evict, or agreement would mean little"
    eager, places = eager_model(hf), store_layers(NUM_LAYERS, tuple(SHARED.items()))

    def shared_eager(ids: np.ndarray, sees: Any) -> np.ndarray:
        with sharing(SHARED):
            return eager(ids, [sees[place] for place in places])

    assert len(trace.sees) == NUM_LAYERS - len(SHARED)
    assert_logits_equal([trace], shared_eager)


def test_layers_of_the_store_are_those_that_store_in_order() -> None:
    assert store_layers(5, ((2, 0), (4, 1))) == [0, 1, 0, 2, 1]
    assert store_layers(5, ((1, 0), (2, 0), (4, 3))) == [0, 0, 0, 1, 1]
    assert store_layers(3, ()) == [0, 1, 2]


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        ({1: 1}, "must read earlier layers, got 1: 1"),
        ({1: 2}, "must read earlier layers, got 1: 2"),
        ({2: 1, 1: 0}, "must read layers that have keys and values of their own, got 2: 1 and 1: 0"),
        (((2, 0), (2, 1)), "must have each layer once"),
        ({2: -1}, "must be pairs of layers, integers of at least 0, got (2, -1)"),
        ({"2": 1}, "must be pairs of layers, integers of at least 0, got ('2', 1)"),
        ({2: True}, "must be pairs of layers, integers of at least 0, got (2, True)"),
        ((1, 0), "must be pairs of layers, integers of at least 0, got 1"),
        (((1, 0, 2),), "must be pairs of layers, integers of at least 0, got (1, 0, 2)"),
        (3, "must be a mapping from layers to layers, or pairs, got 3"),
    ],
    ids=str,
)
def test_maps_that_no_model_can_have_are_refused(shared: Any, message: str) -> None:
    with pytest.raises(CrushError, match=f"shared_layers {re.escape(message)}"):
        CacheConfig(shared_layers=shared)


def test_a_map_is_kept_as_pairs_in_order() -> None:
    written = [{4: 1, 2: 0}, {2: 0, 4: 1}, ((4, 1), (2, 0)), [[2, 0], [4, 1]]]
    configs = {CacheConfig(shared_layers=x) for x in written}  # type: ignore[arg-type]
    assert [x.sharing for x in configs] == [((2, 0), (4, 1))]
    assert CacheConfig().sharing == CacheConfig(shared_layers={}).sharing == ()


def test_layers_that_the_model_does_not_have_are_refused(folder: Path) -> None:
    with pytest.raises(CrushError, match=r"shared_layers must be of layers 0\.\.4, got 5: 1"):
        loaded(folder, {5: 1})


def test_a_layer_of_another_window_is_refused(tiny_ir: Folders) -> None:
    message = "shared_layers must be of layers with the same sliding window, got 2: 1 with 0 and 16"
    with pytest.raises(CrushError, match=message):
        loaded(tiny_ir("gemma3"), {2: 1})


def test_engines_without_a_store_refuse_a_map(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"engine": "genai", "cache_config": {"shared_layers": {2: 0}}}, "left out with engine='genai', got {2: 0}"),
        ({"cache_config": {"shared_layers": {2: 0}, "attention": "paged"}}, "with attention='paged', got {2: 0}"),
    ):
        with pytest.raises(CrushError, match=f"shared_layers must be .*{message}"):
            LLMPipeline(folder, **options)
    with pytest.raises(CrushError, match="shared_layers must be left out with attention='paged'"):
        load_model(folder, "CPU", F32, "paged", ((2, 0),))
    monkeypatch.setattr(native, "why_unavailable", lambda: "it was not built")
    with pytest.raises(CrushError, match="shared_layers must be left out where the native library is missing"):
        CacheConfig(shared_layers={2: 0}).choose_attention()
