"""Teacher forcing: the next-token distributions of a given text, decoded token by token on a given cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ov_kvcrush.config import CacheConfig, SchedulerConfig
from ov_kvcrush.core.request import Request
from ov_kvcrush.core.sampling_params import SamplingParams
from ov_kvcrush.engine.model_runner import ModelRunner
from ov_kvcrush.engine.scheduler import Scheduler
from ov_kvcrush.errors import OutOfMemory
from ov_kvcrush.kvcache.factory import make_kv_cache_manager
from ov_kvcrush.model.load import LoadedModel


@dataclass(frozen=True)
class Forced:
    """logprobs: float32 (N, vocabulary) of the token after each of N positions. kv_bytes: held at the end.

    num_tokens: cached at the end.
    """

    logprobs: np.ndarray
    kv_bytes: int
    num_tokens: int


def force(
    model: LoadedModel,
    cache: CacheConfig,
    ids: np.ndarray,
    num_context: int,
    advance: Callable[[int], None] = lambda rows: None,
    chunk: int = 512,
) -> Forced:
    """Read ids[:num_context] as a prompt, then decode the other tokens one by one as if they had been generated.

    ids: int64 (S,). advance: told the rows of each step. Returns the distributions after ids[num_context - 1 : S - 1],
    each of which can be compared with the token that follows. Raises OutOfMemory if the cache cannot hold the text.
    """
    config = SchedulerConfig(max_num_batched_tokens=chunk)
    memory = make_kv_cache_manager(model, config, cache)
    scheduler, runner = Scheduler(config, memory), ModelRunner(model, memory)
    params = SamplingParams(max_new_tokens=len(ids) - num_context + 1)
    sequence = Request(0, ids[:num_context], params).sequences[0]
    scheduler.add(sequence)
    logprobs: list[np.ndarray] = []
    while len(logprobs) < len(ids) - num_context:
        plan = scheduler.plan()
        if not plan.rows:
            raise OutOfMemory(f"max_bytes must hold {len(ids)} tokens, got {memory.use().capacity_bytes} bytes")
        runner.prepare(plan)
        logits = runner.infer()
        sequence.num_cached += plan.num_tokens
        if memory.commit(plan.rows):
            raise OutOfMemory(f"max_bytes must hold {len(ids)} tokens, got {memory.use().capacity_bytes} bytes")
        if plan.rows[0].samples:
            logprobs.append(log_softmax(logits[0]))
            sequence.ids.append(int(ids[len(sequence.ids)]))
        advance(plan.num_tokens)
    kv_bytes, num_tokens = memory.bytes_of(sequence), sequence.num_cached
    scheduler.remove([sequence])
    return Forced(np.stack(logprobs), kv_bytes, num_tokens)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities float32 of logits (V,)."""
    shifted = logits.astype(np.float64) - logits.max()
    return (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference || other) in nats per row, float64 (N,); log-probabilities (N, V)."""
    p = reference.astype(np.float64)
    return (np.exp(p) * (p - other.astype(np.float64))).sum(axis=-1)
