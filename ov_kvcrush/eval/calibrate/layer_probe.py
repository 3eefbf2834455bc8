"""What a model computes inside, as it is and with layers that read the keys and values of others.

On the model as it was exported, with OpenVINO's own attention: texts are short and read at once, so no cache is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from ov_kvcrush.errors import ModelError, reason_of
from ov_kvcrush.model.folder import check_model_folder
from ov_kvcrush.model.graph.attention import AttentionLayer, attention_ops, read_layer
from ov_kvcrush.model.graph.rewrite import lm_head, use_paged_attention
from ov_kvcrush.model.plugin import open_core
from ov_kvcrush.model.source import MODEL_XML

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
_KEYS_VALUES = 1, 2  # inputs of ScaledDotProductAttention
_NEW = 1  # input of the Concat that puts the step's keys or values behind those of the state


class LayerProbe:
    """Reads texts with the model in a folder. ids: int64 (B, S), texts of the same length.

    layers: the attention layers, first layer first. properties: go to `compile_model`.
    Raises ModelError if the folder or the model in it cannot be used.
    """

    def __init__(self, folder: Path, ids: np.ndarray, properties: Mapping[str, Any] = EXACT) -> None:
        check_model_folder(folder, tokenizer=False)
        self._path = folder / MODEL_XML
        self._ids = ids
        self._properties = dict(properties)
        self._core = open_core()
        model = self._read()
        use_paged_attention(model)
        self.layers: tuple[AttentionLayer, ...] = tuple(read_layer(op) for op in attention_ops(model))

    def averages(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Keys, with their rotary positions, and values of each layer, averaged over texts: float32 (K, S, D)."""
        found = self._run(lambda model: [x.input_value(_NEW) for x in (*_states(model, 0), *_states(model, 1))])
        means = [x.mean(axis=0, dtype=np.float32) for x in found]
        return means[: len(self.layers)], means[len(self.layers) :]

    def values_and_outputs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each layer the tokens' values, float32 (B, K, S, D), and what its heads make of them, (B, H, S, D)."""

        def outputs(model: ov.Model) -> list[ov.Output]:
            values = [x.input_value(_NEW) for x in _states(model, 1)]
            return values + [op.output(0) for op in _attentions(model)]

        found = self._run(outputs)
        return list(zip(found[: len(self.layers)], found[len(self.layers) :], strict=True))

    def hidden(self, shared: Mapping[int, int]) -> np.ndarray:
        """Hidden states before the LM head, float32 (B, S, C); layer i attends to what layer shared[i] computes."""

        def hidden_states(model: ov.Model) -> list[ov.Output]:
            for states in (_states(model, 0), _states(model, 1)):
                for i, j in shared.items():
                    states[i].input(_NEW).replace_source_output(states[j].input_value(_NEW))
            return [lm_head(model).input_value(0)]

        return self._run(hidden_states)[0]

    def _run(self, change: Callable[[ov.Model], list[ov.Output]]) -> list[np.ndarray]:
        """The values that `change` names, of all texts in one inference. Logits are not computed."""
        model = self._read()
        (logits,) = model.get_results()
        outputs = change(model)
        model.add_outputs(outputs)
        model.remove_result(logits)
        model.validate_nodes_and_infer_types()
        request = self._core.compile_model(model, "CPU", self._properties).create_infer_request()
        size, length = self._ids.shape
        values = {
            "input_ids": self._ids,
            "attention_mask": np.ones((size, length), np.int64),
            "position_ids": np.tile(np.arange(length, dtype=np.int64), (size, 1)),
            "beam_idx": np.arange(size, dtype=np.int32),
        }
        inputs = {name for port in model.inputs for name in port.names}
        request.infer({name: value for name, value in values.items() if name in inputs})
        return [request.get_output_tensor(i).data.astype(np.float32) for i in range(len(outputs))]

    def _read(self) -> ov.Model:
        try:
            return self._core.read_model(self._path)
        except RuntimeError as error:
            raise ModelError(f"{self._path} must be a readable OpenVINO model, got: {reason_of(error)}") from None


def _states(model: ov.Model, kind: int) -> list[ov.Node]:
    """Of each layer the operation that joins keys (kind 0) or values (1) with those of its state.

    Texts begin with empty states, so what is new is all. It is read and changed here, before the state: the plugin
    (openvino 2026.4) knows stateful attention by its form, and an output behind the state of SmolLM2 made it fail.
    """
    stored = {sink.input_value(0).get_node().get_friendly_name() for sink in model.get_sinks()}
    return [_nearest(op.input_value(_KEYS_VALUES[kind]).get_node(), stored) for op in _attentions(model)]


def _attentions(model: ov.Model) -> list[ov.Node]:
    return [op for op in model.get_ordered_ops() if op.get_type_name() == "ScaledDotProductAttention"]


def _nearest(node: ov.Node, names: set[str]) -> ov.Node:
    """The first Concat of `names` on the way back from `node`. Raises ModelError if there is none."""
    waiting, seen = [node], set()
    for node in waiting:
        if node.get_friendly_name() in names and node.get_type_name() == "Concat":
            return node
        seen.add(node.get_friendly_name())
        waiting += [x for x in (value.get_node() for value in node.input_values()) if x.get_friendly_name() not in seen]
    raise ModelError("model must keep its keys and values in states that it appends to, got none behind an attention")
