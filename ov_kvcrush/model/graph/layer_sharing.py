"""Layers that attend to the keys and values of an earlier layer, and have none of their own (KVSharer).

Yang et al., "KVSharer: Efficient Inference via Layer-Wise Dissimilar KV Cache Sharing", arXiv 2410.18517.
"""

from __future__ import annotations

from collections.abc import Sequence

import openvino as ov

from ov_kvcrush.errors import CrushError
from ov_kvcrush.model.graph.attention import KEY_CACHE, VALUE_CACHE, AttentionLayer, K, V, attention_ops

SharedLayers = tuple[tuple[int, int], ...]  # (i, j): layer i reads what layer j stores, j < i; i ascending


def share_layers(model: ov.Model, shared: SharedLayers) -> None:
    """Give the PagedAttention of each layer i the keys, the values and the cache of its layer j.

    Keys are taken with their rotary positions, which are the same in both layers. The projections of layer i to keys
    and values have no reader then, so the plugin does not compile them; where one product makes queries, keys and
    values together it stays whole. PagedAttention of layer i writes to the blocks of layer j what is there already.
    The layers must have passed `check_shared_layers`.
    """
    layers = attention_ops(model)
    own = [layers[i].input_value(index).get_node() for i, _ in shared for index in (KEY_CACHE, VALUE_CACHE)]
    for i, j in shared:
        for index in (K, V, KEY_CACHE, VALUE_CACHE):
            layers[i].input(index).replace_source_output(layers[j].input_value(index))
    for parameter in own:
        model.remove_parameter(parameter)


def check_shared_layers(shared: SharedLayers, layers: Sequence[AttentionLayer]) -> None:
    """Raise CrushError unless both layers of each pair are the model's and have the same heads, window and scale."""
    for i, j in shared:
        if i >= len(layers):
            raise CrushError(f"shared_layers must be of layers 0..{len(layers) - 1}, got {i}: {j}")
        different = _different(layers[i], layers[j])
        if different:
            raise CrushError(f"shared_layers must be of layers with the same {different[0]}, got {i}: {j} with "
                             f"{different[1]} and {different[2]}")  # fmt: skip


def can_share(reader: AttentionLayer, owner: AttentionLayer) -> bool:
    """Whether `reader` can attend to the keys and values of `owner`."""
    return _different(reader, owner) is None


def store_layers(num_layers: int, shared: SharedLayers) -> list[int]:
    """The layer of the store that each layer of the model reads: those that store something, in their order."""
    owners = dict(shared)
    places = {layer: place for place, layer in enumerate(x for x in range(num_layers) if x not in owners)}
    return [places[owners.get(layer, layer)] for layer in range(num_layers)]


def _different(a: AttentionLayer, b: AttentionLayer) -> tuple[str, object, object] | None:
    """What two layers differ in, and both values. The store has one shape for all that read a layer of it."""
    names = ("KV heads", "head size", "sliding window", "query heads", "scale", "ALiBi slopes")
    values = [(x.num_kv_heads, x.head_size, x.window, x.num_heads, x.scale, x.alibi_slopes) for x in (a, b)]
    return next((found for found in zip(names, *values, strict=True) if found[1] != found[2]), None)
