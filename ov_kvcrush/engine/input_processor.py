"""From what callers ask to a request that can run: everything wrong with it is refused here."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import replace

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.config import SchedulerConfig
from ov_kvcrush.core.cache_params import CacheParams, KVTarget
from ov_kvcrush.core.eviction import EvictionSpec, check_spans
from ov_kvcrush.core.lookahead_params import LookaheadParams
from ov_kvcrush.core.request import Request
from ov_kvcrush.core.request_options import DEFAULT_REQUEST_OPTIONS, RequestOptions
from ov_kvcrush.core.sampling_params import SamplingParams
from ov_kvcrush.core.snapshot import KVSnapshot
from ov_kvcrush.engine.grammar.compiler import GrammarCompiler
from ov_kvcrush.engine.grammar.masks import GrammarState
from ov_kvcrush.errors import RequestError
from ov_kvcrush.kvcache.manager import KVCacheManager
from ov_kvcrush.kvcache.planning import DefaultPlans
from ov_kvcrush.model.adapters import AdapterParams
from ov_kvcrush.model.load import LoadedModel
from ov_kvcrush.policies.base import Policy
from ov_kvcrush.policies.budgets.planned import planned
from ov_kvcrush.policies.keep_all import KeepAll
from ov_kvcrush.policies.plans.plan import CachePlan
from ov_kvcrush.policies.plans.planner import BytePlanner
from ov_kvcrush.policies.registry import name_of

Decode = Callable[[list[int]], str]  # token ids -> text, for stop strings


class InputProcessor:
    """Checks requests against one model and one cache.

    defaults: the model's generation config; its end-of-sequence tokens hold where a request names none. policy: of
    requests that name none. planner: for all requests with a policy; None = `default_plans` for those whose policy
    names no budget, for others the policy's own, and the cache's precisions. context_planner: likewise, of prompts
    whose question comes after compression. grammars: of structured output; None = it is refused. looks_ahead: whether
    tokens are guessed.
    """

    def __init__(
        self,
        model: LoadedModel,
        cache: KVCacheManager,
        config: SchedulerConfig,
        policy: Policy | None,
        defaults: ov_genai.GenerationConfig,
        decode: Decode,
        planner: BytePlanner | None,
        context_planner: BytePlanner | None,
        default_plans: DefaultPlans,
        grammars: GrammarCompiler | None = None,
        *,
        looks_ahead: bool = False,
    ) -> None:
        self._looks_ahead = looks_ahead
        self._grammars = grammars
        self._planner = planner
        self._context_planner = context_planner
        self._default_plans = default_plans
        self._model = model
        self._cache = cache
        self._config = config
        self._policy = policy
        self._defaults = defaults
        self._decode = decode

    def make_request(
        self,
        request_id: int,
        ids: np.ndarray,
        config: ov_genai.GenerationConfig,
        params: CacheParams,
        targets: Items[tuple[InputProcessor, KVTarget]],
        options: RequestOptions = DEFAULT_REQUEST_OPTIONS,
    ) -> Request:
        """A checked request. targets: of each of `params.fan_out`. Raises RequestError."""
        if (params.context or params.return_snapshot or params.prefill_only) and self._cache.snapshots is None:
            raise RequestError("context must not be asked for with attention='paged', got one; engine='crush' holds it")
        wanted = params.policy or self._policy
        plan = self.plan_for(wanted, np.size(ids), asks=not params.prefill_only, budget=params.budget)
        eviction = self._eviction(params, np.size(ids), plan)
        num_evicted = params.context.state.num_evicted if params.context else 0
        ids = self.check_prompt(ids, eviction, params.context)
        self._check_staged(params, ids)
        check_spans(params.spans[: len(params.protect)], len(ids))
        eviction = _checked(eviction, params, len(ids))
        room = self.max_tokens(eviction, num_evicted)
        vocab_size = self._model.vocab_size
        sampling = SamplingParams.from_config(config, self._defaults, len(ids), room, vocab_size, options.logit_bias)
        # What goes on from a context is not what its own policy would have left of the prompt.
        # What only reads a prompt leaves a snapshot, whose holder says how long it stays.
        keeps_kv = params.keep_kv or (self._config.enable_prefix_caching and not params.prefill_only)
        keep_kv = keeps_kv and params.context is None and not params.fan_out
        fan_out = self._fan_out(params, ids, targets)
        if sampling.num_sequences > self._config.max_num_seqs:
            field = "num_beams" if sampling.beam else "num_return_sequences"
            raise RequestError(
                f"{field} must be at most max_num_seqs={self._config.max_num_seqs}, got {sampling.num_sequences}"
            )
        ahead = LookaheadParams.from_config(config) if self._looks_ahead and not sampling.beam else None
        adapters = self._adapters(config, params.context)
        request = Request(
            request_id, ids, sampling, self._decode, keep_kv, eviction, params, fan_out, options, ahead, adapters
        )
        request.sequences[0].grammar = self._grammar(config, sampling, params.cache_salt)
        return request

    def _adapters(self, config: ov_genai.GenerationConfig, context: KVSnapshot | None) -> AdapterParams:
        """What the request asks for; one that goes on from a context has what that was read with."""
        if config.adapters is None and context is not None:
            return context.adapters
        chosen = self._model.adapters.choose(config.adapters)
        if context is not None and context.adapters.key != chosen.key:
            raise RequestError(
                f"adapters must be those that the context was read with, {context.adapters.key or 'none'}, "
                f"got {chosen.key or 'none'}"
            )
        return chosen

    def _grammar(self, config: ov_genai.GenerationConfig, sampling: SamplingParams, salt: str) -> GrammarState | None:
        """Where the answer begins in the grammar that it is to follow."""
        wanted = config.structured_output_config
        if wanted is None:
            return None
        if config.num_beams > 1:
            raise RequestError(f"num_beams must be 1 with structured_output_config, got {config.num_beams}")
        if self._grammars is None:
            raise RequestError("structured_output_config must be None for an engine without a tokenizer, got one")
        return self._grammars.compile(wanted, sampling.stop_token_ids, salt)

    def check_prompt(
        self, ids: np.ndarray, eviction: EvictionSpec | None = None, context: KVSnapshot | None = None
    ) -> np.ndarray:
        """The prompt as int64 (S,). Raises RequestError if this model or this cache cannot run it."""
        ids = np.asarray(ids)
        if ids.size == 0:
            raise RequestError("prompt must have at least one token, got an empty one")
        if not np.issubdtype(ids.dtype, np.integer):
            raise RequestError(f"prompt must be integer token ids, got {ids.dtype}")
        ids = ids.reshape(-1).astype(np.int64)
        outside = ids[(ids < 0) | (ids >= self._model.vocab_size)]
        if len(outside):
            raise RequestError(f"token ids must be in 0..{self._model.vocab_size - 1}, got {outside[0]}")
        limit = self._model.context_length
        if limit is not None and len(ids) >= limit:
            raise RequestError(
                f"prompt must be shorter than the model's context of {limit} tokens, got {len(ids)} tokens"
            )
        num_known = context.num_tokens if context else 0
        if len(ids) <= num_known:
            raise RequestError("prompt must have at least one token behind its context, got none")
        refusal = self._cache.refusal(len(ids), eviction, context.state.num_evicted if context else 0)
        if refusal:
            raise RequestError(refusal)
        limit = self._config.max_num_batched_tokens
        if not self._config.dynamic_split_fuse and len(ids) - num_known > limit:
            raise RequestError(
                f"prompt must have at most max_num_batched_tokens={limit} tokens with dynamic_split_fuse=False, "
                f"got {len(ids) - num_known}"
            )
        return ids

    def max_tokens(self, eviction: EvictionSpec | None, num_evicted: int = 0) -> int:
        """Tokens that prompt and answer of one sequence may have, by the model's context and by the cache's memory."""
        capacity = self._cache.capacity_tokens(eviction, num_evicted)
        return min(capacity, self._model.context_length or capacity)

    def plan_for(
        self, policy: Policy | None, num_tokens: int, *, asks: bool, budget: float | None = None
    ) -> CachePlan | None:
        """The plan of a prompt; None where none was asked for, and where a request wants no policy.

        asks: whether the prompt ends with its question. What reads a prompt twice does not choose by that.
        budget: in the place of the planner's. Raises RequestError for one without a policy that can meet it.
        """
        is_known = asks and not (policy is not None and policy.inputs.replay)
        if budget is not None:
            return self._default_plans.plan_within(budget, policy, num_tokens, "known" if is_known else "unknown")
        if policy is None or isinstance(policy, KeepAll):
            return None
        planner = self._planner if is_known else self._context_planner
        if planner is not None:
            return planner.plan(num_tokens)
        return self._default_plans.plan(policy, num_tokens, "known" if is_known else "unknown")

    def _eviction(self, params: CacheParams, num_tokens: int, plan: CachePlan | None) -> EvictionSpec | None:
        """What a request with a prompt of `num_tokens` asks for, or the engine was told; None if all stays as it is."""
        policy = params.policy or self._policy
        if plan and policy:
            policy = planned(policy, plan)
        if policy is None or not (policy.evicts or plan):
            return None
        if self._cache.snapshots is None:
            raise RequestError(f"policy must be 'none' with attention='paged', got {name_of(policy)!r}")
        protect = params.spans[: len(params.protect)]
        context = params.context
        if context is None:
            return EvictionSpec(policy, protect, params.replay_prompt, num_tokens, plan=plan)
        begun = context.num_kept - context.base_kept
        return EvictionSpec(
            policy, protect, params.replay_prompt, num_tokens, context.base, context.base_kept, begun, plan
        )

    def _check_staged(self, params: CacheParams, ids: np.ndarray) -> None:
        """Raise RequestError for a prompt that cannot stay staged, or does not go on from the staged one."""
        if params.return_staged:
            if not params.prefill_only or params.fan_out or params.context is not None or params.staged is not None:
                raise RequestError("return_staged must be of a prompt that is only read, got one for something else")
            self._check_fits(ids)
        if params.staged is not None:
            if not params.fan_out:
                raise RequestError("staged must be the start of a prompt with a fan_out, got one without")
            if not params.staged.begins(ids):
                raise RequestError("prompt must begin with the staged tokens and go on, got others")

    def _check_fits(self, ids: np.ndarray) -> None:
        if len(ids) > self._cache.staged_tokens:
            raise RequestError(
                f"prompt must fit into the staging blocks of {self._cache.staged_tokens} tokens to be read once for "
                f"several policies, got {len(ids)} tokens; raise staging_bytes"
            )

    def _fan_out(
        self, params: CacheParams, ids: np.ndarray, targets: Items[tuple[InputProcessor, KVTarget]]
    ) -> tuple[tuple[EvictionSpec | None, KVTarget], ...]:
        """The eviction and the target of each cache that is made from one prefill."""
        if not params.fan_out:
            return ()
        if not params.prefill_only or params.context is not None:
            raise RequestError("fan_out must be of a prompt that is only read, got a request for an answer")
        self._check_fits(ids)
        found = []
        for asked, (processor, target) in zip(params.fan_out, targets, strict=True):
            plan = processor.plan_for(asked.policy, len(ids), asks=asked.asks)
            eviction = self._eviction(replace(params, policy=asked.policy), len(ids), plan)
            checked = _checked(eviction, params, len(ids))
            processor.check_prompt(ids, eviction)
            found.append((checked, target))
        replays = {x.policy.inputs.replay for x, _ in found if x and x.policy.inputs.replay}
        if len(replays) > 1:
            raise RequestError(f"policies must agree on how a text is read again, got {', '.join(map(str, replays))}")
        return tuple(found)


def _checked(eviction: EvictionSpec | None, params: CacheParams, num_tokens: int) -> EvictionSpec | None:
    """With the system prompt, which stays; it is not held against the budget that the caller chose."""
    if eviction is None:
        return None
    eviction.check(num_tokens)
    return replace(eviction, spans=params.spans)
