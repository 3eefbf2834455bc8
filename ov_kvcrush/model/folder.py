"""Checks that a folder is a complete OpenVINO language model, before anything slow starts."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ov_kvcrush.errors import ModelError

IR_NAME = "openvino_model"
SCORES_NAME = "openvino_model_scores"  # an .xml only: its constants are in the model's .bin
TOKENIZER_NAMES = ("openvino_tokenizer", "openvino_detokenizer")
_CONSTANT = re.compile(rb'offset="(\d+)"[^>]*?\bsize="(\d+)"')


def check_model_folder(folder: str | os.PathLike[str], tokenizer: bool = True) -> None:
    """Raise ModelError, naming what is missing or too short, unless `folder` holds a whole model.

    tokenizer: whether tokenizer and detokenizer must be there too.

    Reads the XML files, never the weights: each `.bin` must cover the constants that its `.xml` points to. So must the
    model's for the XML with attention scores, where there is one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "is not there"
        fix = f"; convert it with: ov_kvcrush-export {folder} OUT" if folder.suffix == ".gguf" else ""
        raise ModelError(f"model must be a folder, got {folder}, which {what}{fix}")
    for name in (IR_NAME, *TOKENIZER_NAMES) if tokenizer else (IR_NAME,):
        missing = [f"{name}{end}" for end in (".xml", ".bin") if not (folder / f"{name}{end}").is_file()]
        if missing:
            encoder = (folder / "openvino_encoder_model.xml").exists()
            kind = " (an encoder-decoder model, which cannot be run)" if encoder else ""
            raise ModelError(
                f"model must be an OpenVINO model folder, got {folder} without {' and '.join(missing)}{kind}: "
                "make one with ov_kvcrush-export"
            )
        _check_files(folder / f"{name}.xml", folder / f"{name}.bin")
    scores = folder / f"{SCORES_NAME}.xml"
    if scores.exists():
        _check_files(scores, folder / f"{IR_NAME}.bin")


def _check_files(xml: Path, weights: Path) -> None:
    check_ir(xml.read_bytes(), weights.stat().st_size, str(xml), str(weights))


def check_ir(text: bytes, num_bytes: int, xml: str, weights: str) -> None:
    """Raise ModelError for a text of an IR that stops early, or for fewer bytes of weights than it points to.

    xml, weights: what errors call them.
    """
    if not text.rstrip().endswith(b"</net>"):
        raise ModelError(f"{xml} must be a complete OpenVINO model, got one that stops early ({len(text)} bytes)")
    needed = max((int(offset) + int(size) for offset, size in _CONSTANT.findall(text)), default=0)
    if num_bytes < needed:
        raise ModelError(f"{weights} must have at least {needed} bytes, got {num_bytes}: truncated")
