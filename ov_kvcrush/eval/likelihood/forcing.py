"""Teacher forcing: an engine whose answers are given, and how likely the model finds them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.config import CacheConfig, SchedulerConfig
from ov_kvcrush.core.cache_params import CacheParams
from ov_kvcrush.core.snapshot import KVSnapshot
from ov_kvcrush.core.step import SchedulerOutput
from ov_kvcrush.core.streamed_request import Status
from ov_kvcrush.engine.draw import log_softmax_at
from ov_kvcrush.engine.engine import Engine
from ov_kvcrush.engine.handle import GenerationHandle
from ov_kvcrush.engine.input_processor import Decode
from ov_kvcrush.engine.output_processor import OutputProcessor
from ov_kvcrush.engine.sampler import Sampled
from ov_kvcrush.engine.token_rounds import Row
from ov_kvcrush.errors import OutOfMemory
from ov_kvcrush.model.load import LoadedModel

Prompt = tuple[np.ndarray, ov_genai.GenerationConfig, CacheParams]  # token ids int64 (S,)
Observe = Callable[[np.ndarray], None]  # told the logits float32 (vocabulary,) of each forced token
Advance = Callable[[int], None]  # told the rows of each step


@dataclass(frozen=True)
class Score:
    """logprob: of all tokens of a continuation, in nats. is_greedy: each of them was the most likely one.

    kept_tokens: tokens that a head holds at the end, on average. kv_bytes: of the request's whole cache then.
    """

    logprob: float
    is_greedy: bool
    kept_tokens: int = 0
    kv_bytes: int = 0


@dataclass
class _ForcedAnswer:
    """The tokens of an answer, int64 (N,), and how likely those so far were."""

    ids: np.ndarray
    observe: Observe | None = None
    logprobs: list[float] = field(default_factory=list)
    is_greedy: bool = True

    def note(self, row: np.ndarray, index: int) -> int:
        """Take the logits of token `index`, and return that token."""
        token = int(self.ids[index])
        self.logprobs.append(log_softmax_at(row, token))
        self.is_greedy &= int(row.argmax()) == token
        if self.observe:
            self.observe(row)
        return token


class _ForcedOutput(OutputProcessor):
    """Where an answer is given, its next token is the one that is chosen."""

    answers: dict[int, _ForcedAnswer]  # by request id
    advance: Advance | None = None

    def process(self, step: SchedulerOutput, logits: np.ndarray) -> float:
        if self.advance:
            self.advance(step.num_tokens)
        return super().process(step, logits)

    def _sample(self, rows: list[Row]) -> list[Sampled | Exception]:
        answers = [self.answers.get(sequence.request.request_id) for sequence, _ in rows]
        free = iter(super()._sample([one for one, answer in zip(rows, answers, strict=True) if answer is None]))
        return [
            next(free) if answer is None else Sampled(answer.note(row, sequence.num_generated))
            for (sequence, row), answer in zip(rows, answers, strict=True)
        ]


class ForcedEngine(Engine):
    """An engine whose answers can be given. Batches, chunks, policies and preemption are those of Engine."""

    def __init__(
        self,
        model: LoadedModel,
        config: SchedulerConfig,
        defaults: ov_genai.GenerationConfig,
        decode: Decode,
        cache_config: CacheConfig,
    ) -> None:
        super().__init__(model, config, defaults, decode, cache_config)
        self._forced = _ForcedOutput(self.scheduler, self.cache, self.requests, self._add_lock, self.snapshots.own)
        self._forced.answers = {}
        self._output = self._forced
        self._request_ids = itertools.count(1 << 61)

    @classmethod
    def on_model_of(cls, engine: Engine, cache_config: CacheConfig) -> ForcedEngine:
        """One on the compiled model of another engine, with a cache of its own."""
        return cls(engine._model, engine._config, engine._defaults, engine._decode, cache_config)

    def read(self, prompts: Iterable[np.ndarray]) -> list[KVSnapshot]:
        """The KV of each prompt as the policy leaves it; the caller releases it. Raises OutOfMemory."""
        config = ov_genai.GenerationConfig(max_new_tokens=1)
        params = CacheParams(prefill_only=True)
        prompts = list(prompts)
        found = [handle.snapshot for handle in self._run_all([(ids, config, params) for ids in prompts])]
        made = [snapshot for snapshot in found if snapshot is not None]
        if len(made) < len(prompts) or any(kv.num_tokens < len(ids) for kv, ids in zip(made, prompts, strict=True)):
            for snapshot in made:
                snapshot.release()
            raise OutOfMemory(f"KV cache must hold a context, got one of up to {max(map(len, prompts))} tokens")
        return made

    def force(
        self,
        prompts: Iterable[tuple[np.ndarray, np.ndarray, CacheParams]],
        observe: Observe | None = None,
        advance: Advance | None = None,
    ) -> list[Score]:
        """How likely each continuation is after its prompt: int64 (P,), (N,) with N > 0. Raises OutOfMemory.

        observe: told the logits of every token of the continuations, in the order in which they are decoded.
        """
        prompts = list(prompts)
        items = [
            (ids, ov_genai.GenerationConfig(max_new_tokens=len(answer), ignore_eos=True), params)
            for ids, answer, params in prompts
        ]
        forced = [_ForcedAnswer(answer, observe) for _, answer, _ in prompts]
        self._forced.advance = advance
        try:
            stats = [handle.get_stats() for handle in self._run_all(items, forced)]
        finally:
            self._forced.answers.clear()
            self._forced.advance = None
        for (ids, answer, _), done in zip(prompts, forced, strict=True):
            if len(done.logprobs) < len(answer):
                raise OutOfMemory(f"KV cache must hold {len(ids)} tokens and {len(answer)} more; raise max_bytes")
        return [
            Score(float(np.sum(done.logprobs)), done.is_greedy, used.kept_tokens or 0, used.kv_bytes)
            for done, used in zip(forced, stats, strict=True)
        ]

    def write(self, prompts: Iterable[Prompt]) -> list[GenerationHandle]:
        """The model's own answers to prompts, all in one batch: handles of requests that have ended."""
        return self._run_all(list(prompts))

    def _run_all(self, items: list[Prompt], forced: Sequence[_ForcedAnswer] = ()) -> list[GenerationHandle]:
        handles = []
        try:
            for index, (ids, config, params) in enumerate(items):
                request_id = next(self._request_ids)
                if forced:
                    self._forced.answers[request_id] = forced[index]
                handles.append(self.add(request_id, ids, config, params))
            while any(handle.get_status() == Status.RUNNING for handle in handles):
                self.step()
        except BaseException:
            for handle in handles:
                handle.cancel()
            self.process_aborts()
            for handle in handles:
                if handle.snapshot is not None:
                    handle.snapshot.release()
            raise
        return handles
