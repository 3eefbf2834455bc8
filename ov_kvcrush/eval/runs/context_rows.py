"""Logits of given tokens behind contexts of pipelines on one model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from ov_kvcrush.contexts.context import Context
from ov_kvcrush.engine.engine import Engine
from ov_kvcrush.eval.likelihood.stored_rows import Following, StoredRows
from ov_kvcrush.kvcache.crush import CrushKVCache
from ov_kvcrush.pipelines.llm import LLMPipeline

ROWS_AT_ONCE = 128  # of one inference: more take no less time each


@dataclass(frozen=True, eq=False)
class Tail:
    """Tokens int64 (T,) behind a context of a pipeline, which stays as it is.

    name: the caller's. skip: of the first ones no logits are wanted. reads_all: whether a step reads the whole cache.
    """

    name: Any
    pipeline: LLMPipeline
    context: Context
    tokens: np.ndarray
    skip: int
    reads_all: bool = True


class ContextRows:
    """reader: one of the pipelines on the model, with engine "crush" and a store."""

    def __init__(self, reader: LLMPipeline) -> None:
        self._engine = _engine_of(reader)
        self._rows = StoredRows(self._engine._model, _cache_of(self._engine))

    def logits(self, tails: Iterable[Tail]) -> Iterator[tuple[Any, np.ndarray]]:
        """The name of each, and float32 (T - skip, vocabulary), a view until the next. Raises OutOfMemory."""
        for _, same in groupby(tails, key=lambda tail: (id(tail.pipeline), tail.reads_all)):
            batch: list[Tail] = []
            for tail in same:
                if batch and sum(len(one.tokens) for one in (*batch, tail)) > ROWS_AT_ONCE:
                    yield from self._run(batch)
                    batch = []
                batch.append(tail)
            yield from self._run(batch)

    def _run(self, batch: list[Tail]) -> Iterator[tuple[Any, np.ndarray]]:
        found = self._engine.thread.call(lambda: self._logits(batch))
        yield from zip((tail.name for tail in batch), found, strict=True)

    def _logits(self, batch: list[Tail]) -> list[np.ndarray]:
        store = _cache_of(_engine_of(batch[0].pipeline)).store
        forks: list[int] = []
        try:
            following = []
            for tail in batch:
                snapshot = tail.context.snapshot_for(tail.pipeline.context_owner)
                forks.append(store.fork(snapshot.store_id))
                following.append(Following(forks[-1], tail.tokens, snapshot.num_tokens, tail.skip))
            return self._rows.logits(store, following, one_by_one=not batch[0].reads_all)
        finally:
            for fork in forks:
                store.release(fork)


def _engine_of(pipeline: LLMPipeline) -> Engine:
    engine = pipeline.context_owner.backend
    assert isinstance(engine, Engine), "contexts are of our engine"
    return engine


def _cache_of(engine: Engine) -> CrushKVCache:
    assert isinstance(engine.cache, CrushKVCache), "contexts are in a store"
    return engine.cache
