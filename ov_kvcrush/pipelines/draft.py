"""`draft_model`: the model that guesses for another one, as openvino_genai has it, and what it must have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openvino_genai as ov_genai

from ov_kvcrush.errors import CrushError


@dataclass(frozen=True)
class DraftSource:
    """models_path: folder of an exported model. device: "" = that of the model that checks. properties: OpenVINO's."""

    models_path: Path
    device: str = ""
    properties: Mapping[str, Any] = field(default_factory=dict)


def draft_model(models_path: str | Path, device: str = "", **properties: Any) -> DraftSource:
    """The model that guesses tokens: `LLMPipeline(path, draft_model=draft_model(smaller_path))`."""
    return DraftSource(Path(models_path), device, properties)


def as_stock(draft: Any) -> Any:
    """The same for openvino_genai, whose own objects stay as they are."""
    if not isinstance(draft, DraftSource):
        return draft
    return ov_genai.draft_model(str(draft.models_path), draft.device, **draft.properties)


def check_draft(draft: Any) -> DraftSource:
    """Raise CrushError for what is no draft model, openvino_genai's own objects among it: they cannot be read."""
    if not isinstance(draft, DraftSource):
        raise CrushError(f"draft_model must be made by ov_kvcrush.draft_model(), got {type(draft).__name__}")
    if draft.device.upper() not in ("", "CPU"):
        raise CrushError(f"device of draft_model must be CPU with engine='crush', got {draft.device!r}")
    return draft


def check_vocabulary(draft: ov_genai.Tokenizer, target: ov_genai.Tokenizer, folder: Path) -> None:
    """Raise CrushError where the two have different tokens: ids of the one mean something else to the other."""
    own, wanted = draft.get_vocab(), target.get_vocab()
    if own == wanted:
        return
    differing = sorted(set(own.items()) ^ set(wanted.items()), key=lambda item: (item[1], str(item[0])))
    token, index = differing[0]
    raise CrushError(
        f"draft_model must have the vocabulary of the model, got {str(folder)!r} with {len(own)} tokens instead of "
        f"{len(wanted)}; the first that differs is {token!r} at {index}"
    )
