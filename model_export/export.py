"""Export in order: refuse early, fill a hidden folder, check it, rename it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from importlib import metadata as packages
from pathlib import Path

from model_export.checks import (
    Source,
    check_disk,
    check_export_installed,
    check_gguf,
    check_hf_folder,
    check_target,
)
from model_export.options import WeightOptions
from model_export.scores import check_attention_scores, write_scores_model
from ov_kvcrush.errors import CrushError, ExportError
from ov_kvcrush.model.folder import check_model_folder
from ov_kvcrush.model.gguf.convert import check_convertible, convert_gguf
from ov_kvcrush.model.gguf.reader import read_gguf_header
from ov_kvcrush.model.info import ModelInfo, read_json_object
from ov_kvcrush.utils.atomic import atomic_folder

Progress = Callable[[str], None]
RECORDED_PACKAGES = (
    "openvino",
    "openvino-genai",
    "openvino-tokenizers",
    "optimum-intel",
    "transformers",
    "nncf",
    "torch",
)
DEFAULT_WEIGHT_FORMAT = "int8"


def export_model(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    weight_format: str | None = None,
    *,
    group_size: int | None = None,
    ratio: float | None = None,
    sym: bool | None = None,
    attention_scores: int | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ModelInfo:
    """Export a model to an OpenVINO folder that openvino_genai loads too, with `ov_kvcrush.json`; return its content.

    source: a Hugging Face folder, a hub id ("owner/name"), or a `.gguf` file.
    out: a folder that does not exist or is empty (or a model folder, with `overwrite`); it appears only when complete.
    weight_format: fp32, fp16, int8, int4. None: int8; for a GGUF its own quantisation as it is (needs no torch).
    group_size, ratio, sym: see `WeightOptions`.
    attention_scores: also write `openvino_model_scores.xml`, over the same weights file, with outputs of the attention
        of the last so many query rows (see `ov_kvcrush.model.graph.score_outputs`).
    trust_remote_code: run Python code that comes with the model; only for sources you trust.
    progress: called with the name of each stage when it starts.
    Raises ExportError or ModelError before anything heavy if the source, the options or the target cannot work.
    """
    say = progress or (lambda _: None)
    out = Path(out)
    check_attention_scores(attention_scores)
    is_gguf = str(source).lower().endswith(".gguf")
    options: WeightOptions | None = None
    if weight_format is not None or not is_gguf:
        options = WeightOptions(weight_format or DEFAULT_WEIGHT_FORMAT, group_size, ratio, sym)
    elif (group_size, ratio, sym) != (None, None, None):
        raise ExportError("weight_format must be given with group_size, ratio or sym for a GGUF, got none")
    check_target(out, overwrite)
    say("checking the source")
    if is_gguf and options is None:
        return _convert_gguf(Path(source), out, attention_scores, overwrite, say)
    checked = _gguf_source(Path(source)) if is_gguf else _hf_source(source, say, trust_remote_code)
    check_export_installed()
    assert options is not None
    check_disk(checked, options, out, attention_scores is not None)
    return _export(checked, out, options, attention_scores, trust_remote_code, overwrite, say)


def source_sha256(source: Source) -> str:
    """Return the SHA-256 over the names and contents of the source's weight files and config, in order."""
    digest = hashlib.sha256()
    for path in source.files:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _convert_gguf(source: Path, out: Path, attention_scores: int | None, overwrite: bool, say: Progress) -> ModelInfo:
    checked = _existing_gguf(source)
    check_disk(checked, None, out, attention_scores is not None)

    def finish(folder: Path, info: ModelInfo) -> ModelInfo:
        _add_scores(folder, attention_scores, say)
        return dataclasses.replace(info, attention_scores=attention_scores)

    return convert_gguf(source, out, overwrite=overwrite, stage=say, finish=finish)


def _add_scores(folder: Path, window: int | None, say: Progress) -> None:
    if window is not None:
        say("adding attention scores")
        write_scores_model(folder, window)


def _existing_gguf(source: Path) -> Source:
    if not source.is_file():
        raise ExportError(f"SOURCE must be a file that exists, got {source}")
    return check_gguf(source)


def _gguf_source(source: Path) -> Source:
    checked = _existing_gguf(source)
    # The same limits as without torch: transformers too leaves scaled RoPE out when it reads a GGUF.
    check_convertible(read_gguf_header(source), source)
    return checked


def _hf_source(source: str | os.PathLike[str], say: Progress, trust_remote_code: bool) -> Source:
    path = Path(source)
    if path.is_dir():
        return check_hf_folder(path, trust_remote_code=trust_remote_code)
    if path.exists():
        raise ExportError(f"SOURCE must be a Hugging Face folder, a hub id or a .gguf file, got the file {path}")
    from model_export.hub import fetch, is_hub_id

    if not is_hub_id(str(source)):
        raise ExportError(f"SOURCE must be a folder that exists, a hub id (owner/name) or a .gguf file, got {source}")
    check_export_installed()  # the hub's client comes with it
    return check_hf_folder(fetch(str(source), say, trust_remote_code), str(source), trust_remote_code)


def _export(
    source: Source,
    out: Path,
    options: WeightOptions,
    attention_scores: int | None,
    trust_remote_code: bool,
    overwrite: bool,
    say: Progress,
) -> ModelInfo:
    from model_export import pipeline  # imports torch and optimum

    say("hashing the source")
    digest = source_sha256(source)
    try:
        with atomic_folder(out, replace=overwrite) as partial:
            if source.is_gguf:
                pipeline.export_gguf(source.path, partial, options, say)
            else:
                pipeline.export_folder(source.path, partial, options, trust_remote_code, say)
            _add_scores(partial, attention_scores, say)
            say("checking the result")
            config = read_json_object(partial / "config.json")
            if config is None:
                raise ExportError(f"the export must write config.json, got none from {source.name}")
            info = ModelInfo.from_hf_config(
                config,
                weight_format=options.weight_format,
                versions={name: packages.version(name) for name in RECORDED_PACKAGES},
                source_name=source.name,
                source_sha256=digest,
                attention_scores=attention_scores,
            )
            info.write(partial)
            check_model_folder(partial)
    except FileExistsError:
        raise ExportError(f"OUT must stay empty while the export runs, got {out} filled by something else") from None
    except CrushError:
        raise
    except OSError as error:
        raise ExportError(f"the export of {source.name} must be able to read and write, got: {error}") from error
    return info
