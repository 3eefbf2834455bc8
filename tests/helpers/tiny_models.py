"""Tiny random models of each architecture the engine must run, as Hugging Face folders built from config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

KINDS = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma3", "gpt_neox")
RARE_KINDS = ("qwen3", "mistral")  # gemma3 has the norms of queries and keys of the one, and windows as the other
SLIDING_WINDOW = 16
NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, HIDDEN_SIZE = 4, 2, 32, 128
CONTEXT_LENGTH = 4096
VOCAB_SIZE = 288  # 256 bytes, the special tokens, and some ids that no text produces
BOS, EOS, START, END = "<s>", "</s>", "<|start|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

# What ov_kvcrush.json must say, per layer, where it is not "full attention everywhere".
SLIDING_WINDOWS: dict[str, tuple[int | None, ...]] = {
    "mistral": (SLIDING_WINDOW,) * 3,
    "phi3": (SLIDING_WINDOW,) * 2,
    "gemma3": (SLIDING_WINDOW, SLIDING_WINDOW, None, SLIDING_WINDOW),
}


def kinds() -> list[Any]:
    """KINDS as pytest.params: RARE_KINDS only with `--exhaustive`."""
    import pytest

    return [pytest.param(kind, marks=pytest.mark.exhaustive if kind in RARE_KINDS else ()) for kind in KINDS]


def tiny_model(kind: str, folder: str | Path, seed: int = 0, **overrides: Any) -> Path:
    """Write a random float32 model of `kind` with a byte-level tokenizer into `folder` and return the folder.

    kind: one of KINDS. overrides: config fields to set differently. The same seed gives the same weights.
    """
    import torch

    config = _config(kind, overrides)
    torch.manual_seed(seed)
    model = _model_class(kind)(config).to(torch.float32).eval()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config.eos_token_id = config.eos_token_id
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer() -> Any:
    """Return a byte-level tokenizer of 256 bytes and four special tokens, with a chat template and no merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (BOS, EOS, START, END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT_LENGTH,
    )


def _config(kind: str, overrides: dict[str, Any]) -> Any:
    import transformers

    shared: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": NUM_HEADS,
        "max_position_embeddings": CONTEXT_LENGTH,
        # Far above the usual 0.02, so that the best logit stands clear of the second and attention matters.
        "initializer_range": 0.2,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    grouped = {"num_key_value_heads": NUM_KV_HEADS}
    own: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("LlamaConfig", grouped),
        "qwen2": ("Qwen2Config", grouped),
        "qwen3": ("Qwen3Config", {**grouped, "head_dim": HEAD_SIZE}),
        "mistral": ("MistralConfig", {**grouped, "num_hidden_layers": 3, "sliding_window": SLIDING_WINDOW}),
        "phi3": ("Phi3Config", {**grouped, "sliding_window": SLIDING_WINDOW}),
        "gemma3": (
            "Gemma3TextConfig",
            {
                **grouped,
                "num_hidden_layers": 4,
                "head_dim": HEAD_SIZE,
                "query_pre_attn_scalar": HEAD_SIZE,
                "sliding_window": SLIDING_WINDOW,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            },
        ),
        "gpt_neox": ("GPTNeoXConfig", {"rotary_pct": 0.25}),
    }
    if kind not in own:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    name, fields = own[kind]
    return getattr(transformers, name)(**{**shared, **fields, **overrides})


def _model_class(kind: str) -> Any:
    import transformers

    names = {
        "llama": "LlamaForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "mistral": "MistralForCausalLM",
        "phi3": "Phi3ForCausalLM",
        "gemma3": "Gemma3ForCausalLM",
        "gpt_neox": "GPTNeoXForCausalLM",
    }
    return getattr(transformers, names[kind])
