"""Types of keys and values: what OpenVINO's own attention can hold, and what it makes of its properties."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import openvino as ov
import openvino.opset15 as ops

from ov_kvcrush.model.plugin import open_core

_QUANTISED = ("u8", "u4")
_NAMES = {"dynamic": "f32"}  # each operation in the model's own type


class PluginPrecisions(NamedTuple):
    """Types by OpenVINO's names: of cached keys, of cached values, and of what the model computes in."""

    key: str
    value: str
    inference: str


def plugin_precisions(properties: Mapping[str, Any]) -> PluginPrecisions:
    """What the CPU plugin makes of `properties`, defaults included. Raises RuntimeError if it does not take them."""
    # Only a compiled model tells what was chosen: one operation is enough.
    node = ops.parameter(ov.PartialShape([1]), ov.Type.f32)
    compiled = open_core().compile_model(ov.Model([ops.relu(node)], [node]), "CPU", dict(properties))
    names = ("KEY_CACHE_PRECISION", "VALUE_CACHE_PRECISION", "INFERENCE_PRECISION_HINT")
    types = [compiled.get_property(name).to_string() for name in names]
    return PluginPrecisions(*(_NAMES.get(name, name) for name in types))


def paged_precisions(key: str, value: str, properties: Mapping[str, Any]) -> dict[str, str]:
    """The properties that make PagedAttention store keys and values in these types; none if it cannot.

    It mixes u8 and u4 freely, but floats must be what the model computes in, or f16 beside f32; u2 it has not.
    """
    inference = plugin_precisions(properties).inference
    is_float = key == value and (key == inference or (key, inference) == ("f16", "f32"))
    if is_float or (key in _QUANTISED and value in _QUANTISED):
        return {"KEY_CACHE_PRECISION": key, "VALUE_CACHE_PRECISION": value}
    return {}
