"""Where a model comes from: a folder, or the text of its IR with its weights in memory. openvino_genai takes both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import openvino as ov

from ov_kvcrush.errors import CrushError, ModelError, reason_of
from ov_kvcrush.model.folder import IR_NAME, check_ir
from ov_kvcrush.model.info import ModelInfo, read_json_object, read_model_info

MODEL_XML = f"{IR_NAME}.xml"


@dataclass(frozen=True, eq=False)
class ModelText:
    """A model that lies in no folder, such as one that was decrypted. weights: the content of its .bin file.

    It must be kept as long as what was read from it: constants of the graph are these very bytes.
    Raises CrushError for other types, ModelError for a text or weights that stop early.
    """

    xml: str
    weights: ov.Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.xml, str):
            raise CrushError(f"model must be the text of an IR before its weights, got {type(self.xml).__name__}")
        if not isinstance(self.weights, ov.Tensor):
            raise CrushError(
                f"weights must be an openvino.Tensor of the .bin file's bytes, got {type(self.weights).__name__}"
            )
        check_ir(self.xml.encode(), self.weights.get_byte_size(), "the model's text", "weights")

    def __str__(self) -> str:
        return "a model given as text"

    @property
    def content(self) -> np.ndarray:
        """uint8 (bytes,): the weights, a view."""
        data: np.ndarray = self.weights.data
        return data.reshape(-1).view(np.uint8)


ModelSource: TypeAlias = Path | ModelText


def read_facts(source: ModelSource) -> tuple[ModelInfo | None, dict[str, Any]]:
    """What the files beside a graph say of it, and its parsed `config.json`: nothing for a text. Raises ModelError."""
    if isinstance(source, ModelText):
        return None, {}
    return read_model_info(source), read_json_object(source / "config.json") or {}


def read_graph(core: ov.Core, source: ModelSource) -> ov.Model:
    """The graph itself. Raises ModelError for what OpenVINO cannot read."""
    try:
        if isinstance(source, ModelText):
            return core.read_model(source.xml, source.weights)
        return core.read_model(source / MODEL_XML)
    except RuntimeError as error:
        name = source if isinstance(source, ModelText) else source / MODEL_XML
        raise ModelError(f"{name} must be a readable OpenVINO model, got: {reason_of(error)}") from None
