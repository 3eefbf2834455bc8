"""Model folders that are made of GGUF files, once, in the user's cache."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from importlib import metadata as packages
from pathlib import Path

from ov_kvcrush.errors import ModelError
from ov_kvcrush.model.folder import check_model_folder
from ov_kvcrush.model.gguf.convert import convert_gguf
from ov_kvcrush.model.info import ModelInfo

CONVERSION = 2  # raised when convert_gguf starts to write something else
CACHE_VARIABLE = "OV_KVCRUSH_CACHE"

Say = Callable[[str], None]


def cache_folder() -> Path:
    """Return the cache of this package: $OV_KVCRUSH_CACHE, else the user's cache directory."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("ov_kvcrush"))


def converted_folder(name: str, source: str) -> Path:
    """Where a model made of `source` is or will be; the path changes with the source and with what converts it."""
    key = f"{source} {packages.version('openvino-genai')} {CONVERSION}"
    return cache_folder() / "models" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def folder_of_gguf(gguf: Path, say: Say | None = None) -> Path:
    """The model folder of a GGUF file, which is converted the first time, and again when the file has changed.

    say: told what happens; printed to standard error when None. Raises ModelError as `convert_gguf` does.
    """
    try:
        state = gguf.stat()
    except OSError as error:
        raise ModelError(f"model must be a file that can be read, got {gguf}: {error.strerror}") from None
    folder = converted_folder(gguf.stem, f"{gguf.resolve()} {state.st_size} {state.st_mtime_ns}")
    if not is_ready(folder):
        (say or tell)(f"Converting {gguf.name} for OpenVINO, once, into {folder}")
        convert_once(gguf, folder, gguf.name)
    return folder


def convert_once(gguf: Path, folder: Path, source_name: str) -> None:
    """Convert a GGUF file into a folder that may be damaged, or be made by another process in the meantime."""
    try:
        convert_gguf(gguf, folder, overwrite=folder.exists(), source_name=source_name)
    except ModelError:
        if not is_ready(folder):
            raise


def is_ready(folder: Path) -> bool:
    """A folder appears only when complete; this also catches one that was damaged afterwards."""
    try:
        check_model_folder(folder)
        return ModelInfo.read(folder) is not None
    except ModelError:
        return False


def tell(message: str) -> None:
    """Print a message to standard error."""
    print(message, file=sys.stderr, flush=True)
