"""Recall in the terms of the store: how many tokens of a head a decode step reads."""

from __future__ import annotations

from ov_kvcrush.config import CacheConfig

RECALL_ROWS = 4  # of one sequence in a step, at most, where not all is read; native/src/store/recall.hpp


def recall_of(config: CacheConfig) -> float:
    """Tokens, a fraction below 1 of what a head holds, or 0 for all of them."""
    found = config.recall_tokens
    assert found is None or isinstance(found, (int, float)), "checked when the config was built"
    return float(found or 0)
