"""Tiny random models of every text architecture that optimum-intel exports and transformers has code for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tiny_models import tiny_tokenizer

VOCAB_SIZE = 288
WINDOW = 16

# In the words that most configs take, or map to their own.
_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # far above the usual 0.02: the best logit stands clear and attention matters
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
_HEADS: dict[str, Any] = {**_GROUPED, "head_dim": 32}
_SLIDING: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}

# What a config needs beside _SHARED.
EXPORTED: dict[str, dict[str, Any]] = {
    "arcee": _HEADS,
    "biogpt": {},
    "bloom": {},
    "codegen": {"n_ctx": 512, "rotary_dim": 16},
    "cohere": {**_GROUPED, "use_qk_norm": True, "logit_scale": 1.0},
    "cohere2": {**_GROUPED, **_SLIDING, "logit_scale": 1.0},
    "falcon": {"multi_query": True, "parallel_attn": True, "alibi": False},
    "gemma": _HEADS,
    "gemma2": {**_HEADS, **_SLIDING, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 3.0},
    "gemma3_text": {**_HEADS, **_SLIDING, "query_pre_attn_scalar": 32},
    "glm": {**_HEADS, "partial_rotary_factor": 0.5},
    "glm4": {**_HEADS, "partial_rotary_factor": 0.5},
    "gpt2": {"n_positions": 512},
    "gpt_bigcode": {"n_positions": 512, "multi_query": True},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "gpt_neox": {"rotary_pct": 0.25},
    "gpt_oss": {**_HEADS, **_SLIDING, **_EXPERTS},
    "gptj": {"n_positions": 512, "rotary_dim": 16},
    "granite": {**_GROUPED, "attention_multiplier": 0.1, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "granitemoe": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": _HEADS,
    "llama": _HEADS,
    "mistral": {**_HEADS, "sliding_window": WINDOW},
    "mixtral": {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "mpt": {"d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
    "olmo": _GROUPED,
    "olmo2": _GROUPED,
    "opt": {"ffn_dim": 192, "word_embed_proj_dim": 128},
    "persimmon": {},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {**_GROUPED, "sliding_window": WINDOW},
    "qwen2": {**_GROUPED, "use_sliding_window": False},
    "qwen2_moe": {
        **_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    "qwen3": _HEADS,
    "qwen3_moe": {**_HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "smollm3": {**_GROUPED, "no_rope_layers": [1, 0]},
    "stablelm": {**_GROUPED, "partial_rotary_factor": 0.25},
    "starcoder2": {**_GROUPED, "sliding_window": WINDOW},
}  # fmt: skip

# Variants of one architecture that attend in another way.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-alibi": ("falcon", {"multi_query": False, "parallel_attn": False, "alibi": True}),
    "falcon-grouped": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
}


def model_type(kind: str) -> str:
    return VARIANTS[kind][0] if kind in VARIANTS else kind


def tiny_architecture(kind: str, folder: Path, seed: int = 0) -> Path:
    """Write a random float32 model of `kind`, of EXPORTED or VARIANTS, with a byte-level tokenizer; return `folder`."""
    import torch
    import transformers

    name, own = VARIANTS.get(kind, (kind, EXPORTED.get(kind, {})))
    config = transformers.CONFIG_MAPPING[name](**{**_SHARED, **own})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    _randomise(model.named_parameters())
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config.eos_token_id = 257
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _randomise(parameters: Iterable[tuple[str, Any]]) -> None:
    """Biases, sinks and weights that start at zero or one, or with another deviation, tell nothing else."""
    import torch

    for _, parameter in parameters:
        with torch.no_grad():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif float(parameter.std()) < 0.1:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
