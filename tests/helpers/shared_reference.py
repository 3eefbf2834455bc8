"""Hugging Face's model where layers attend to the keys and values of earlier ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def shared_logits(folder: Path, ids: np.ndarray, shared: Mapping[int, int]) -> np.ndarray:
    """Logits (T, V) in float32 where layer i attends to the rotated keys and the values of layer shared[i]."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad(), sharing(shared):
        logits: np.ndarray = model.eval()(torch.from_numpy(ids)[None]).logits[0].numpy()
    return logits


@contextmanager
def sharing(shared: Mapping[int, int]) -> Iterator[None]:
    """Let layers attend to the keys and values of others: of models with "sdpa", and of Llama with "eager"."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama import modeling_llama

    own: dict[int, tuple[Any, Any]] = {}

    def with_others(attention: Any) -> Any:
        def attend(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            own[module.layer_idx] = key, value
            key, value = own[shared.get(module.layer_idx, module.layer_idx)]
            return attention(module, query, key, value, *args, **kwargs)

        return attend

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", with_others(ALL_ATTENTION_FUNCTIONS["sdpa"]))
        patch.setattr(modeling_llama, "eager_attention_forward", with_others(modeling_llama.eager_attention_forward))
        yield


def shared_states(folder: Path, ids: np.ndarray, shared: Mapping[int, int]) -> np.ndarray:
    """The same model's hidden states before the LM head, (B, S, C); ids (B, S)."""
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad(), sharing(shared):
        states: np.ndarray = model(torch.from_numpy(ids)).last_hidden_state.numpy()
    return states
