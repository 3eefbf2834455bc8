"""Which layers of a model can read the keys and values of another: the search of KVSharer.

Yang et al., "KVSharer: Efficient Inference via Layer-Wise Dissimilar KV Cache Sharing", arXiv 2410.18517, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.calibrate.layer_probe import EXACT, LayerProbe
from ov_kvcrush.model.graph.layer_sharing import can_share
from ov_kvcrush.pipelines.loading import load_tokenizer
from ov_kvcrush.utils.checks import check_integer, check_number

NUM_TOKENS, NUM_TEXTS, THRESHOLD = 64, 30, 0.5  # the authors' own

Shared = dict[int, int]  # layer -> the earlier one whose keys and values it reads


def find_shared_layers(
    model_folder: Path,
    texts: Sequence[str],
    num_shared: int,
    *,
    threshold: float = THRESHOLD,
    num_tokens: int = NUM_TOKENS,
    properties: Mapping[str, Any] = EXACT,
    progress: Callable[[str], None] = lambda line: None,
) -> Shared:
    """Search a map for `CacheConfig.shared_layers` with up to `num_shared` layers that read another's.

    texts: the first NUM_TEXTS are read, the first `num_tokens` tokens of each. threshold: what the cosine of the final
    hidden states with those of the model as it is must stay above. progress: told what was tried. The model is compiled
    anew for each map that is tried.
    Departure from the paper's code: pairs of layers with other windows or heads are not tried.
    Raises CrushError for texts that are too short, and for what is out of range; ModelError for a model that
    CrushAttention cannot run.
    """
    check_integer("num_shared", num_shared, 1)
    check_integer("num_tokens", num_tokens, 1)
    check_number("threshold", threshold, -1)
    probe = LayerProbe(model_folder, _token_ids(model_folder, texts, num_tokens), properties)
    if num_shared >= len(probe.layers):
        raise CrushError(f"num_shared must be in 1..{len(probe.layers) - 1}, got {num_shared}")
    pairs = [
        (i, j)
        for i, j in most_dissimilar(layer_distances(*probe.averages()))
        if can_share(probe.layers[i], probe.layers[j])
    ]
    own = probe.hidden({})
    return search(pairs, num_shared, threshold, lambda shared: mean_cosine(own, probe.hidden(shared)), progress)


def layer_distances(keys: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> np.ndarray:
    """float64 (L, L): how far two layers are from each other, NaN where a layer would not read an earlier one.

    keys, values: of each layer its averages over texts, float32 (heads, S, D). The distance is the Euclidean one of two
    vectors, averaged over heads, tokens, and keys and values.
    """
    num_layers = len(keys)
    distances = np.full((num_layers, num_layers), np.nan)
    for i in range(num_layers):
        for j in range(i):
            apart = [np.linalg.norm(x[i] - x[j], axis=-1).mean(dtype=np.float64) for x in (keys, values)]
            distances[i, j] = np.mean(apart)
    return distances


def most_dissimilar(distances: np.ndarray) -> list[tuple[int, int]]:
    """All pairs (i, j), j < i, of distances (L, L), the largest first; of equal ones the first by number."""
    i, j = np.tril_indices(len(distances), -1)
    order = np.argsort(-distances[i, j], kind="stable")
    return [(int(i[x]), int(j[x])) for x in order]


def search(
    pairs: Sequence[tuple[int, int]],
    num_shared: int,
    threshold: float,
    measure: Callable[[Shared], float],
    progress: Callable[[str], None] = lambda line: None,
) -> Shared:
    """Take each pair in turn if the map with it measures above threshold; stop at `num_shared` layers or at the end."""
    shared: Shared = {}
    for i, j in pairs:
        if len(shared) == num_shared:
            break
        if i in shared:
            continue
        tried = with_pair(shared, i, j)
        similarity = measure(tried)
        taken = similarity > threshold
        progress(f"layer {i} reads {tried[i]}: cosine {similarity:.3f}, {'taken' if taken else 'refused'}")
        if taken:
            shared = tried
    return dict(sorted(shared.items()))


def with_pair(shared: Mapping[int, int], i: int, j: int) -> Shared:
    """The map in which layer i reads what layer j reads or has, and so do those that read layer i."""
    owner = shared.get(j, j)
    return {i: owner, **{layer: owner if read == i else read for layer, read in shared.items()}}


def mean_cosine(own: np.ndarray, other: np.ndarray) -> float:
    """Cosine of what two models make of a text, all its tokens as one vector; the mean over texts (B, S, C)."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (own, other))
    return float(np.mean((a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))))


def _token_ids(model_folder: Path, texts: Sequence[str], num_tokens: int) -> np.ndarray:
    """int64 (B, num_tokens)."""
    if not texts:
        raise CrushError("texts must be at least one, got none")
    tokenizer = load_tokenizer(model_folder, {})
    rows = [np.asarray(tokenizer.encode(text).input_ids.data[0], np.int64) for text in texts[:NUM_TEXTS]]
    for index, row in enumerate(rows):
        if len(row) < num_tokens:
            raise CrushError(f"texts must have at least num_tokens={num_tokens} tokens, got {len(row)} in text {index}")
    return np.stack([row[:num_tokens] for row in rows])
