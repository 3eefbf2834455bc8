"""From a folder on disk to a compiled model on a paged KV cache."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openvino as ov

from ov_kvcrush import native
from ov_kvcrush.errors import CrushError, ModelError, did_you_mean, reason_of
from ov_kvcrush.model.adapters import ModelAdapters
from ov_kvcrush.model.folder import check_model_folder
from ov_kvcrush.model.graph.adapters import use_adapters
from ov_kvcrush.model.graph.attention import AttentionLayer, attention_ops, read_layer
from ov_kvcrush.model.graph.layer_sharing import SharedLayers, check_shared_layers, share_layers
from ov_kvcrush.model.graph.products import use_few_row_products
from ov_kvcrush.model.graph.rewrite import (
    gather_sampled_rows,
    restore_mask,
    use_crush_attention,
    use_paged_attention,
)
from ov_kvcrush.model.plugin import one_operation, open_core, plugin_precisions, quantises_inputs
from ov_kvcrush.model.score_terms import score_terms
from ov_kvcrush.model.source import ModelSource, ModelText, read_facts, read_graph
from ov_kvcrush.model.support import attention_reason
from ov_kvcrush.utils.process_memory import free_memory_bytes

_PIPELINE_OPTIONS = ("engine", "scheduler_config", "cache_config", "tokenizer", "device", "properties")
# Of compiled models on disk: a rewritten graph has operations that cannot be written, and handles of this process.
_OF_MODEL_CACHE = ("CACHE_DIR", "CACHE_MODE", "CACHE_ENCRYPTION_CALLBACKS")

NONE_LOADED = ModelAdapters()


@dataclass(frozen=True)
class LoadedModel:
    """A compiled model and the facts about it that the engine needs.

    context_length: None if no file of the folder states it. attention: "crush" or "paged". pages_prompts: True if
    PagedAttention computes prompts, False if CrushAttention does. layers: attention layers that store keys and values,
    the store's, with "crush" only. recent_precision: type in which keys and values are computed.
    shared_layers: of the model, which read the keys and values of another. folder: where the model lies, None for a
    text. text: whose bytes the graph's constants are.
    products: weights that are packed a second time, for steps of few rows; the graph needs them alive.
    adapters: LoRA that requests may run with.
    """

    compiled: ov.CompiledModel
    vocab_size: int
    context_length: int | None
    attention: str = "paged"
    layers: tuple[AttentionLayer, ...] = ()
    recent_precision: str = "f32"
    pages_prompts: bool = True
    shared_layers: SharedLayers = ()
    folder: Path | None = None
    products: tuple[native.Product, ...] = ()
    adapters: ModelAdapters = NONE_LOADED
    text: ModelText | None = None

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weights that are there twice."""
        return sum(product.nbytes for product in self.products)

    @property
    def has_scores(self) -> bool:
        """Whether the model has attention scores as outputs."""
        return self.attention == "crush"


def check_device(core: ov.Core, device: str) -> str:
    """The device as OpenVINO spells it: in capitals. Raises CrushError listing this machine's if it is none of them."""
    available = core.available_devices
    names = {name.split(".")[0] for name in available} | set(available)
    spelled = device.upper() if isinstance(device, str) else None
    if spelled is None or spelled.split(":")[0] not in names | {"AUTO", "HETERO", "MULTI"}:
        raise CrushError(f"device must be one of {', '.join(sorted(names))}, got {device!r}")
    return spelled


def check_properties(core: ov.Core, device: str, properties: dict[str, Any]) -> None:
    """Raise CrushError, with the plugin's reason or the nearest name, if `device` does not take `properties`.

    The plugin lists fewer properties than it takes, so it is asked: by compiling a model of one operation.
    """
    try:
        core.compile_model(one_operation(), device, properties)
    except (RuntimeError, TypeError, ValueError) as error:
        known = {*core.get_property(device, "SUPPORTED_PROPERTIES"), *_PIPELINE_OPTIONS}
        likely = "".join(did_you_mean(name, known) for name in properties if name not in known)
        raise CrushError(
            f"options must be the pipeline's or properties of {device}, got {properties}: {reason_of(error)}{likely}"
        ) from None


