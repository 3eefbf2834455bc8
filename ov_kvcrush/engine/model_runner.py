"""One step on the device: a few small tensors go in, logits come out."""

from __future__ import annotations

import numpy as np
import openvino as ov

from ov_kvcrush.core.step import SchedulerOutput
from ov_kvcrush.kvcache.manager import KVCacheManager
from ov_kvcrush.model.graph.rewrite import ATTENTION_SCORES
from ov_kvcrush.model.load import LoadedModel


class ModelRunner:
    """The inference request of a compiled model, bound to its cache tensors."""

    def __init__(self, model: LoadedModel, cache: KVCacheManager) -> None:
        self._cache = cache
        self._request = model.compiled.create_infer_request()
        cache.bind(self._request)
        self._ports = {name: port for port in model.compiled.inputs for name in port.names}
        self._views: dict[str, np.ndarray] = {}  # of the bound input tensors
        self._logits = model.compiled.output("logits")
        names = [f"{ATTENTION_SCORES}.{layer}" for layer in range(len(model.layers))]
        self._scores = [model.compiled.output(name) for name in names] if model.has_scores else []

    def prepare(self, step: SchedulerOutput) -> None:
        """Set the inputs of the next `infer`."""
        self.set_inputs(self._cache.step_inputs(step.rows))

    def set_inputs(self, inputs: dict[str, np.ndarray]) -> None:
        """The same for inputs that another than the engine's cache manager made."""
        for name, value in inputs.items():
            self._set_input(name, value)

    def _set_input(self, name: str, value: np.ndarray) -> None:
        """Write into the bound tensor where the shape is the same, as in most decode steps; else bind a new one.

        Binding all eight by name takes 94 us on 2 cores, writing into them 8 us.
        """
        view = self._views.get(name)
        if view is not None and view.shape == value.shape:
            view[...] = value
        elif name in self._ports:  # a model without position embeddings has no position_ids
            tensor = ov.Tensor(value)
            self._request.set_tensor(self._ports[name], tensor)
            self._views[name] = tensor.data

    def infer(self) -> np.ndarray:
        """Run the step. Returns logits float32 (rows that sample, vocabulary), a view until the next `infer`."""
        self._request.infer()
        logits = self._request.get_tensor(self._logits).data
        return logits.reshape(-1, logits.shape[-1])

    def attention_scores(self) -> list[np.ndarray]:
        """The flat scores of each layer, float32, views until the next `infer`; see native/src/op/crush_scores.hpp."""
        return [self._request.get_tensor(port).data for port in self._scores]
