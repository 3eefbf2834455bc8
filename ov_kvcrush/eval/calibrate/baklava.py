"""BaKlaVa's profile of heads: how much each changes its input, and which budgets that should give them.

Gulhan et al., "BaKlaVa: Budgeted Allocation of KV cache for Long-context Inference", arXiv 2502.13176, section 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ov_kvcrush.eval.calibrate.layer_probe import LayerProbe
from ov_kvcrush.policies.budgets.head_profile import HeadProfile

KEPT = 0.25  # of the tokens, where budgets are compared
_TOKENS = 256  # of each prompt are read
_SHARES = ((0.25, 0.25), (0.5, 0.25), (0.25, 0.5))  # low, high
_SPREADS = (1.5, 3.0)
NUM_CANDIDATES = len(_SHARES) * len(_SPREADS)


def candidates(folder: Path, prompts: Sequence[np.ndarray]) -> list[HeadProfile]:
    """Budgets to choose from, by what the heads of a model do to the first tokens of prompts int64 (S,).

    The paper searches thresholds for the lowest perplexity; here shares of the heads, for the lowest KL divergence.
    Raises ModelError if the folder or the model in it cannot be used.
    """
    tokens = min(_TOKENS, *(len(ids) for ids in prompts))
    changes = tuple(float(x) for x in head_changes(folder, np.stack([ids[:tokens] for ids in prompts])))
    return [HeadProfile(changes, *shares, spread) for shares, spread in itertools.product(_SHARES, _SPREADS)]


def head_changes(folder: Path, ids: np.ndarray) -> np.ndarray:
    """float64 (N,): 1 - cos(head input, head output) of the KV heads of all layers, of texts int64 (B, S).

    The mean over texts, tokens and the query heads of a group. What goes into a head is here the value of the token
    itself: of all its inputs it alone lies in the space of the output, which is a mean of values.
    """
    return np.concatenate([_change(*pair) for pair in LayerProbe(folder, ids).values_and_outputs()])


def _change(values: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """float64 (K,) of values (B, K, S, D) and outputs (B, H, S, D)."""
    size, num_kv_heads, length, width = values.shape
    grouped = outputs.reshape(size, num_kv_heads, -1, length, width)
    products = np.einsum("bksd,bkgsd->bkgs", values, grouped, dtype=np.float64)
    norms = np.linalg.norm(values, axis=-1)[:, :, None] * np.linalg.norm(grouped, axis=-1)
    return 1 - (products / np.maximum(norms, 1e-12)).mean(axis=(0, 2, 3))
