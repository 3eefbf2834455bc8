"""GGUF file to OpenVINO model folder through openvino_genai's own converter; needs no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import metadata as packages
from pathlib import Path
from typing import Any

from ov_kvcrush.errors import ModelError
from ov_kvcrush.model.folder import check_model_folder
from ov_kvcrush.model.gguf.detokenizer import show_user_defined_tokens
from ov_kvcrush.model.gguf.reader import GgufHeader, read_gguf_header
from ov_kvcrush.model.gguf.requantize import TARGETS, requantize, requantized_bytes
from ov_kvcrush.model.gguf.zero_points import restore_zero_points
from ov_kvcrush.model.info import ModelInfo
from ov_kvcrush.utils.atomic import atomic_folder

# What openvino_genai's converter builds correctly (it ignores what it does not know rather than refusing it).
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
MATRIX_TYPES = ("F16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K")
PRE_TOKENIZERS = ("qwen2", "smollm", "llama-bpe")
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")  # of a text, of a turn, of a message that calls a tool
TOKEN_ID_KEYS = ("bos_token_id", *END_KEYS, "padding_token_id", "unknown_token_id")

# Runs in a process of its own: the converter trusts what it reads, and a crash there must not take the caller along.
_CONVERT = """
import sys
import openvino_genai
path, tokenizer_only = sys.argv[1], sys.argv[2] == "tokenizer"
if tokenizer_only:
    openvino_genai.Tokenizer(path, enable_save_ov_model=True)
else:
    openvino_genai.LLMPipeline(path, "CPU", enable_save_ov_model=True)
"""


def convert_gguf(
    gguf: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    source_name: str | None = None,
    stage: Callable[[str], None] | None = None,
    finish: Callable[[Path, ModelInfo], ModelInfo] | None = None,
) -> ModelInfo:
    """Convert a GGUF file into a model folder, keeping its own weight quantisation, and return what the folder holds.

    out: must not exist or be empty, unless `overwrite`; it appears only when complete. stage: told what is being done.
    finish: may add to the folder before it appears, and returns what the folder then holds.
    Raises ModelError if the file is damaged or truncated (before any conversion), if openvino_genai's converter has
    no support for what it holds, or if the conversion fails.
    """
    gguf, out = Path(gguf), Path(out)
    say = stage or (lambda _: None)
    say("checking the GGUF file")
    header = read_gguf_header(gguf)
    check_convertible(header, gguf)
    info = gguf_model_info(header)
    say("hashing the GGUF file")
    info = _with_origin(info, header, source_name or gguf.name, sha256_of_file(gguf))
    try:
        with atomic_folder(out, replace=overwrite) as partial:
            known, known_header = gguf, header
            if requantized_bytes(header):
                say("rewriting weights in types that OpenVINO keeps")
                known = partial / "known.gguf"
                known_header = requantize(header, gguf, known)
            say("building the OpenVINO model")
            run_genai_converter(known, partial)
            say("restoring exact zero points")
            restore_zero_points(known_header, known, partial)
            if known != gguf:
                known.unlink()
            show_user_defined_tokens(header, partial)
            say("writing the folder")
            _write_configs(header, info, partial)
            if finish is not None:
                info = finish(partial, info)
            info.write(partial)
            check_model_folder(partial)
    except FileExistsError:
        raise ModelError(f"out must be a folder that does not exist or is empty, got {out}") from None
    return info


def run_genai_converter(gguf: Path, folder: Path, tokenizer_only: bool = False) -> None:
    """Let openvino_genai write its IR files of `gguf` into `folder`; ModelError with its words if it fails."""
    # It writes beside the file it is given, hence the link; a copy where links are not allowed.
    link = folder / "source.gguf"
    try:
        os.symlink(gguf.absolute(), link)
    except OSError:
        shutil.copyfile(gguf, link)
    try:
        command = [sys.executable, "-c", _CONVERT, str(link), "tokenizer" if tokenizer_only else "model"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    finally:
        link.unlink()
    if done.returncode:
        words = done.stderr.strip().splitlines()[-3:] or [f"it ended with code {done.returncode}"]
        raise ModelError(f"{gguf} must be a GGUF that openvino_genai can convert, got: {' '.join(words)}")


def check_convertible(header: GgufHeader, path: Path) -> None:
    """Raise ModelError with the reason if openvino_genai's converter would refuse the model or build a wrong one."""
    reason = _unsupported(header.metadata, header) or unsupported_tokenizer(header.metadata)
    if reason:
        raise ModelError(
            f"{path}: {reason}. Export the original Hugging Face model instead (ov_kvcrush-export FOLDER OUT)"
        )


