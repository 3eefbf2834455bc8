"""Hugging Face's eager attention, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def eager_attentions(folder: Path, ids: np.ndarray, **options: Any) -> list[np.ndarray]:
    """Of each layer (H, S, S)."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    ).eval()
    with torch.no_grad():
        return [a[0].numpy() for a in model(torch.from_numpy(ids)[None], output_attentions=True).attentions]