def load_model(
    models_path: str | Path | ModelText,
    device: str,
    properties: dict[str, Any],
    attention: str = "paged",
    shared_layers: SharedLayers = (),
    weights: str = "plugin",
    adapters: ModelAdapters = NONE_LOADED,
) -> LoadedModel:
    """Read, rewrite and compile a model: of a folder, or given as text. `properties` go to `compile_model`.

    attention: "paged", or "crush" for CrushAttention over a store, beside PagedAttention if that must read the prompts.
    shared_layers: as in CacheConfig, with "crush" only.
    weights: as in CacheConfig; "packed" with "crush" only.
    Raises ModelError if the folder or the model in it cannot be used, CrushError for a wrong device, property or
    layer.
    """
    if shared_layers and attention != "crush":
        raise CrushError(f"shared_layers must be left out with attention={attention!r}, got {dict(shared_layers)}")
    source: ModelSource = models_path if isinstance(models_path, ModelText) else Path(models_path)
    if not isinstance(source, ModelText):
        check_model_folder(source, tokenizer=False)
    if attention == "crush":
        properties = {name: value for name, value in properties.items() if name not in _OF_MODEL_CACHE}
    core = open_core()
    device = check_device(core, device)
    check_properties(core, device, properties)
    info, config = read_facts(source)
    reason = attention_reason(config, "the model")
    terms = score_terms(config)
    if terms.soft_cap and attention != "crush":
        reason = (
            f"it caps its attention scores (attn_logit_softcapping={terms.soft_cap}), which OpenVINO's attention "
            "leaves out: its answers would be wrong with cache_config attention='paged'"
        )
    if reason:
        raise ModelError(f"model in {str(source)!r} must be one that the engine can run, but {reason}")
    model = read_graph(core, source)
    _check_is_llm(model, source)
    use_paged_attention(model)
    restore_mask(model, terms)
    layers: tuple[AttentionLayer, ...] = ()
    precision, pages_prompts = "f32", True
    if attention == "crush":
        layers = tuple(read_layer(op, terms.soft_cap) for op in attention_ops(model))
        check_shared_layers(shared_layers, layers)
        share_layers(model, shared_layers)
        readers = {i for i, _ in shared_layers}
        layers = tuple(layer for i, layer in enumerate(layers) if i not in readers)
        library = native.info()["path"]
        core.add_extension(library)
        precision = plugin_precisions(properties).inference
        pages_prompts = not native.can_prefill([layer.shape for layer in layers], precision)
        use_crush_attention(model, library, pages_prompts=pages_prompts, shared_layers=shared_layers)
        # Staging blocks hold prompts as they were computed: quantising is the store's.
        properties = {**properties, "KV_CACHE_PRECISION": precision}
    gather_sampled_rows(model)
    use_adapters(model, adapters.adapters)
    limit = _most_packed_bytes(weights, attention, properties)
    products = use_few_row_products(model, native.info()["path"], limit) if limit else ()
    vocab_size = model.output("logits").partial_shape[-1].get_length()
    compiled = core.compile_model(model, device, properties)
    context_length = info.context_length if info else None
    folder = None if isinstance(source, ModelText) else source
    text = source if isinstance(source, ModelText) else None
    return LoadedModel(
        compiled, vocab_size, context_length, attention, layers, precision, pages_prompts, shared_layers, folder,
        products, adapters, text,
    )  # fmt: skip


def _most_packed_bytes(weights: str, attention: str, properties: dict[str, Any]) -> int:
    """Bytes that weights packed a second time may take; 0 = none shall be."""
    if weights == "plugin" or attention != "crush":
        return 0
    if weights == "packed":
        return sys.maxsize
    # Products of our own quantise their inputs: not where the plugin is told not to.
    pays = native.info()["isa"] != "scalar" and quantises_inputs(properties)
    return free_memory_bytes() // 4 if pays else 0


def _check_is_llm(model: ov.Model, source: ModelSource) -> None:
    inputs = {name for port in model.inputs for name in port.names}
    outputs = {name for port in model.outputs for name in port.names}
    if "input_ids" not in inputs or "logits" not in outputs:
        raise ModelError(
            f"model in {str(source)!r} must be an LLM with input 'input_ids' and output 'logits', "
            f"got inputs {sorted(inputs)} and outputs {sorted(outputs)}"
        )
    if not model.get_sinks():
        raise ModelError(
            f"model in {str(source)!r} must be stateful (exported for text-generation-with-past), got one without state"
        )
