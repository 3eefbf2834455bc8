"""OpenVINO's CPU plugin: a core of it without a trap, and the types that it computes and caches in."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import openvino as ov
import openvino.opset15 as ops

_SS_DISABLE = 2  # of <bits/ss_flags.h>
_QUANTISED = ("u8", "u4")
_OWN_TYPES = {"dynamic": "f32"}  # each operation in the model's own type
# Values of ONEDNN_MAX_CPU_ISA below bf16's instructions, and below those for dot products of int8.
_WITHOUT_INT8_DOT = ("SSE41", "AVX", "AVX2")
_WITHOUT_BF16 = (*_WITHOUT_INT8_DOT, "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")


class PluginPrecisions(NamedTuple):
    """Types by OpenVINO's names: of cached keys, of cached values, and of what the model computes in."""

    key: str
    value: str
    inference: str


class _SignalStack(ctypes.Structure):
    """stack_t of <signal.h>."""

    _fields_ = (("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t))


def open_core() -> ov.Core:
    """A new ov.Core with its CPU plugin loaded; this thread's alternate signal stack is as it was before.

    The plugin (openvino 2026.4) sets an alternate signal stack when it is loaded. When it is unloaded it restores the
    one that it found, which may belong to another plugin that is unloaded already. Python's signal handlers run on
    that stack: after two pipelines were dropped in the order in which they were made, the next Ctrl-C was a
    segmentation fault.
    """
    with kept_signal_stack():
        core = ov.Core()
        core.get_versions("CPU")  # loads it
    for name, value in capped_properties().items():
        core.set_property("CPU", {name: value})
    return core


def capped_properties() -> dict[str, str]:
    """Defaults that keep the plugin within the instructions that ONEDNN_MAX_CPU_ISA leaves to oneDNN; mostly none.

    The plugin (openvino 2026.4) asks the processor what it has, not oneDNN, and on a capped one asks for bf16 and int8
    products that oneDNN then has no code for: "could not create a primitive descriptor".
    """
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    found = {}
    if cap in _WITHOUT_BF16:
        found["INFERENCE_PRECISION_HINT"] = "f32"
    if cap in _WITHOUT_INT8_DOT:
        found["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
    return found


def one_operation() -> ov.Model:
    """The smallest model that can be compiled: only a compiled model tells what the plugin made of properties."""
    node = ops.parameter(ov.PartialShape([1]), ov.Type.f32)
    return ov.Model([ops.relu(node)], [node])


def plugin_precisions(properties: Mapping[str, Any]) -> PluginPrecisions:
    """The types that the CPU plugin chooses for `properties`. Raises RuntimeError if it does not take them."""
    compiled = open_core().compile_model(one_operation(), "CPU", dict(properties))
    names = ("KEY_CACHE_PRECISION", "VALUE_CACHE_PRECISION", "INFERENCE_PRECISION_HINT")
    types = [compiled.get_property(name).to_string() for name in names]
    return PluginPrecisions(*(_OWN_TYPES.get(name, name) for name in types))


def plugin_threads(properties: Mapping[str, Any]) -> int:
    """Threads of an inference with these properties."""
    return int(
        open_core().compile_model(one_operation(), "CPU", dict(properties)).get_property("INFERENCE_NUM_THREADS")
    )


def quantises_inputs(properties: Mapping[str, Any]) -> bool:
    """Whether the CPU plugin quantises what compressed weights are multiplied with."""
    compiled = open_core().compile_model(one_operation(), "CPU", dict(properties))
    return int(compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")) > 0


def paged_precisions(key: str, value: str, properties: Mapping[str, Any]) -> dict[str, str]:
    """The properties that make PagedAttention store keys and values in these types; empty if it cannot.

    It mixes u8 and u4 freely. Float types must be the inference type, or f16 beside f32. It has no u2.
    """
    inference = plugin_precisions(properties).inference
    is_float = key == value and (key == inference or (key, inference) == ("f16", "f32"))
    if is_float or (key in _QUANTISED and value in _QUANTISED):
        return {"KEY_CACHE_PRECISION": key, "VALUE_CACHE_PRECISION": value}
    return {}


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Leave this thread's alternate signal stack as it was, whatever loads the plugin inside; see `open_core`."""
    sigaltstack = getattr(ctypes.CDLL(None), "sigaltstack", None) if sys.platform == "linux" else None
    if sigaltstack is None:
        yield
        return
    before = _SignalStack()
    sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        # A stack too small for the registers that the plugin uses is refused; none is better than one that is freed.
        if sigaltstack(ctypes.byref(before), None):
            sigaltstack(ctypes.byref(_SignalStack(None, _SS_DISABLE, 0)), None)
