"""How likely a model finds given texts, with the cache that a policy leaves of what comes before them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ov_kvcrush.core.cache_params import DEFAULT_CACHE_PARAMS, CacheParams
from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.likelihood.forcing import ForcedEngine, Score
from ov_kvcrush.policies.keep_all import KeepAll

Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a context and of what follows it
_CONTEXTS_SHARE = 0.5  # of the cache, at most, that contexts of one batch take with what follows them


def scores_of(
    engine: ForcedEngine,
    pairs: Sequence[Pair],
    tail_tokens: int,
    max_contexts: int,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Score]:
    """Score the continuation of each context. A context that several pairs share is read once.

    The policy chooses from a context without its last `tail_tokens`; these are read after it chose, and they and the
    continuation stay in full. With tail_tokens >= 1 every score comes from the compressed cache. With 0, and for
    contexts of at most tail_tokens, the policy acts as in generation: after the first token was predicted.
    max_contexts: contexts read at the same time. advance: told how many pairs are done.
    Raises RequestError for what cannot be run, CrushError for a continuation without tokens, OutOfMemory.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if not len(continuation):
            raise CrushError(f"continuation must have at least one token, got none after {len(context)} of the context")
        groups.setdefault(tuple(context), []).append(index)
    tail_tokens = tail_tokens if engine.cache.snapshots is not None else 0
    scores: dict[int, Score] = {}
    for batch in _batches(groups, pairs, max_contexts, _CONTEXTS_SHARE * engine.cache.capacity_tokens(None)):
        indices = [index for context in batch for index in groups[context]]
        scores.update(zip(indices, _scores_of_batch(engine, batch, groups, pairs, tail_tokens), strict=True))
        advance(len(indices))
    return [scores[index] for index in range(len(pairs))]


def _batches(
    groups: dict[tuple[int, ...], list[int]], pairs: Sequence[Pair], max_contexts: int, max_tokens: float
) -> Iterator[list[tuple[int, ...]]]:
    batch: list[tuple[int, ...]] = []
    num_tokens = 0
    for context, indices in groups.items():
        size = len(context) + sum(len(pairs[index][1]) for index in indices)
        if batch and (len(batch) == max_contexts or num_tokens + size > max_tokens):
            yield batch
            batch, num_tokens = [], 0
        batch.append(context)
        num_tokens += size
    if batch:
        yield batch


def _scores_of_batch(
    engine: ForcedEngine,
    contexts: list[tuple[int, ...]],
    groups: dict[tuple[int, ...], list[int]],
    pairs: Sequence[Pair],
    tail_tokens: int,
) -> list[Score]:
    split = [c for c in contexts if tail_tokens and len(c) > tail_tokens]
    snapshots = dict(zip(split, engine.read(np.array(c[:-tail_tokens], np.int64) for c in split), strict=True))
    try:
        params = {c: CacheParams(policy=KeepAll(), context=kv.as_base()) for c, kv in snapshots.items()}
        return engine.force(
            (np.array(c, np.int64), np.array(pairs[index][1], np.int64), params.get(c, DEFAULT_CACHE_PARAMS))
            for c in contexts
            for index in groups[c]
        )
    finally:
        for snapshot in snapshots.values():
            snapshot.release()
