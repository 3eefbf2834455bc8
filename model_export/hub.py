"""Fetching a model of the Hugging Face hub: first its config alone, so that a refusal costs nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ov_kvcrush.errors import ExportError
from ov_kvcrush.model.info import read_json_object
from ov_kvcrush.model.support import unsupported_reason

PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form owner/name (or name) of a hub model."""
    return _HUB_ID.fullmatch(name) is not None


def fetch(name: str, say: Callable[[str], None], trust_remote_code: bool = False) -> Path:
    """Return the local folder of a hub model, fetching what is not cached; ExportError with the hub's words."""
    say(f"fetching {name}")
    config = read_json_object(_ask(name, _fetch_config))
    reason = unsupported_reason(config or {}, trust_remote_code)
    if reason:
        raise ExportError(f"SOURCE must be a model that the engine can run, got {name}: {reason}")
    return _ask(name, _fetch_all)


def _fetch_config(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, "config.json"))


def _fetch_all(name: str) -> Path:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, allow_patterns=PATTERNS))
    if not list(folder.glob("*.safetensors")):  # only then the older format: many models hold both
        folder = Path(snapshot_download(name, allow_patterns=[*PATTERNS, "pytorch_model*"]))
    return folder


def _ask(name: str, question: Callable[[str], Path]) -> Path:
    try:
        return question(name)
    except Exception as error:  # the hub's client lets errors of the layers below through as they are
        words = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(
            f"SOURCE must be a folder that exists or a reachable hub model, got {name}: {words} "
            "(is its name right, is there a connection? HF_HUB_OFFLINE=1 uses what was fetched before)"
        ) from error