def _unsupported(meta: Mapping[str, Any], header: GgufHeader) -> str | None:
    arch = meta.get("general.architecture")
    if arch not in ARCHITECTURES:
        return f"general.architecture must be one of {', '.join(ARCHITECTURES)} to be converted, got {arch!r}"
    if meta.get("split.count", 1) not in (0, 1):
        return f"split.count must be 1, got {meta['split.count']!r}: merge the parts with llama-gguf-split first"
    if meta.get(f"{arch}.expert_count", 0):
        return f"{arch}.expert_count must be 0, got {meta[f'{arch}.expert_count']!r}: no mixture of experts from GGUF"
    scaling = meta.get(f"{arch}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in header.tensors:
        return "RoPE must be unscaled, got scaled frequencies, which openvino_genai's GGUF converter leaves out"
    for tensor in header.tensors.values():
        wanted = ("F32",) if len(tensor.dims) == 1 else (*MATRIX_TYPES, *TARGETS)
        if tensor.type_name not in wanted:
            return f"tensor {tensor.name!r} must be of type {', '.join(wanted)}, got {tensor.type_name}"
    size, rotary = _key_length(meta, str(arch)), meta.get(f"{arch}.rope.dimension_count")
    if rotary not in (None, size):
        return f"{arch}.rope.dimension_count must equal the head size {size}, got {rotary!r}"
    return None


def unsupported_tokenizer(meta: Mapping[str, Any]) -> str | None:
    """Return why openvino_genai cannot build this GGUF's tokenizer correctly, or None if it can."""
    model, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if model != "gpt2":
        return f"tokenizer.ggml.model must be 'gpt2' (byte-level BPE), got {model!r}"
    if pre not in PRE_TOKENIZERS:
        return f"tokenizer.ggml.pre must be one of {', '.join(PRE_TOKENIZERS)}, got {pre!r}"
    tokens, kinds = meta.get("tokenizer.ggml.tokens"), meta.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        return "tokenizer.ggml.tokens must be a list of strings, got something else"
    if not isinstance(kinds, list) or len(kinds) != len(tokens) or not isinstance(kinds[0], int):
        return f"tokenizer.ggml.token_type must be a list of {len(tokens)} whole numbers, got something else"
    if not isinstance(meta.get("tokenizer.ggml.merges"), list):
        return "tokenizer.ggml.merges must be a list of strings, got something else"
    for key in TOKEN_ID_KEYS:
        value = meta.get(f"tokenizer.ggml.{key}", 0)
        if not isinstance(value, int) or not 0 <= value < len(tokens):
            return f"tokenizer.ggml.{key} must be a token id below {len(tokens)}, got {value!r}"
    return None


def gguf_model_info(header: GgufHeader) -> ModelInfo:
    """Derive the model's shape from GGUF metadata; ModelError that names the key which is missing or broken."""
    return ModelInfo.from_hf_config(gguf_hf_config(header), weight_format=_weight_format(header))


def gguf_hf_config(header: GgufHeader) -> dict[str, Any]:
    """Return the metadata of a GGUF in the words of a Hugging Face `config.json`."""
    meta = header.metadata
    arch = meta.get("general.architecture")
    if not isinstance(arch, str):
        raise ModelError(f"general.architecture must be a string, got {arch!r}")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.dims) != 2:
        raise ModelError("token_embd.weight must be a matrix in the GGUF, got none: is this a language model?")
    num_layers, num_tensors = meta.get(f"{arch}.block_count"), len(header.tensors)
    if isinstance(num_layers, int) and num_layers > num_tensors:  # what is known of each layer would fill the memory
        raise ModelError(f"{arch}.block_count must be at most {num_tensors}, the number of tensors, got {num_layers}")
    heads = meta.get(f"{arch}.attention.head_count")
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES.get(arch, arch)],
        "model_type": arch,
        "num_hidden_layers": num_layers,
        "hidden_size": meta.get(f"{arch}.embedding_length"),
        "intermediate_size": meta.get(f"{arch}.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get(f"{arch}.attention.head_count_kv", heads),
        "head_dim": _key_length(meta, arch),
        "v_head_dim": meta.get(f"{arch}.attention.value_length"),
        "max_position_embeddings": meta.get(f"{arch}.context_length"),
        "rms_norm_eps": meta.get(f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_theta": meta.get(f"{arch}.rope.freq_base", 10000.0),
        "vocab_size": embedding.dims[1],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
    }
    return {key: value for key, value in config.items() if value is not None}


def gguf_end_tokens(header: GgufHeader) -> list[int]:
    """The tokens that end an answer, the one that ends a text first."""
    found = (header.metadata.get(f"tokenizer.ggml.{key}") for key in END_KEYS)
    return list(dict.fromkeys(token for token in found if token is not None))


def _key_length(meta: Mapping[str, Any], arch: str) -> Any:
    size = meta.get(f"{arch}.attention.key_length")
    hidden, heads = meta.get(f"{arch}.embedding_length"), meta.get(f"{arch}.attention.head_count")
    if size is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        return hidden // heads
    return size


def _weight_format(header: GgufHeader) -> str:
    """The type that most bytes of the file have, as the file's name usually says it too."""
    sizes: Counter[str] = Counter()
    for tensor in header.tensors.values():
        sizes[tensor.type_name] += tensor.num_bytes
    return f"gguf-{sizes.most_common(1)[0][0]}" if sizes else "gguf"


def _with_origin(info: ModelInfo, header: GgufHeader, name: str, sha256: str) -> ModelInfo:
    versions = {n: packages.version(n) for n in ("openvino", "openvino-genai")} | {"gguf": str(header.version)}
    return dataclasses.replace(info, versions=versions, source_name=name, source_sha256=sha256)


def _write_configs(header: GgufHeader, info: ModelInfo, folder: Path) -> None:
    """Write the JSON files that tools beside openvino_genai look for; the chat template is in the tokenizer IR."""
    config = gguf_hf_config(header)
    ids: dict[str, Any] = {"bos_token_id": config["bos_token_id"]} if "bos_token_id" in config else {}
    ends = gguf_end_tokens(header)
    if ends:
        ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    for name, content in (("config.json", config), ("generation_config.json", ids)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
