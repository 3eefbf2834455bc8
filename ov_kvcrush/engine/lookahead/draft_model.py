"""A draft model: a smaller one with the same vocabulary writes on, and the model checks what it wrote."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence as Items
from dataclasses import replace

import numpy as np

from ov_kvcrush.config import CacheConfig, SchedulerConfig
from ov_kvcrush.core.draft_metrics import ModelStep
from ov_kvcrush.core.request import Request, Sequence
from ov_kvcrush.core.step import ScheduledTokens, SchedulerOutput
from ov_kvcrush.engine.lookahead.guess import Guess
from ov_kvcrush.engine.model_runner import ModelRunner
from ov_kvcrush.engine.sampler import Sampled, sample_rows
from ov_kvcrush.kvcache.factory import make_kv_cache_manager
from ov_kvcrush.model.load import LoadedModel

_log = logging.getLogger(__name__)
_KIND = 6  # guesses of a draft model are believed as those of six tokens found again: 3/4


class DraftModel:
    """Guesses by a model of its own, with a cache of its own, in the thread of the engine's steps.

    It draws with the noise that the model will draw with at that position: so both draw the same token about as often
    as any rule of acceptance allows, and what is said stays what the model alone would have said (Daliri, Musco,
    Suresh, arXiv 2408.07978). A prompt is read a chunk at each step; until it is read nothing is guessed. Where the
    draft's cache has no room, or something of it breaks, nothing is guessed either.
    vocab_size: tokens of the model that checks.
    """

    is_free = False

    def __init__(self, model: LoadedModel, scheduler: SchedulerConfig, vocab_size: int) -> None:
        config = SchedulerConfig(max_num_batched_tokens=scheduler.max_num_batched_tokens)
        self._cache = make_kv_cache_manager(model, config, CacheConfig(attention=model.attention))
        self._runner = ModelRunner(model, self._cache)
        self._chunk = scheduler.max_num_batched_tokens
        self._vocab_size = min(vocab_size, model.vocab_size)
        self._lines: dict[Sequence, Sequence] = {}  # of the draft, by those of the model
        self._taken: list[ModelStep] = []

    def forget(self, sequence: Sequence) -> None:
        """Give back what is held for a sequence that ends, or that loses its memory."""
        line = self._lines.pop(sequence, None)
        if line is not None:
            self._cache.free(line)

    def taken(self) -> tuple[ModelStep, ...]:
        """Its steps since this was asked last."""
        steps, self._taken = tuple(self._taken), []
        return steps

    def guess(self, sequences: Items[Sequence], most: Items[int]) -> list[Guess | None]:
        """What may follow each, that many tokens at most; None: nothing is known, or nothing is wanted."""
        found: dict[Sequence, list[int]] = {}
        try:
            wanted = {s: count for s, count in zip(sequences, most, strict=True) if count and self._follow(s)}
            self._write(wanted, found)
        except Exception as error:  # it helps, and must not harm
            _log.warning("the draft model guesses nothing in this step: %r", error)
            for sequence in list(self._lines):
                self.forget(sequence)
            found.clear()
        return [Guess(tuple(found[s]), _KIND) if found.get(s) else None for s in sequences]

    def _follow(self, sequence: Sequence) -> bool:
        """Make the draft's tokens those of the sequence; False where there is no room for them."""
        ids = sequence.ids.view
        line = self._lines.get(sequence)
        if line is None:
            if ids.max() >= self._vocab_size:
                return False
            line = _line_of(sequence)
            if not self._cache.allocate(line):
                return False
            self._lines[sequence] = line
            return True
        own = line.ids.view
        length = min(len(own), len(ids))
        different = np.flatnonzero(own[:length] != ids[:length])
        same = min(int(different[0]) if len(different) else length, len(ids) - 1)
        line.ids.shorten(same)
        line.ids.extend(ids[same:])
        line.token_counts = None
        if line.num_cached > same:
            num_run, line.num_cached = line.num_cached - same + 1, same
            self._cache.settle(line, num_run, 1)
        return True

    def _write(self, wanted: dict[Sequence, int], found: dict[Sequence, list[int]]) -> None:
        """Step until all that is wanted is in `found`."""
        while True:
            going_on = [s for s, count in wanted.items() if len(found.get(s, ())) < count]
            rows, owners = [], []
            budget = self._chunk
            for sequence in going_on:
                line = self._lines[sequence]
                num_tokens = min(line.num_pending, budget)
                if not num_tokens or not self._cache.append_slots(line, num_tokens):
                    wanted[sequence] = 0
                    continue
                budget -= num_tokens
                rows.append(ScheduledTokens(line, num_tokens, num_tokens == line.num_pending))
                owners.append(sequence)
            if not rows:
                return
            start = time.perf_counter()
            step = SchedulerOutput(tuple(rows), ())
            self._runner.prepare(step)
            before = time.perf_counter()
            logits = self._runner.infer()
            inference_s = time.perf_counter() - before
            for row in rows:
                row.sequence.num_cached += row.num_tokens
            failed = {line for line, _ in self._cache.commit(rows, list)}
            drawing = [s for s, row in zip(owners, rows, strict=True) if row.samples and row.sequence not in failed]
            for sequence, row in zip(owners, rows, strict=True):
                if row.sequence in failed:
                    self.forget(sequence)
                if row.sequence in failed or not row.samples:  # the prompt is read on in the next step
                    wanted[sequence] = 0
            by_line = dict(zip((row.sequence for row in rows if row.samples), logits, strict=True))
            drawn = sample_rows([(self._lines[s], by_line[self._lines[s]]) for s in drawing])
            for sequence, token in zip(drawing, drawn, strict=True):
                self._take(sequence, token, wanted, found)
            self._taken.append(ModelStep(time.perf_counter() - start, inference_s, len(drawing)))

    def _take(
        self, sequence: Sequence, sampled: Sampled, wanted: dict[Sequence, int], found: dict[Sequence, list[int]]
    ) -> None:
        params = sequence.request.lookahead
        assert params is not None, "a guess for a request that wants none"
        is_sure = not params.confidence or math.exp(sampled.logprob) >= params.confidence
        if not 0 <= sampled.token < self._vocab_size or not is_sure:
            wanted[sequence] = 0
            return
        self._lines[sequence].ids.append(sampled.token)
        found.setdefault(sequence, []).append(sampled.token)
        if sampled.token in sequence.request.params.stop_token_ids:
            wanted[sequence] = 0


def _line_of(sequence: Sequence) -> Sequence:
    """The draft's own sequence with the same tokens, which draws as the other does."""
    request, ahead = sequence.request, sequence.request.lookahead
    logprobs = 1 if ahead and ahead.confidence else 0
    params = replace(request.params, stop_strings=(), logprobs=logprobs)
    line = Request(request.request_id, request.prompt_ids.copy(), params).root
    line.index = sequence.index
    line.ids.extend(sequence.generated)
    return line
