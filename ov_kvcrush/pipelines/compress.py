"""Contexts of one pipeline: compressed, extended, saved and loaded."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.config import parse_budget
from ov_kvcrush.contexts import saving
from ov_kvcrush.contexts.context import Context, Progress, context_policy
from ov_kvcrush.core.cache_params import CacheParams, FanOut
from ov_kvcrush.core.eviction import NO_REPLAY_PROMPT, ReplayPrompt
from ov_kvcrush.core.perf_metrics import PerfMetrics
from ov_kvcrush.core.staged_prompt import StagedPrompt
from ov_kvcrush.errors import RequestError
from ov_kvcrush.model.adapters import check_own
from ov_kvcrush.model.source import ModelSource
from ov_kvcrush.pipelines.backend import Backend
from ov_kvcrush.pipelines.request_loop import RequestLoop
from ov_kvcrush.policies.base import Policy
from ov_kvcrush.policies.keep_all import KeepAll
from ov_kvcrush.policies.registry import PolicyLike
from ov_kvcrush.prompts import spans
from ov_kvcrush.prompts.context import ContextEncoder, ContextText
from ov_kvcrush.prompts.system import SystemFinder


class ContextCompressor:
    """The owner of contexts: it knows how texts become tokens, how tokens are prefilled, and what a file must match.

    source: the model's. own_tokenizer: whether the tokenizer is not that of its folder.
    """

    def __init__(
        self,
        backend: Backend,
        loop: RequestLoop,
        encoder: ContextEncoder,
        system: SystemFinder,
        tokenizer: ov_genai.Tokenizer,
        source: ModelSource,
        own_tokenizer: bool,
    ) -> None:
        self.backend = backend
        self._loop = loop
        self._encoder = encoder
        self._tokenizer = tokenizer
        self._system = system
        self._source = source
        self._own_tokenizer = own_tokenizer
        self._replay_prompt: ReplayPrompt | None = None
        self._compressed: weakref.WeakValueDictionary[tuple[Any, ...], Context] = weakref.WeakValueDictionary()

    def compress(
        self,
        text: Any,
        policy: PolicyLike,
        kept: float | None,
        protect: Any,
        progress: Progress | None,
        budget: float | str | None = None,
        cache_salt: str = "",
        adapters: ov_genai.AdapterConfig | None = None,
    ) -> Context:
        """See PipelineBase.compress."""
        if budget is not None and kept is not None:
            raise RequestError(f"kept must be left out with budget, which says how much stays, got {kept}")
        check_own(adapters)
        metrics = PerfMetrics()
        chosen = context_policy(policy, kept)
        content, ids, head = self._encoder.open(text, metrics)
        system = (0, head) if head else None
        if content.messages and not content.is_open and chosen.evicts:
            system = self._system.span(content, ids, metrics, answers=False)
        asked = CacheParams(
            chosen,
            spans.check_protect(protect),
            system,
            replay_prompt=self._replay_prompt_for(chosen),
            prefill_only=True,
            budget=None if budget is None else parse_budget(budget),
            cache_salt=cache_salt,
        )
        params = spans.resolve(asked, ids, self._tokenizer)
        key = (ids.tobytes(), chosen, params.protect, params.system, params.budget, cache_salt, _key_of(adapters))
        known = self._compressed.get(key)
        if known is not None and known.is_open and known.content == content:
            return known.fork()
        start = time.perf_counter()
        handle = self._loop.prefill(ids, params, progress, adapters)
        assert handle.snapshot is not None
        seconds = time.perf_counter() - start
        context = Context(self, ids, content, handle.snapshot.as_base(), chosen if chosen.evicts else None, seconds)
        self._compressed[key] = context
        return context

    @contextmanager
    def stage_ids(self, ids: np.ndarray, progress: Progress | None) -> Iterator[StagedPrompt]:
        """See PipelineBase.stage_ids."""
        staged = self._loop.prefill(ids, CacheParams(KeepAll(), prefill_only=True, return_staged=True), progress).staged
        assert staged is not None
        try:
            yield staged
        finally:
            self.backend.thread.call(staged.release)

    def compress_ids(
        self,
        ids: np.ndarray,
        policies: Sequence[Policy],
        targets: Sequence[ContextCompressor],
        head: int,
        progress: Progress | None,
        staged: StagedPrompt | None = None,
        asks: bool = False,
    ) -> list[Context]:
        """See PipelineBase.compress_ids. targets: who owns the context of each policy."""
        prompts = (prompt for policy in policies if (prompt := self._replay_prompt_for(policy)) is not NO_REPLAY_PROMPT)
        params = CacheParams(
            KeepAll(),
            system=(0, head) if head else None,
            replay_prompt=next(prompts, NO_REPLAY_PROMPT),
            prefill_only=True,
            fan_out=tuple(
                FanOut(p, t.backend, asks)  # type: ignore[arg-type]
                for p, t in zip(policies, targets, strict=True)
            ),
            staged=staged,
        )
        handle = self._loop.prefill(ids, params, progress)
        content = ContextText(self._tokenizer.decode(ids.tolist()))
        return [
            Context(target, ids, content, snapshot.as_base(), policy if policy.evicts else None)
            for target, snapshot, policy in zip(targets, handle.fan_out_snapshots, policies, strict=True)
        ]

    def extend(self, context: Context, text: str, policy: Policy | None, progress: Progress | None) -> Context:
        """A context and more text behind it, which `policy` chooses from; None = all of it stays."""
        content, more = self._encoder.more(context.content, text, PerfMetrics())
        ids = np.concatenate([context.ids, more])
        base = context.snapshot_for(self)
        handle = self._loop.prefill(ids, CacheParams(policy or KeepAll(), context=base, prefill_only=True), progress)
        made = handle.snapshot
        assert made is not None
        parts = {**context.nbytes_by_part, made.store_id: made.nbytes_beside(base)}
        return Context(self, ids, content, made.as_base(), context.chosen_by, parts=parts)

    def save(self, context: Context, path: str | os.PathLike[str]) -> None:
        """See Context.save."""
        snapshot = context.snapshot_for(self)
        saving.save(path, snapshot, context.ids, context.content, context.chosen_by, context.seconds, self._made_with())

    def load(self, path: str | os.PathLike[str]) -> Context:
        """See Context.load."""
        found = saving.load(path, self._made_with(), self.backend.load_snapshot, self.backend.adapters_of)
        return Context(self, found.ids, found.content, found.snapshot, found.policy, found.seconds)

    def kv_heads(self) -> list[int]:
        """KV heads of each layer."""
        return self.backend.kv_heads()

    def _made_with(self) -> dict[str, str]:
        own_tokenizer = self._tokenizer if self._own_tokenizer else None
        return saving.made_with(self._source, own_tokenizer, self.backend.storage())

    def _replay_prompt_for(self, policy: Policy) -> ReplayPrompt:
        if not policy.inputs.replay:
            return NO_REPLAY_PROMPT
        if self._replay_prompt is None:
            self._replay_prompt = self._encoder.replay_prompt(PerfMetrics())
        return self._replay_prompt


def _key_of(adapters: ov_genai.AdapterConfig | None) -> Any:
    """What tells texts that were read with other adapters apart."""
    return None if adapters is None else tuple((x.digest, alpha) for x, alpha in adapters.get_adapters_and_alphas())
