"""Hashes of model, tokenizer and token ids: a saved context is loaded only where they agree."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ov_kvcrush.errors import ModelError
from ov_kvcrush.model.folder import IR_NAME, TOKENIZER_NAMES
from ov_kvcrush.model.source import ModelText

FINGERPRINT_FIELDS = (
    "layout_version",
    "model",
    "tokenizer",
    "key_precision",
    "value_precision",
    "recent_precision",
    "recent_tokens",
    "group_size",
    "shared_layers",
    "adapters",
    "policy",
    "token_ids",
)
NOT_SHARED = "none"  # shared_layers of a model whose layers all have keys and values; files from before have no field
NO_ADAPTER = "none"  # adapters of a text that was read without; files from before have no field
_NUM_SAMPLES = 64
_SAMPLE_BYTES = 16 << 10
_GGUF_METADATA_BYTES = 8 << 20  # a vocabulary of 150 000 tokens with its merges takes about 6 MiB
_TOKENIZER = TOKENIZER_NAMES[0]
# The chat template is in one of these, or in the tokenizer itself.
_TEMPLATES = ("tokenizer_config.json", "chat_template.json", "chat_template.jinja")


def token_ids_fingerprint(ids: npt.NDArray[Any]) -> str:
    """SHA-256 of token ids (S,), whatever their integer type."""
    return hashlib.sha256(np.ascontiguousarray(ids, "<i8").tobytes()).hexdigest()


def model_fingerprint(model: str | os.PathLike[str] | ModelText) -> str:
    """SHA-256 of what tells one model from another, found in milliseconds.

    It is of openvino_model.xml, config.json, the size of openvino_model.bin and 64 pieces of it of 16 KiB, evenly
    spaced from its first byte to its last. Other shapes, another precision and weights that were trained further all
    differ in that; a change of a few weights that lie between the pieces is not seen. Of a GGUF file: its size and such
    pieces. Of a model given as text: the text, and its weights in the same way.
    Raises ModelError naming a file that cannot be read.
    """
    if isinstance(model, ModelText):
        return _text_fingerprint(model)
    path = Path(model)
    digest = hashlib.sha256(b"model")
    if path.is_file():
        _add(digest, path, sampled=True)
    else:
        _add(digest, path / f"{IR_NAME}.xml")
        _add(digest, path / "config.json")
        _add(digest, path / f"{IR_NAME}.bin", sampled=True)
    return digest.hexdigest()


def tokenizer_fingerprint(model: str | os.PathLike[str]) -> str:
    """SHA-256 of what makes tokens of texts and chats: the tokenizer, whole, and the files with chat templates.

    A GGUF file holds its tokenizer in its metadata: its size, pieces of it as of a model, and its first 8 MiB.
    Raises ModelError naming a file that cannot be read.
    """
    path = Path(model)
    digest = hashlib.sha256(b"tokenizer")
    if path.is_file():
        _add(digest, path, sampled=True)
        _add(digest, path, limit=_GGUF_METADATA_BYTES)
        return digest.hexdigest()
    for name in (f"{_TOKENIZER}.xml", f"{_TOKENIZER}.bin"):
        _add(digest, path / name)
    for template in (path / name for name in _TEMPLATES):
        if template.is_file():
            _add(digest, template)
    return digest.hexdigest()


def _text_fingerprint(model: ModelText) -> str:
    text, weights = model.xml.encode(), model.content
    digest = hashlib.sha256(f"model:{len(text)}:".encode() + text + f":{len(weights)}:".encode())
    for begin in _sampled_offsets(len(weights)):
        digest.update(weights[begin : begin + _SAMPLE_BYTES].tobytes())
    return digest.hexdigest()


def _sampled_offsets(size: int) -> list[int]:
    """Where the pieces of so many bytes begin: all of them follow each other where there are no more than pieces."""
    if size <= _NUM_SAMPLES * _SAMPLE_BYTES:
        return list(range(0, size, _SAMPLE_BYTES))
    return [i * (size - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1) for i in range(_NUM_SAMPLES)]


def _add(digest: Any, path: Path, *, sampled: bool = False, limit: int | None = None) -> None:
    """Add name, size and content of a file: all, pieces, or its first `limit` bytes."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            # The name of a file that may have any is not part of what it is.
            digest.update(f"{'' if sampled or limit else path.name}:{size}:".encode())
            if not sampled or size <= _NUM_SAMPLES * _SAMPLE_BYTES:
                digest.update(file.read() if limit is None else file.read(limit))
                return
            for begin in _sampled_offsets(size):
                file.seek(begin)
                digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise ModelError(f"model must have the file {path.name}, got {path}: {error.strerror or error}") from error
