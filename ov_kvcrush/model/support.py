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
        "qwen3_5_moe_text",
        "qwen3_5_text",
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
# And the text part of one, alone.
_MULTIMODAL_FAMILIES = frozenset(
    {
        "llama4",
        "llava-qwen2",
        "maira2",
        "qwen3_omni_moe_talker_text",
        "qwen3_omni_moe_text",
        "qwen3_vl_text",
    }
)
_ENCODER_DECODERS = frozenset(
    {
        "bart",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
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
# What optimum-intel exports for these is not what transformers computes, or not behind OpenVINO's rewrite.
_WRONG_GRAPHS = {
    "afmoe": "its mixture of experts, as optimum-intel 2.1 exports it, mixes up the rows of a step",
    "phimoe": "optimum-intel 2.1 exports a graph that computes something else",
    "gpt_neox_japanese": "optimum-intel 2.1 exports its attention as single operations, which OpenVINO cannot page",
    "xglm": "optimum-intel 2.1 exports its attention as single operations, which OpenVINO cannot page",
    "jais": "its ALiBi positions, in code of its own, get lost in OpenVINO's rewrite to PagedAttention",
}
# optimum-intel 2.1 exports these with other versions of transformers than 5.0, which all others are compared with.
_NOT_EXPORTED = frozenset({"bitnet", "dbrx", "exaone4", "gemma4_text", "gemma4_unified_text"})
# Their code comes with the model: transformers has none that they could be compared with.
_OWN_CODE = frozenset(
    {
        "aquila",
        "arctic",
        "baichuan",
        "chatglm",
        "deci",
        "deepseek",
        "exaone",
        "internlm",
        "internlm2",
        "minicpm",
        "orion",
        "qwen",
        "xverse",
    }
)
_BAICHUAN_ALIBI_LAYERS = 40  # of the 13B models; config.json says nothing else of it


def unsupported_reason(config: Mapping[str, Any], trust_remote_code: bool = False) -> str | None:
    """Return why the engine cannot run a model with this parsed `config.json`, or None if nothing speaks against it.

    trust_remote_code: whether the caller wants a model whose code comes with it, right or wrong.
    """
    family = config.get("model_type")
    names = config.get("architectures") or []
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    label = name or family
    if not label:
        return "config.json names no model_type and no architectures, so it is not known to be a language model"
    if config.get("is_encoder_decoder") or family in _ENCODER_DECODERS:
        return f"{label} is an encoder-decoder model; only decoder-only models can be run"
    if (
        family in _MULTIMODAL_FAMILIES
        or any(config.get(key) for key in _MULTIMODAL_KEYS)
        or name.endswith(("ForVision2Seq", "ForImageTextToText"))
    ):
        return f"{label} is a multimodal model; only text models can be run"
    if family in _RECURRENT_FAMILIES or any(config.get(key) for key in _RECURRENT_KEYS):
        return f"{label} cannot be run: {_STATE_SPACE}"
    reason = attention_reason(config, str(label)) or _head_reason(name)
    if reason is None and family in _NOT_EXPORTED:
        reason = f"optimum-intel 2.1 exports {label} with other versions of transformers than 5.0 only"
    if reason is None and family in _OWN_CODE and not trust_remote_code:
        reason = (
            f"{label} has code of its own, not in transformers, so nothing says that its answers are right; "
            "trust_remote_code exports it nevertheless"
        )
    return reason


def attention_reason(config: Mapping[str, Any], label: str) -> str | None:
    """Return why the attention of a model cannot be run, or None: the part that an exported graph does not show."""
    family = config.get("model_type")
    if family in _WRONG_GRAPHS:
        return f"{label} cannot be run: {_WRONG_GRAPHS[family]}"
    if family == "baichuan" and config.get("num_hidden_layers") == _BAICHUAN_ALIBI_LAYERS:
        return f"{label} cannot be run: {_WRONG_GRAPHS['jais']}"
    kinds = config.get("layer_types")
    for kind in kinds if isinstance(kinds, list) else []:
        if kind in (FULL, SLIDING):
            continue
        if "chunk" in str(kind):
            return f"{label} has layers of {kind!r}; only {FULL} and {SLIDING} can be run"
        return f"{label} has layers of {kind!r}: {_STATE_SPACE}"
    if config.get("attention_chunk_size"):
        return f"{label} attends in chunks (attention_chunk_size); only full and sliding attention can be run"
    if config.get("kv_lora_rank") or family == "minicpm3":
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
