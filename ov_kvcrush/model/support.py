"""Which models the engine can run, told from a Hugging Face `config.json` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ov_kvcrush.errors import did_you_mean
from ov_kvcrush.model.hf_config import FULL, SLIDING

_STATE_SPACE = "it keeps a recurrent state instead of (or beside) a KV cache: state-space or linear attention"
_RECURRENT_FAMILIES = frozenset(
    {
        "bamba",
        "falcon_h1",
        "falcon_mamba",
        "granitemoehybrid",
        "jamba",
        "kimi_linear",
        "lfm2",
        "lfm2_moe",
        "mamba",
        "mamba2",
        "minimax",
        "nemotron_h",
        "plamo2",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_next",
        "recurrent_gemma",
        "retnet",
        "rwkv",
        "rwkv5",
        "rwkv6",
        "rwkv7",
        "xlstm",
        "zamba",
        "zamba2",
    }
)
_RECURRENT_KEYS = ("ssm_cfg", "state_size", "mamba_d_state", "ssm_state_size", "conv_L_cache", "linear_num_key_heads")
_MULTIMODAL_KEYS = ("vision_config", "audio_config", "speech_config", "thinker_config", "vq_config", "vision_tower")
_ENCODER_DECODERS = frozenset(
    {
        "bart",
        "blenderbot",
        "led",
        "longt5",
        "m2m_100",
        "marian",
        "mbart",
        "mt5",
        "pegasus",
        "prophetnet",
        "t5",
        "umt5",
        "whisper",
    }
)
_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")


def unsupported_reason(config: Mapping[str, Any]) -> str | None:
    """Return why the engine cannot run a model with this parsed `config.json`, or None if nothing speaks against it."""
    family = config.get("model_type")
    names = config.get("architectures") or []
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    label = name or family
    if not label:
        return "config.json names no model_type and no architectures, so it is not known to be a language model"
    if config.get("is_encoder_decoder") or family in _ENCODER_DECODERS:
        return f"{label} is an encoder-decoder model; only decoder-only models can be run"
    if any(config.get(key) for key in _MULTIMODAL_KEYS) or name.endswith(("ForVision2Seq", "ForImageTextToText")):
        return f"{label} is a multimodal model; only text models can be run"
    if family in _RECURRENT_FAMILIES or any(config.get(key) for key in _RECURRENT_KEYS):
        return f"{label} cannot be run: {_STATE_SPACE}"
    return attention_reason(config, str(label)) or _head_reason(name)


def attention_reason(config: Mapping[str, Any], label: str) -> str | None:
    """Return why the attention of a model cannot be run, or None: the part that an exported graph does not show."""
    kinds = config.get("layer_types")
    for kind in kinds if isinstance(kinds, list) else []:
        if kind in (FULL, SLIDING):
            continue
        if "chunk" in str(kind):
            return f"{label} has layers of {kind!r}; only {FULL} and {SLIDING} can be run"
        return f"{label} has layers of {kind!r}: {_STATE_SPACE}"
    if config.get("attention_chunk_size"):
        return f"{label} attends in chunks (attention_chunk_size); only full and sliding attention can be run"
    if config.get("kv_lora_rank"):
        return f"{label} uses multi-head latent attention (kv_lora_rank), whose cache is not one of keys and values"
    if config.get("use_bidirectional_attention") in (True, "all"):
        return f"{label} attends in both directions; only causal models can be run"
    if config.get("num_kv_shared_layers"):
        return f"{label} shares one KV cache between layers (num_kv_shared_layers), which cannot be run yet"
    return None


def _head_reason(name: str) -> str | None:
    if not name or name.endswith(_CAUSAL_ENDINGS):
        return None
    hint = did_you_mean(name, [name.partition("For")[0].removesuffix("Model") + "ForCausalLM"])
    return f"{name} is not a causal language model (encoder-only, or another kind of head){hint}"
