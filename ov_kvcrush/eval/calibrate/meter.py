"""KL divergence of compressed caches to the full cache, many caches of one prompt that is read once.

The full cache (in the precision that the model computes in) answers greedily; every other cache is then given the same
tokens, all rows in one inference, and its next-token distributions are compared. A suffix, such as a question about a
context, comes behind the caches and is never compressed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.config import PRECISIONS, CacheConfig, SchedulerConfig
from ov_kvcrush.core.eviction import NO_REPLAY_PROMPT, Choice, EvictionSpec, EvictionState, ReplayPrompt
from ov_kvcrush.core.request import Request
from ov_kvcrush.core.request import Sequence as TokenSequence
from ov_kvcrush.core.sampling_params import SamplingParams
from ov_kvcrush.core.step import ScheduledTokens, SchedulerOutput
from ov_kvcrush.engine.model_runner import ModelRunner
from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.likelihood.divergence import Reference, log_softmax
from ov_kvcrush.eval.likelihood.stored_rows import Following, StoredRows
from ov_kvcrush.kvcache.crush import CrushKVCache
from ov_kvcrush.kvcache.eviction import CacheView
from ov_kvcrush.kvcache.factory import make_kv_cache_manager
from ov_kvcrush.kvcache.planning import tiers_of
from ov_kvcrush.kvcache.replay import ROWS
from ov_kvcrush.model.load import load_model
from ov_kvcrush.policies.base import Budget, Policy

_CHUNK = 512  # prompt tokens of one inference
_ROWS_AT_ONCE = 128  # of one inference: more take no less time each
_MAX_BYTES = 8 << 30


@dataclass(frozen=True, eq=False)
class CacheVariant:
    """One cache of a prompt. precisions: uint8 (N, 2). kept: [N] int32, the tokens of each head; None = all.

    tiers: uint8, the tier of each kept token of all heads; then precisions are uint8 (N, tiers, 2).
    """

    precisions: np.ndarray
    kept: Sequence[np.ndarray] | None = None
    tiers: np.ndarray | None = None


@dataclass(frozen=True)
class Measured:
    """kl: mean over the rows, nats. same_top: share of rows with the full cache's most likely token. nbytes: stored."""

    kl: float
    same_top: float
    nbytes: int


@dataclass(frozen=True, eq=False)
class Answer:
    """What the full cache says to a prompt.

    rows: int64 (R,): tokens whose next token is compared, those of the answer, and before them the last of a suffix.
    log_probs: float32 (R, vocabulary), of the next token.
    """

    rows: np.ndarray
    log_probs: np.ndarray


