"""What can be refused before anything heavy starts: the source, the target, the disk, the installation."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_export.options import BYTES_PER_WEIGHT, WeightOptions
from ov_kvcrush.errors import ExportError, ModelError
from ov_kvcrush.model.gguf.reader import read_gguf_header
from ov_kvcrush.model.gguf.requantize import requantized_bytes
from ov_kvcrush.model.info import ModelInfo, read_json_object
from ov_kvcrush.model.support import unsupported_reason

EXPORT_PACKAGES = ("torch", "transformers", "optimum.intel", "nncf", "accelerate", "gguf")
INSTALL_HINT = 'pip install "ov-kvcrush[export]"'
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json", "spiece.model")
# A little for the graph, the tokenizers and the file system.
DISK_MARGIN_BYTES = 64 << 20


@dataclass(frozen=True)
class Source:
    """A checked source. files: what the hash covers, in order. num_weights: scalars in the weight files."""

    path: Path
    name: str
    is_gguf: bool
    files: tuple[Path, ...]
    num_weights: int


def check_export_installed() -> None:
    """Raise ExportError naming the extra unless every package of it can be found (none is imported)."""
    missing = []
    for name in EXPORT_PACKAGES:
        try:
            found = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            missing.append(name)
    if missing:
        raise ExportError(f"export needs more packages, got none of {', '.join(missing)}: {INSTALL_HINT}")


def check_target(out: Path, overwrite: bool) -> None:
    """Raise ExportError unless `out` can become a model folder."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ExportError(f"OUT must be a folder, got {out}, which is a file or a link")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ExportError(f"OUT must be empty or absent, got {out}: choose another, or --overwrite to exchange it")
    if overwrite and out.is_dir() and any(out.iterdir()) and not (out / "openvino_model.xml").is_file():
        raise ExportError(f"OUT must be a model folder to be overwritten, got {out}, which holds something else")
    parent = _existing_parent(out)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ExportError(f"OUT must be in a folder that can be written to, got {out}")


def check_disk(source: Source, options: WeightOptions | None, out: Path, with_scores: bool = False) -> None:
    """Raise ExportError, with both numbers, if the disk of `out` has too little room for the export."""
    needed = needed_bytes(source, options, with_scores)
    free = shutil.disk_usage(_existing_parent(out)).free
    if free < needed:
        raise ExportError(
            f"OUT must be on a disk with about {needed / 1e9:.2f} GB free for this export, got {free / 1e9:.2f} GB: "
            "free some room or choose a smaller weight format"
        )


def needed_bytes(source: Source, options: WeightOptions | None, with_scores: bool = False) -> int:
    """Estimate the bytes an export writes. Compressed formats are made from an uncompressed model beside them.

    with_scores: for a while the weights are there twice, when those are in their final format.
    """
    rewritten = 0
    if options is None:  # a GGUF that keeps its own weights, or the nearest that OpenVINO keeps
        rewritten = sum(requantized_bytes(read_gguf_header(file)) for file in source.files)
        size: float = rewritten or sum(file.stat().st_size for file in source.files)
    else:
        size = source.num_weights * BYTES_PER_WEIGHT[options.weight_format]
    beside = max(rewritten, size if with_scores else 0)
    if options is not None and options.weight_format in ("int8", "int4"):
        beside = source.num_weights * BYTES_PER_WEIGHT["fp32"]
    return int(size + beside) + DISK_MARGIN_BYTES


def check_gguf(path: Path) -> Source:
    """Check a `.gguf` source; ModelError if it is damaged or truncated."""
    header = read_gguf_header(path)
    num_weights = 0
    for tensor in header.tensors.values():
        count = 1
        for dim in tensor.dims:
            count *= dim
        num_weights += count
    return Source(path, path.name, True, (path,), num_weights)


def check_hf_folder(folder: Path, name: str | None = None, trust_remote_code: bool = False) -> Source:
    """Check a Hugging Face folder; ExportError with the reason if it is no model, incomplete, or cannot be run."""
    config = _config_of(folder)
    reason = unsupported_reason(config, trust_remote_code)
    if reason:
        raise ExportError(f"SOURCE must be a model that the engine can run, got {folder}: {reason}")
    try:
        ModelInfo.from_hf_config(config)
    except ModelError as error:
        raise ExportError(f"SOURCE must have a whole config.json, got {folder}: {error}") from None
    weights = _weight_files(folder)
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ExportError(f"SOURCE must have a tokenizer ({', '.join(TOKENIZER_FILES[:2])}, ...), got {folder} without")
    num_weights = sum(_num_weights(file) for file in weights)
    return Source(folder, name or folder.name, False, (*weights, folder / "config.json"), num_weights)


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        config = read_json_object(folder / "config.json")
    except ModelError as error:
        raise ExportError(f"SOURCE must have a whole config.json, got: {error}") from None
    if config is None:
        hint = ""
        if (folder / "openvino_model.xml").is_file():
            hint = ": it is an OpenVINO model already, and needs no export"
        raise ExportError(f"SOURCE must be a Hugging Face model folder, got {folder} without config.json{hint}")
    return config


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the weight files of the folder, each one checked to be whole."""
    index = read_json_object(folder / "model.safetensors.index.json")
    if index is not None:
        shards = index.get("weight_map")
        names = sorted(set(shards.values())) if isinstance(shards, dict) else []
        missing = [name for name in names if not isinstance(name, str) or not (folder / name).is_file()]
        if missing or not names:
            raise ExportError(f"SOURCE must have all weight files of its index, got {folder} without {missing}")
    files: list[Path] = []
    for pattern in WEIGHT_PATTERNS:
        files = sorted(file for file in folder.glob(pattern) if file.is_file())
        if files:
            break
    if not files:
        raise ExportError(f"SOURCE must have weights ({' or '.join(WEIGHT_PATTERNS)}), got {folder} without")
    return tuple(files)


def _num_weights(file: Path) -> int:
    """Return the scalars in a weight file: exact for safetensors, from the size at two bytes each otherwise."""
    size = file.stat().st_size
    if file.suffix != ".safetensors":
        return size // 2
    with open(file, "rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, 100 << 20):
            raise ExportError(f"{file} must be a whole safetensors file, got {size} bytes, header of {length}")
        try:
            header = json.loads(stream.read(length))
            tensors = [entry for name, entry in header.items() if name != "__metadata__"]
            end = max((entry["data_offsets"][1] for entry in tensors), default=0)
            counts = [_product(entry["shape"]) for entry in tensors]
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise ExportError(f"{file} must have a valid safetensors header, got: {error}") from None
    if size != 8 + length + end:
        raise ExportError(f"{file} must have {8 + length + end} bytes, got {size}: it is truncated or damaged")
    return sum(counts)


def _product(shape: list[int]) -> int:
    count = 1
    for dim in shape:
        count *= int(dim)
    return count


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
