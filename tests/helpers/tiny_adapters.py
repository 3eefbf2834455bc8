"""Two random LoRA adapters of a tiny llama, made by peft."""

from __future__ import annotations

from pathlib import Path

MODULES = {
    "a": ["q_proj", "v_proj", "down_proj"],
    "b": ["q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "lm_head"],
}
RANKS = {"a": (4, 8), "b": (8, 4)}  # r, lora_alpha


def tiny_adapters(model: Path, folder: Path) -> None:
    """A folder for each of MODULES. model: of Hugging Face."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for seed, (name, modules) in enumerate(MODULES.items()):
        torch.manual_seed(seed)
        rank, alpha = RANKS[name]
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, init_lora_weights=False)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        get_peft_model(base, config).save_pretrained(folder / name)
