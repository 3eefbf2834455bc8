"""Reading a Hugging Face `config.json` as a plain dict: the runtime has no transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ov_kvcrush.errors import ModelError

# Model families have named the same thing differently; the first name present counts.
ALIASES: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "num_heads": ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "vocab_size": ("vocab_size", "n_vocab"),
    "context_length": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"),
}

# Families whose sliding_window covers every layer unless layer_types says otherwise.
ALWAYS_SLIDING = frozenset({"mistral", "mixtral", "ministral", "phi3", "phimoe", "starcoder2"})
# Families whose sliding_window counts only while use_sliding_window is on (the default is off).
SWITCHED_SLIDING = frozenset({"qwen2", "qwen2_moe", "qwen3", "qwen3_moe"})
# Families that mix sliding and full layers in a fixed rhythm: every n-th layer is full.
PATTERN_SLIDING = {"gemma3_text": 6, "cohere2": 4}

SLIDING, FULL = "sliding_attention", "full_attention"


def pick(config: Mapping[str, Any], field: str, optional: bool = False) -> Any:
    """Return a whole number of at least 1 from `config` under any of the field's names; ModelError otherwise."""
    for name in ALIASES[field]:
        value = config.get(name)
        if value is not None:
            return _count(name, value)
    if field == "num_kv_heads":
        return 1 if config.get("multi_query") is True else pick(config, "num_heads")
    if optional:
        return None
    raise ModelError(f"{ALIASES[field][0]} must be present in config.json, got nothing: is this a language model?")


def head_sizes(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return (key head size, value head size)."""
    size = config.get("head_dim")
    if size is None:
        hidden, heads = pick(config, "hidden_size"), pick(config, "num_heads")
        if hidden % heads:
            raise ModelError(f"hidden_size must be a multiple of the number of heads, got {hidden} and {heads}")
        size = hidden // heads
    size = _count("head_dim", size)
    value_size = config.get("v_head_dim")
    return size, size if value_size is None else _count("v_head_dim", value_size)


def sliding_windows_of(config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Return for each layer the number of last tokens it attends to, or None where it attends to all."""
    window = config.get("sliding_window")
    family = config.get("model_type")
    if family == "gpt_neo":
        return _local_windows(config, num_layers)
    if window is None or (family in SWITCHED_SLIDING and not config.get("use_sliding_window")):
        return (None,) * num_layers
    window = _count("sliding_window", window)
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise ModelError(f"layer_types must be a list of {num_layers} names, got {kinds!r}")
        return tuple(window if kind == SLIDING else None for kind in kinds)
    if family in PATTERN_SLIDING or config.get("sliding_window_pattern") is not None:
        rhythm = config.get("sliding_window_pattern") or PATTERN_SLIDING.get(str(family))
        rhythm = _count("sliding_window_pattern", rhythm)
        return tuple(window if (layer + 1) % rhythm else None for layer in range(num_layers))
    if family in SWITCHED_SLIDING:
        first = config.get("max_window_layers", 0)
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise ModelError(f"max_window_layers must be a whole number of at least 0, got {first!r}")
        return tuple(window if layer >= first else None for layer in range(num_layers))
    return (window if family in ALWAYS_SLIDING else None,) * num_layers


def _local_windows(config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """GPT-Neo names its layers "global" and "local"; a local one sees window_size tokens."""
    kinds = config.get("attention_layers")
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ModelError(f"attention_layers must be a list of {num_layers} names, got {kinds!r}")
    window = _count("window_size", config.get("window_size", 256))
    return tuple(window if kind == "local" else None for kind in kinds)


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary positions as `{"type", "theta", "scaling", "rotary_fraction"[, "local"]}`.

    Understands `rope_parameters` of transformers 5 (flat, or one object per layer type), and `rope_theta`,
    `rope_scaling`, `rope_local_base_freq`, `rotary_emb_base`, `rotary_pct` of earlier versions.
    """
    parameters = config.get("rope_parameters")
    if isinstance(parameters, Mapping) and isinstance(parameters.get(FULL), Mapping):
        rope = _one_rope(config, parameters[FULL])
        if isinstance(parameters.get(SLIDING), Mapping):
            rope["local"] = _one_rope(config, parameters[SLIDING])
        return rope
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ModelError(f"rope_parameters must be an object, got {parameters!r}")
    theta = config.get("rope_theta", config.get("rotary_emb_base"))
    if parameters is None and theta is None and config.get("model_type") not in ROTARY_BY_DEFAULT:
        return {"type": "none"}
    scaling = config.get("rope_scaling")
    if scaling is not None and not isinstance(scaling, Mapping):
        raise ModelError(f"rope_scaling must be an object or null, got {scaling!r}")
    rope = _one_rope(config, {"rope_theta": theta, **(scaling or {}), **(parameters or {})})
    local = config.get("rope_local_base_freq")
    if local is not None:
        rope["local"] = _one_rope(config, {"rope_theta": local})
    return rope


# Families whose published configs may leave rope_theta out: their code's default is 10000.
ROTARY_BY_DEFAULT = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "phi", "gemma", "gpt_neox", "stablelm"})


def _one_rope(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    theta = parameters.get("rope_theta")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    fraction = parameters.get("partial_rotary_factor")
    if fraction is None:
        fraction = config.get("partial_rotary_factor", config.get("rotary_pct"))
    known = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
    scaling = {key: value for key, value in parameters.items() if key not in known}
    return {
        "type": kind,
        "theta": 10000.0 if theta is None else theta,
        "scaling": scaling or None,
        "rotary_fraction": 1.0 if fraction is None else fraction,
    }


def _count(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value
