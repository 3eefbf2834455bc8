"""The search for layers that can read another's keys and values, by itself and on a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared_reference import shared_states
from tiny_models import VOCAB_SIZE

from ov_kvcrush import CacheConfig, CrushError, LLMPipeline
from ov_kvcrush.eval.calibrate.kv_sharer import (
    find_shared_layers,
    layer_distances,
    mean_cosine,
    most_dissimilar,
    search,
    with_pair,
)
from ov_kvcrush.eval.calibrate.layer_probe import LayerProbe

# gemma3 has four layers, all with windows but for the third: 1 can read 0, and 3 can read 0 and 1.
KIND, CAN_READ = "gemma3", {(1, 0), (3, 0), (3, 1)}
TEXTS = [f"{name} has counted the boats in the harbour twice, and {name} found nine." for name in ("Ada", "Bo", "Cy")]
Folders = Callable[[str], Path]


def random_ids(num_texts: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, (num_texts, length))


# -- the search by itself ----------------------------------------------------------------------------------------------


def test_distances_are_means_of_euclidean_ones() -> None:
    rng = np.random.default_rng(0)
    keys, values = (list(rng.standard_normal((4, 2, 7, 8), np.float32)) for _ in range(2))
    distances = layer_distances(keys, values)
    for i in range(4):
        for j in range(4):
            of_each = [
                np.sqrt(np.sum((x[i][head, token] - x[j][head, token]) ** 2))
                for x in (keys, values)
                for head in range(2)
                for token in range(7)
            ]
            np.testing.assert_allclose(distances[i, j], np.mean(of_each) if j < i else np.nan, rtol=1e-5)


def test_the_most_dissimilar_pairs_come_first() -> None:
    distances = np.full((4, 4), np.nan)
    distances[np.tril_indices(4, -1)] = [3, 9, 1, 4, 3, 7]  # (1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)
    assert most_dissimilar(distances) == [(2, 0), (3, 2), (3, 0), (1, 0), (3, 1), (2, 1)]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_found_can_be_loaded_and_measures_above_the_threshold(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_layers, num_shared = int(rng.integers(2, 12)), int(rng.integers(1, 8))
    pairs = most_dissimilar(rng.random((num_layers, num_layers)))
    measured: list[tuple[dict[int, int], float]] = []

    def measure(shared: Mapping[int, int]) -> float:
        measured.append((dict(shared), float(rng.random())))
        return measured[-1][1]

    found = search(pairs, num_shared, 0.5, measure)
    accepted = [shared for shared, similarity in measured if similarity > 0.5]
    assert found == (accepted[-1] if accepted else {})
    assert len(found) == len(accepted) <= num_shared
    assert CacheConfig(shared_layers=found).sharing == tuple(found.items())  # neither chains nor later layers
    if len(found) < num_shared:  # everything was tried
        assert {i for i, _ in pairs} - set(found) <= {i for shared, _ in measured for i in shared}


def test_pairs_are_tried_in_their_order_until_enough() -> None:
    tried: list[dict[int, int]] = []

    def measure(shared: dict[int, int]) -> float:
        tried.append(shared)
        return 0.5 if len(tried) == 2 else 0.6  # at the threshold is not above it

    lines: list[str] = []
    assert search([(3, 1), (2, 0), (3, 0), (4, 3), (2, 1)], 2, 0.5, measure, lines.append) == {3: 1, 4: 1}
    assert tried == [{3: 1}, {3: 1, 2: 0}, {3: 1, 4: 1}]
    assert lines == [
        "layer 3 reads 1: cosine 0.600, taken",
        "layer 2 reads 0: cosine 0.500, refused",
        "layer 4 reads 1: cosine 0.600, taken",
    ]


def test_readers_of_a_layer_that_comes_to_read_another_read_that() -> None:
    assert with_pair({3: 1}, 4, 3) == {3: 1, 4: 1}
    assert with_pair({3: 1, 2: 0}, 1, 0) == {3: 0, 2: 0, 1: 0}


def test_cosine_is_of_whole_texts() -> None:
    a = np.array([[[3.0, 0.0], [0.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]])
    b = np.array([[[3.0, 0.0], [0.0, -4.0]], [[2.0, 2.0], [2.0, 2.0]]])
    assert mean_cosine(a, b) == pytest.approx(((9 - 16) / 25 + 1) / 2)


# -- on a model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [{}, {1: 0, 3: 0}], ids=str)
def test_hidden_states_are_hugging_faces(shared: dict[int, int], tiny_hf: Folders, tiny_ir: Folders) -> None:
    ids = random_ids(3, 40)
    expected = shared_states(tiny_hf(KIND), ids, shared)
    np.testing.assert_allclose(LayerProbe(tiny_ir(KIND), ids).hidden(shared), expected, atol=1e-3, rtol=0)
    assert np.abs(expected - shared_states(tiny_hf(KIND), ids, {1: 0})).max() > 0.1


def test_averages_are_of_the_cached_keys_and_values(tiny_hf: Folders, tiny_ir: Folders) -> None:
    import torch
    import transformers

    ids = random_ids(3, 12)  # within the window: Hugging Face's cache has them all
    model = transformers.AutoModel.from_pretrained(tiny_hf("llama"), dtype=torch.float32).eval()
    with torch.no_grad():
        cache: Any = model(torch.from_numpy(ids), use_cache=True).past_key_values
    probe = LayerProbe(tiny_ir("llama"), ids)
    for name, means in zip(("keys", "values"), probe.averages(), strict=True):
        assert len(means) == len(probe.layers) == len(cache.layers)
        for mean, layer in zip(means, cache.layers, strict=True):
            np.testing.assert_allclose(mean, getattr(layer, name).numpy().mean(axis=0), atol=1e-4)


def test_a_map_is_found_that_the_model_can_be_loaded_with(tiny_ir: Folders) -> None:
    lines: list[str] = []
    folder = tiny_ir(KIND)
    found = find_shared_layers(folder, TEXTS, 2, threshold=-1, num_tokens=20, progress=lines.append)
    assert set(found.items()) <= CAN_READ
    assert len(found) == len(lines) == 2, "above a cosine of -1 the first pairs are taken"
    pipe = LLMPipeline(folder, cache_config={"shared_layers": found})
    assert pipe.generate(TEXTS[0], max_new_tokens=4, ignore_eos=True)
    assert find_shared_layers(folder, TEXTS, 2, threshold=1, num_tokens=20) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": []}, "texts must be at least one, got none"),
        ({"texts": [*TEXTS, "short"]}, "texts must have at least num_tokens=20 tokens, got 5 in text 3"),
        ({"num_shared": 4}, r"num_shared must be in 1\.\.3, got 4"),
        ({"num_shared": 0}, "num_shared must be an integer of at least 1, got 0"),
        ({"threshold": "x"}, "threshold must be a finite number"),
    ],
    ids=lambda x: re.sub(r"\W+", " ", str(x))[:30],
)
def test_what_cannot_be_searched_is_refused(changes: dict[str, Any], message: str, tiny_ir: Folders) -> None:
    values: dict[str, Any] = {"texts": TEXTS, "num_shared": 2, "num_tokens": 20, **changes}
    with pytest.raises(CrushError, match=message):
        find_shared_layers(tiny_ir(KIND), **values)
