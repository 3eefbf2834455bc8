"""Fetching a model of the Hugging Face hub: first its config alone, so that a refusal costs nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ov_kvcrush.errors import ExportError
from ov_kvcrush.model_info import read_json_object
from ov_kvcrush.model_support import unsupported_reason

PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form owner/name (or name) of a hub model."""
    return _HUB_ID.fullmatch(name) is not None


def fetch(name: str, say: Callable[[str], None]) -> Path:
    """Return the local folder of a hub model, fetching what is not cached; ExportError with the hub's words."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    say(f"fetching {name}")
    try:
        config = read_json_object(Path(hf_hub_download(name, "config.json")))
        reason = unsupported_reason(config or {})
        if reason:
            raise ExportError(f"SOURCE must be a model that the engine can run, got {name}: {reason}")
        folder = Path(snapshot_download(name, allow_patterns=PATTERNS))
        if not list(folder.glob("*.safetensors")):  # only then the older format: many models hold both
            folder = Path(snapshot_download(name, allow_patterns=[*PATTERNS, "pytorch_model*"]))
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        words = str(error).strip().splitlines()
        raise ExportError(
            f"SOURCE must be a folder that exists or a reachable hub model, got {name}: {words[0] if words else error}"
        ) from None
