"""What openvino_genai's cache eviction with KVCrush decides at the end of a prompt, step by step as its C++ does.

Its sorts are not stable, which leaves two things open: which of equal scores at the median get a bit (here those of
the lower index), and the order of pages of equal distance (here as they stand in the text).
"""

from __future__ import annotations

import random
from dataclasses import dataclass


def mersenne_twister(seed: int) -> random.Random:
    """std::mt19937(seed): getrandbits(32) gives its numbers."""
    state = [seed]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ (state[-1] >> 30)) + i) % 2**32)
    twister = random.Random()
    twister.setstate((3, (*state, 624), None))
    return twister


@dataclass(frozen=True)
class GenaiConfig:
    """CacheEvictionConfig and KVCrushConfig; sizes in tokens, budget in blocks."""

    block_size: int
    start_size: int
    evictable_size: int
    recent_size: int
    budget: int
    anchor: str
    rng_seed: int
    snapkv_window_size: int = 8


class GenaiEviction:
    """CacheEvictionAlgorithm in NORM_SUM mode."""

    def __init__(self, config: GenaiConfig) -> None:
        self.config = config
        self.rng = mersenne_twister(config.rng_seed)

    def evict_logical_blocks(self, attention: list[list[float]]) -> list[set[int]]:
        """Blocks to evict; attention: [layer][token], summed over the heads and the window's rows."""
        return [self._evict_in_layer(layer) for layer in attention]

    def _evict_in_layer(self, attention: list[float]) -> set[int]:
        config, size = self.config, self.config.block_size
        scores = self._max_pool(attention[config.start_size :])
        counters = [config.snapkv_window_size] * len(scores)
        for i in range(config.snapkv_window_size):
            counters[-1 - i] = i + 1
        start = config.start_size // size
        num_evictable = len(attention) // size - config.recent_size // size - start
        block_scores = []
        for block in range(num_evictable):
            total = 0.0
            for token in range(block * size, (block + 1) * size):
                total += scores[token] / counters[token]
            block_scores.append(total)
        num_to_evict = max(0, num_evictable - config.evictable_size // size)
        pairs = sorted((score, block) for block, score in enumerate(block_scores))
        evicted = sorted(block for _, block in pairs[:num_to_evict])
        if config.budget > 0 and len(evicted) >= config.budget:
            retained = self._retain(num_evictable * size, evicted, scores)
            evicted = [block for block in evicted if block not in retained]
        return {block + start for block in evicted}

    def _max_pool(self, scores: list[float]) -> list[float]:
        return [max(scores[i : i + 7]) for i in range(len(scores))]

    def _retain(self, num_tokens: int, evicted: list[int], scores: list[float]) -> list[int]:
        size, num_blocks = self.config.block_size, num_tokens // self.config.block_size
        indices = sorted(range(num_tokens), key=lambda i: -scores[i])
        indicators = [0] * num_tokens
        for i in indices[: num_tokens // 2]:
            indicators[i] = 1
        anchor = self._anchor(num_blocks, indicators)
        distances = []
        for block in range(num_blocks):
            distances.append(sum(indicators[block * size + j] != anchor[j] for j in range(size)))
        filtered = sorted((block for block in range(num_blocks) if block in evicted), key=lambda b: distances[b])
        num_to_retain = min(len(filtered), self.config.budget)
        step = len(filtered) // num_to_retain
        return [filtered[i * step] for i in range(num_to_retain)]

    def _anchor(self, num_blocks: int, indicators: list[int]) -> list[int]:
        size = self.config.block_size
        if self.config.anchor == "random":
            return [self.rng.getrandbits(32) >> 31 for _ in range(size)]
        if self.config.anchor == "mean":
            means = [sum(indicators[block * size + j] for block in range(num_blocks)) / num_blocks for j in range(size)]
            return [int(mean > 0.5) for mean in means]
        return {"zeros": [0] * size, "ones": [1] * size, "alternating": [j % 2 for j in range(size)]}[
            self.config.anchor
        ]
