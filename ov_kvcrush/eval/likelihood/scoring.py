"""How likely a model finds given texts, with the cache that a policy leaves of what comes before them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.config import CacheConfig
from ov_kvcrush.core import request as requests
from ov_kvcrush.core.snapshot import KVSnapshot
from ov_kvcrush.engine.engine import Engine
from ov_kvcrush.engine.sampler import log_softmax_at
from ov_kvcrush.engine.scheduler import SchedulerOutput
from ov_kvcrush.errors import CrushError, OutOfMemory
from ov_kvcrush.pipelines.backend import DEFAULT_CACHE_PARAMS, CacheParams
from ov_kvcrush.policies.keep_all import KeepAll

Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a context and of what follows it
_SHARE_HELD = 0.5  # of the cache, at most, that contexts of one batch take with what follows them


@dataclass(frozen=True)
class Score:
    """logprob: of all tokens of a continuation, in nats. is_greedy: each of them was the most likely one.

    kept_tokens: that a head held at the end, on average. kv_bytes: of the whole cache of this request then.
    """

    logprob: float
    is_greedy: bool
    kept_tokens: int = 0
    kv_bytes: int = 0


@dataclass
class _Forced:
    """What a request is to say, and how likely that was so far."""

    ids: np.ndarray  # int64 (N,)
    logprobs: list[float] = field(default_factory=list)
    is_greedy: bool = True


class ForcedEngine(Engine):
    """An engine that can be told what to answer. All else is its own: batches, chunks, policies, preemption."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._forced: dict[int, _Forced] = {}
        self._numbers = itertools.count(1 << 61)
        self._one_hot = np.zeros(self._model.vocab_size, np.float32)

    @classmethod
    def beside(cls, engine: Engine, config: CacheConfig) -> ForcedEngine:
        """One on the same compiled model, with a memory of its own."""
        return cls(engine._model, engine._config, engine._defaults, engine._decode, config)

    def read(self, prompts: Iterable[np.ndarray]) -> list[KVSnapshot]:
        """The KV of each prompt as the policy leaves it: the caller's, for `drop_held`. Raises OutOfMemory."""
        config = ov_genai.GenerationConfig(max_new_tokens=1)
        use = CacheParams(prefill_only=True)
        prompts = list(prompts)
        handles = self._run_all([(ids, config, use) for ids in prompts])
        held = [handle.held for handle in handles]
        if any(kv is None or kv.num_tokens < len(ids) for kv, ids in zip(held, prompts, strict=True)):
            for kv in held:
                if kv is not None:
                    self.drop_held(kv)
            raise OutOfMemory(f"KV cache must hold a context, got one of up to {max(map(len, prompts))} tokens")
        return [kv for kv in held if kv is not None]

    def force(self, prompts: Iterable[tuple[np.ndarray, np.ndarray, CacheParams]]) -> list[Score]:
        """How likely each continuation is after its prompt: int64 (P,), (N,) with N > 0. Raises OutOfMemory."""
        prompts = list(prompts)
        items = [
            (ids, ov_genai.GenerationConfig(max_new_tokens=len(answer), ignore_eos=True), use)
            for ids, answer, use in prompts
        ]
        forced = [_Forced(answer) for _, answer, _ in prompts]
        try:
            stats = [handle.get_stats() for handle in self._run_all(items, forced)]
        finally:
            self._forced.clear()
        for (ids, answer, _), done in zip(prompts, forced, strict=True):
            if len(done.logprobs) < len(answer):
                raise OutOfMemory(f"KV cache must hold {len(ids)} tokens and {len(answer)} more; raise max_bytes")
        return [
            Score(float(np.sum(done.logprobs)), done.is_greedy, used.kept_tokens or 0, used.kv_bytes)
            for done, used in zip(forced, stats, strict=True)
        ]

    def write(
        self, prompts: Iterable[tuple[np.ndarray, ov_genai.GenerationConfig, CacheParams]]
    ) -> list[requests.GenerationHandle]:
        """Answers of its own to prompts int64 (P,), all in one batch: handles of requests that have ended."""
        return self._run_all(list(prompts))

    def _run_all(
        self, items: list[tuple[np.ndarray, ov_genai.GenerationConfig, CacheParams]], forced: Sequence[_Forced] = ()
    ) -> list[requests.GenerationHandle]:
        handles = []
        try:
            for index, (ids, config, use) in enumerate(items):
                number = next(self._numbers)
                if forced:
                    self._forced[number] = forced[index]
                handles.append(self.add(number, ids, config, use))
            while any(handle.get_status() == requests.Status.RUNNING for handle in handles):
                self.step()
        except BaseException:
            for handle in handles:
                handle.cancel()
                if handle.held is not None:
                    self.drop_held(handle.held)
            self.process_aborts()
            raise
        return handles

    def _due(self, plan: SchedulerOutput, logits: np.ndarray) -> Iterator[tuple[requests.Sequence, np.ndarray]]:
        """Where a request is told what to say, all logits but that token's are equal and lower."""
        for sequence, row in super()._due(plan, logits):
            forced = self._forced.get(sequence.request.request_id)
            if forced is None:
                yield sequence, row
                continue
            token = int(forced.ids[sequence.num_generated])
            forced.logprobs.append(log_softmax_at(row, token))
            forced.is_greedy &= int(row.argmax()) == token
            self._one_hot[token] = 1
            yield sequence, self._one_hot
            self._one_hot[token] = 0


def scores_of(
    engine: ForcedEngine,
    pairs: Sequence[Pair],
    tail_tokens: int,
    max_contexts: int,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Score]:
    """Score the continuation of each context. A context that several pairs have is read once.

    The policy chooses from a context without its last `tail_tokens`; they are read behind what it left, and all that
    follows stays. So with one of them or more every score comes from the compressed cache; with none, and for contexts
    that are not longer, the policy acts where generation has it act, and the first token is predicted before.
    max_contexts: read at the same time. advance: told how many pairs are done.
    Raises RequestError for what cannot be run, CrushError for a continuation without tokens, OutOfMemory.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if not len(continuation):
            raise CrushError(f"continuation must have at least one token, got none after {len(context)} of the context")
        groups.setdefault(tuple(context), []).append(index)
    tail_tokens = tail_tokens if engine.memory.can_evict else 0
    scores: dict[int, Score] = {}
    for batch in _batches(groups, pairs, max_contexts, _SHARE_HELD * engine.memory.capacity_tokens(None)):
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
    held = dict(zip(split, engine.read(np.array(c[:-tail_tokens], np.int64) for c in split), strict=True))
    try:
        uses = {c: CacheParams(policy=KeepAll(), context=kv.as_base()) for c, kv in held.items()}
        return engine.force(
            (np.array(c, np.int64), np.array(pairs[index][1], np.int64), uses.get(c, DEFAULT_CACHE_PARAMS))
            for c in contexts
            for index in groups[c]
        )
    finally:
        for kv in held.values():
            engine.drop_held(kv)