class CacheMeter:
    """A loaded model, and caches of one prompt at a time.

    config: of the store, but for its limit. Raises what loading raises; CrushError without a store.
    """

    def __init__(
        self, folder: Path, properties: dict[str, Any] | None = None, config: CacheConfig | None = None
    ) -> None:
        self.config = replace(config or CacheConfig(), max_bytes=_MAX_BYTES)
        self.model = load_model(folder, "CPU", properties or {}, "crush", self.config.sharing)
        cache = make_kv_cache_manager(self.model, SchedulerConfig(max_num_batched_tokens=_CHUNK), self.config)
        assert isinstance(cache, CrushKVCache), "a model with CrushAttention has a store"
        self.cache = cache
        self.num_heads = sum(layer.num_kv_heads for layer in self.model.layers)
        self._runner = ModelRunner(self.model, cache)
        self._rows = StoredRows(self.model, cache)

    def uniform(self, key: str, value: str) -> np.ndarray:
        """uint8 (N, 2): the same precisions for all heads."""
        return np.tile(np.array([[PRECISIONS.index(key), PRECISIONS.index(value)]], np.uint8), (self.num_heads, 1))

    @contextmanager
    def read(
        self,
        ids: np.ndarray,
        answer_tokens: int,
        policy: Policy,
        ends: set[int],
        answer: Answer | None = None,
        *,
        suffix: np.ndarray | None = None,
        head: int = 0,
        replay_prompt: ReplayPrompt = NO_REPLAY_PROMPT,
    ) -> Iterator[ReadPrompt]:
        """A prompt int64 (S,) while it is staged. policy: whose window of queries is captured and whose replay is run.

        answer: what to compare with, of another model; None = what this one's full cache answers. suffix: int64 (T,),
        what stands between the prompt and the answer and is in no cache that is compared. head: tokens at the prompt's
        front that always stay. replay_prompt: for a policy that reads the prompt twice.
        """
        eviction = _reading(policy, len(ids), head, replay_prompt)
        params = SamplingParams.from_config(
            ov_genai.GenerationConfig(max_new_tokens=1), ov_genai.GenerationConfig(), len(ids), len(ids) + 1,
            self.model.vocab_size, {},
        )  # fmt: skip
        sequence = Request(1, ids, params, eviction=eviction).sequences[0]
        if not self.cache.allocate(sequence) or not self.cache.kv_of(sequence).is_staged:
            self.cache.free(sequence)
            twice = " that are read twice" if eviction.policy.inputs.replay else ""
            raise CrushError(f"prompt must fit into the staging blocks, got {len(ids)} tokens{twice}")
        try:
            first = self._prefill(sequence)
            self._replay(sequence)
            yield ReadPrompt(self, sequence, first, answer_tokens, ends, answer, suffix)
        finally:
            self.cache.free(sequence)

    def _prefill(self, sequence: TokenSequence) -> int:
        while sequence.num_pending:
            count = min(_CHUNK, sequence.num_pending)
            logits = self._step(ScheduledTokens(sequence, count, count == sequence.num_pending))
        return int(logits[-1].argmax())

    def _replay(self, sequence: TokenSequence) -> None:
        """The second reading of a prompt, if its policy has one, as the engine's steps do it."""
        kv = self.cache.kv_of(sequence)
        while self.cache.replays_on(kv):
            assert kv.replay is not None
            reader = kv.replay.reader
            assert reader is not None
            row = ScheduledTokens(reader, min(reader.num_pending, ROWS, _CHUNK), False)
            self._step(row)
            self.cache.take_scores((row,), self._runner.attention_scores)

    def _step(self, row: ScheduledTokens) -> np.ndarray:
        self._runner.prepare(SchedulerOutput((row,), ()))
        logits = self._runner.infer()
        row.sequence.num_cached += row.num_tokens
        return logits

    def run(self, stored: Sequence[int], tokens: np.ndarray, position: int, skip: int = 0) -> list[np.ndarray]:
        """Logits float32 (T - skip, vocabulary), maybe views: the same T tokens behind each of B stored sequences.

        With recall one by one from `skip` on.
        """
        following = [Following(store_id, tokens, position, skip) for store_id in stored]
        return self._rows.logits(self.cache.store, following, one_by_one=self.config.recall_tokens is not None)


