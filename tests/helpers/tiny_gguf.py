"""Tiny GGUF files made from the tiny random models, with the package `gguf` (which the runtime does without)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import CHAT_TEMPLATE, VOCAB_SIZE, tiny_tokenizer

from ov_kvcrush.model.gguf.requantize import TARGETS, requantized_rows

FILE_TYPES = {
    "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17,
    "IQ4_NL": 25, "IQ3_S": 26, "IQ4_XS": 30,
}  # fmt: skip
# Types that nothing here writes: byte offsets of the float16 numbers of a block, and numbers that make weights of 0.2.
RANDOM_SCALES: dict[str, dict[int, float]] = {
    "Q2_K": {80: 0.015, 82: 0.015},
    "Q3_K": {108: 0.005},
    "Q5_K": {0: 0.0006, 2: 0.01},
    "IQ4_NL": {0: 0.003},
    "IQ4_XS": {0: 0.0002},
    "IQ3_S": {0: 0.001},
}
ROPE_THETA = 50000.0
MERGED = "th"  # openvino_genai wants at least one merge; its token is the first id after the special ones


def tiny_gguf(path: Path, hf_folder: Path, weight_type: str = "F16", **metadata: Any) -> Any:
    """Write the model of `hf_folder` (llama, qwen2 or qwen3) as a GGUF and return it with the weights of the file.

    Where the type is requantised before it is converted, with the weights that it becomes.

    weight_type: one of FILE_TYPES, for all matrices; vectors are float32. metadata: extra keys, or None to leave a
    usual key out (dots are written as double underscores).
    """
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_folder)
    config, kind = model.config, gguf.GGMLQuantizationType[weight_type]
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    _write_shape(writer, config, FILE_TYPES[weight_type])
    _write_tokenizer(writer)
    for name, value in metadata.items():
        key = name.replace("__", ".")
        if value is None:
            del writer.kv_data[0][key]
        else:
            writer.kv_data[0].pop(key, None)
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            base, suffix = name.rsplit(".", 1)
            target = f"{names.get_name(base)}.{suffix}"
            values = weight.numpy()
            if values.ndim == 1:
                writer.add_tensor(target, values)
                continue
            if arch == "llama" and base.endswith(("q_proj", "k_proj")):
                heads = config.num_attention_heads if base.endswith("q_proj") else config.num_key_value_heads
                stored = _quantize(_interleave(values, heads), kind)
            else:
                stored = _quantize(values, kind)
            writer.add_tensor(target, stored, raw_dtype=kind)
            # Blocks lie within rows, so that quantising and reordering rows commute.
            weight.copy_(torch.from_numpy(_meant(_quantize(values, kind), weight_type).copy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _meant(rows: np.ndarray, weight_type: str) -> np.ndarray:
    import gguf

    if weight_type in TARGETS:
        rows, weight_type = requantized_rows(weight_type, rows), TARGETS[weight_type]
    return np.asarray(gguf.dequantize(rows, gguf.GGMLQuantizationType[weight_type]))


def _write_shape(writer: Any, config: Any, file_type: int) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(file_type)


def _write_tokenizer(writer: Any) -> None:
    ids = tiny_tokenizer().get_vocab()
    tokens = [f"<unused{i}>" for i in range(VOCAB_SIZE)]
    kinds = [3] * VOCAB_SIZE  # 3: control, 1: normal
    for token, index in ids.items():
        tokens[index] = token
        kinds[index] = 3 if index >= 256 else 1
    tokens[len(ids)], kinds[len(ids)] = MERGED, 1
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(MERGED)])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(257)
    writer.add_chat_template(CHAT_TEMPLATE)


def _quantize(values: np.ndarray, kind: Any) -> np.ndarray:
    """As gguf.quantize, which cannot write Q4_K: that is done here in the plainest way."""
    import gguf

    if kind.name in RANDOM_SCALES:
        # A row's blocks follow from its numbers: they are the same wherever the row is written.
        num_blocks = values.shape[1] // gguf.GGML_QUANT_SIZES[kind][0]
        rngs = [np.random.default_rng(row[:4].view(np.uint32)) for row in np.ascontiguousarray(values)]
        return np.stack([random_blocks(kind.name, num_blocks, rng).reshape(-1) for rng in rngs])
    if kind.name != "Q4_K":
        return np.asarray(gguf.quantize(values, kind))
    groups = values.reshape(len(values), -1, 8, 32)
    lowest = np.minimum(groups.min(-1), 0)
    step = (groups.max(-1) - lowest) / 15

    def six_bits(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        unit = np.maximum(x.max(-1, keepdims=True) / 63, 1e-6).astype(np.float16)
        return unit, np.round(x / unit).clip(0, 63).astype(np.uint8)

    (unit, scale), (low_unit, low) = six_bits(step), six_bits(-lowest)
    shifted = groups + (low_unit.astype(np.float32) * low)[..., None]
    steps = np.maximum(unit.astype(np.float32) * scale, 1e-9)[..., None]
    q = np.round(shifted / steps).clip(0, 15).astype(np.uint8)
    parts = [
        unit.view(np.uint8),
        low_unit.view(np.uint8),
        scale[..., :4] | scale[..., 4:] >> 4 << 6,
        low[..., :4] | low[..., 4:] >> 4 << 6,
        scale[..., 4:] & 15 | (low[..., 4:] & 15) << 4,
        (q[..., 0::2, :] | q[..., 1::2, :] << 4).reshape(*q.shape[:2], 128),
    ]
    return np.concatenate(parts, axis=-1).reshape(len(values), -1)


def random_blocks(type_name: str, num_blocks: int, rng: np.random.Generator) -> np.ndarray:
    """Blocks of random codes and scales: uint8 (num_blocks, bytes)."""
    import gguf

    blocks = rng.integers(
        0, 256, (num_blocks, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]][1]), np.uint8
    )
    for at, size in RANDOM_SCALES[type_name].items():
        scales = (size * rng.uniform(0.5, 2, (num_blocks, 1))).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    return blocks


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Order rows as llama.cpp's rotary positions want them: pairs (i, i + half) become neighbours."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