class ReadPrompt:
    """A prompt on staging blocks and the full cache's answer to it."""

    def __init__(
        self,
        meter: CacheMeter,
        sequence: TokenSequence,
        first: int,
        answer_tokens: int,
        ends: set[int],
        answer: Answer | None,
        suffix: np.ndarray | None,
    ) -> None:
        self._meter = meter
        self._kv = meter.cache.kv_of(sequence)
        asked = sequence.request.eviction
        assert asked is not None
        self._eviction = asked
        self._suffix = np.zeros(0, np.int64) if suffix is None else suffix
        self.num_tokens = sequence.num_cached
        self._view = CacheView(meter.cache.store, [(x.num_heads, x.num_kv_heads) for x in meter.model.layers])
        self.answer = answer or self._full_answer(first, answer_tokens, ends)
        self._reference = Reference(self.answer.log_probs)

    def _full_answer(self, first: int, answer_tokens: int, ends: set[int]) -> Answer:
        meter, store = self._meter, self._meter.cache.store
        full = meter.uniform(meter.model.recent_precision, meter.model.recent_precision)
        store_id = self._commit(CacheVariant(full))
        try:
            rows = self._answer(store_id, first, answer_tokens, ends)
            fork = store.fork(store_id)
            try:
                log_probs = log_softmax(self._logits([fork], rows)[0])
            finally:
                store.release(fork)
            return Answer(rows, log_probs)
        finally:
            store.release(store_id)

    def _answer(self, store_id: int, first: int, count: int, ends: set[int]) -> np.ndarray:
        store, suffix, begin = self._meter.cache.store, self._suffix, self.num_tokens + len(self._suffix)
        fork, answer = store.fork(store_id), [first]
        try:
            if len(suffix):
                answer = [int(self._meter.run([fork], suffix, self.num_tokens, len(suffix) - 1)[0][0].argmax())]
            while len(answer) < count and answer[-1] not in ends:
                row = self._meter.run([fork], np.array(answer[-1:]), begin + len(answer) - 1)
                answer.append(int(row[0][-1].argmax()))
        finally:
            store.release(fork)
        rows = [*suffix[-1:], *(token for token in answer if token not in ends)]
        return np.array(rows or answer[:1], np.int64)

    def _logits(self, stored: Sequence[int], rows: np.ndarray) -> list[np.ndarray]:
        """float32 (R, vocabulary), maybe views: what comes of `Answer.rows` behind each of B stored sequences."""
        before = self._suffix[:-1]
        return self._meter.run(stored, np.concatenate([before, rows]), self.num_tokens, len(before))

    def select(self, policy: Policy) -> list[np.ndarray]:
        """[N] int32: the tokens of each head that a policy keeps."""
        if not replace(self._eviction, policy=policy).wants(self.num_tokens, self.num_tokens, is_read=True):
            return [np.arange(self.num_tokens, dtype=np.int32)] * self._meter.num_heads
        return _by_head(self._choose(policy))

    def tiered(self, policy: Policy) -> CacheVariant:
        """The cache of a policy that gives tokens tiers."""
        choice = self._choose(policy)
        found = tiers_of(choice)
        return CacheVariant(found["precisions"], _by_head(choice), found["tiers"])

    def _choose(self, policy: Policy) -> Choice:
        blocks, length, tensors = self._kv.blocks.view, self.num_tokens, self._meter.cache.staging.tensors
        replay = self._kv.replay
        assert replay or not policy.inputs.replay, "a policy with a replay that the prompt was not read for"
        return self._view.choose(
            replace(self._eviction, policy=policy), self._kv.store_id, length, EvictionState(),
            lambda layer: tensors.read(layer, blocks, length), replay.scores if replay else None,
        )  # fmt: skip

    def measure(self, variants: Sequence[CacheVariant], num_rows: int | None = None) -> list[Measured]:
        """What each variant costs, in their order. num_rows: over so many rows, the first ones; None = all."""
        found: list[Measured] = []
        store, rows = self._meter.cache.store, self.answer.rows[:num_rows]
        at_once = max(1, _ROWS_AT_ONCE // (len(self._suffix) + len(rows)))
        for begin in range(0, len(variants), at_once):
            made: list[int] = []
            try:
                for variant in variants[begin : begin + at_once]:
                    made.append(self._commit(variant))
                sizes = [store.nbytes_of(store_id) for store_id in made]
                logits = self._logits(made, rows)
                found += [self._compared(of_one, size) for of_one, size in zip(logits, sizes, strict=True)]
            finally:
                for store_id in made:
                    store.release(store_id)
        return found

    def _compared(self, logits: np.ndarray, nbytes: int) -> Measured:
        found = self._reference.compare(logits)
        return Measured(found.kl, found.top1, nbytes)

    def _commit(self, variant: CacheVariant) -> int:
        store = self._meter.cache.store
        tiers: dict[str, Any] = (
            {} if variant.tiers is None else {"precisions": variant.precisions, "tiers": variant.tiers}
        )
        store_id = store.create(0, None if tiers else variant.precisions)
        try:
            store.attach_prefill(store_id, self._kv.blocks.view, self.num_tokens)
            if variant.kept is None:
                store.commit_prefill(store_id)
            else:
                offsets = np.concatenate([[0], np.cumsum([len(x) for x in variant.kept])]).astype(np.int64)
                store.commit_prefill(store_id, offsets, np.concatenate(variant.kept).astype(np.int32), **tiers)
        except BaseException:
            store.release(store_id)
            raise
        return store_id


def _reading(policy: Policy, length: int, head: int, replay_prompt: ReplayPrompt) -> EvictionSpec:
    """How a prompt is read: a second time for any budget that some of its tokens are chosen by."""
    if policy.inputs.replay:
        always = max(policy.sink_tokens + policy.recent_tokens, 1)
        policy = replace(policy, budget=Budget(kept_tokens=always, min_tokens=always))
    return EvictionSpec(policy, ((0, head),) if head else (), replay_prompt, length)


def _by_head(choice: Choice) -> list[np.ndarray]:
    return [choice.indices[a:b] for a, b in zip(choice.offsets[:-1], choice.offsets[1:], strict=True)]
