"""What LLMPipeline and ContinuousBatchingPipeline share: a loaded model, its tokenizer, an engine, and its contexts."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.config import CacheConfig, SchedulerConfig, check_engine
from ov_kvcrush.contexts.context import Context, Progress
from ov_kvcrush.core.cache_params import CacheParams, Span
from ov_kvcrush.core.outputs import GenerationOutput, KeptTokens, PipelineMetrics, StepSeconds
from ov_kvcrush.core.perf_metrics import PerfMetrics
from ov_kvcrush.core.sampling_params import make_generation_config
from ov_kvcrush.core.staged_prompt import StagedPrompt
from ov_kvcrush.errors import RequestError
from ov_kvcrush.model.adapters import Adapter, check_own
from ov_kvcrush.model.source import ModelText
from ov_kvcrush.pipelines.arguments import adapters_of, lookahead_of, model_properties, with_stock_eviction
from ov_kvcrush.pipelines.backend import Backend, Handle
from ov_kvcrush.pipelines.compress import ContextCompressor
from ov_kvcrush.pipelines.loading import find_model, load_generation_config, load_tokenizer, make_backend, with_cache
from ov_kvcrush.pipelines.request_loop import RequestLoop
from ov_kvcrush.policies.base import Policy
from ov_kvcrush.policies.keep_all import KeepAll
from ov_kvcrush.policies.registry import PolicyLike, as_policy
from ov_kvcrush.prompts import spans
from ov_kvcrush.prompts.context import ContextEncoder, ContextText
from ov_kvcrush.prompts.encoder import PromptEncoder
from ov_kvcrush.prompts.system import SystemFinder

AnyPipeline = TypeVar("AnyPipeline", bound="PipelineBase")
Method = TypeVar("Method", bound=Callable[..., Any])


def visiting(method: Method) -> Method:
    """A method whose caller is in native code at times: the end of the process waits for it (`EngineThread.visit`)."""

    @functools.wraps(method)
    def visit(self: PipelineBase, *args: Any, **kwargs: Any) -> Any:
        with self._backend.thread.visit():
            return method(self, *args, **kwargs)

    return cast(Method, visit)


class PipelineBase:
    """A loaded model, its tokenizer, and an engine that runs requests on it."""

    _default_scheduler_config = SchedulerConfig()

    def __init__(
        self,
        models_path: str | Path | ModelText | None,
        device: str,
        scheduler_config: Any,
        engine: str | None,
        properties: dict[str, Any],
        tokenizer: ov_genai.Tokenizer | None,
        tokenizer_properties: dict[str, Any] | None = None,
        cache_config: Any = None,
        generation_config: ov_genai.GenerationConfig | None = None,
    ) -> None:
        start = time.perf_counter()
        self._engine_name = check_engine(engine, device)
        properties, scheduler_config = model_properties(properties, scheduler_config)
        properties, self._adapters = adapters_of(properties, self._engine_name)
        properties, prompt_lookup, draft = lookahead_of(properties, self._engine_name)
        if scheduler_config is None and self._engine_name == "crush":
            scheduler_config = self._default_scheduler_config
        if self._engine_name == "crush":
            cache_config = with_stock_eviction(scheduler_config, cache_config)
        self._source = source = find_model(models_path, own_tokenizer=tokenizer is not None)
        self._has_own_tokenizer = tokenizer is not None
        if tokenizer is None:
            assert not isinstance(source, ModelText), "a text comes with its tokenizer"
            tokenizer = load_tokenizer(source, tokenizer_properties or {})
        self._tokenizer = tokenizer
        self._config = self._model_config = load_generation_config(source, tokenizer, generation_config)
        self._encoder = PromptEncoder(self._tokenizer)
        self._context_encoder = ContextEncoder(self._encoder, self._tokenizer)
        self._system = SystemFinder(self._encoder, self._tokenizer)
        backend = make_backend(
            self._engine_name,
            source,
            device,
            scheduler_config,
            cache_config,
            properties,
            self._tokenizer,
            self._config,
            self._has_own_tokenizer,
            prompt_lookup,
            draft,
            self._adapters,
        )
        self._load_s = time.perf_counter() - start
        self._begin(backend, cache_config)

    def _begin(self, backend: Backend, cache_config: Any) -> None:
        """All that belongs to one engine, and not to the model and its tokenizer."""
        self._backend = backend
        config = CacheConfig.from_options(cache_config)
        # For what must stay, such as a system prompt, it matters only that tokens may go.
        self._policy = config.eviction_policy or (as_policy("kvcrush") if config.is_planned else None)
        self._loop = RequestLoop(backend, self._tokenizer)
        self._compressor = ContextCompressor(
            backend,
            self._loop,
            self._context_encoder,
            self._system,
            self._tokenizer,
            self._source,
            self._has_own_tokenizer,
        )

    def with_cache(self: AnyPipeline, cache_config: Any = None) -> AnyPipeline:
        """A second pipeline on the same loaded model, with a store of its own, in other precisions perhaps.

        cache_config: CacheConfig, or a dict with its fields, as for a pipeline alone; nothing of it is taken over from
        this one. Model, tokenizer, scheduler config and staging blocks are shared: `staging_bytes` must be left out,
        and the steps of the two take turns, whichever threads run them. Each store has a limit of its own: with the
        defaults of both they may grow to more than there is, so give `max_bytes` where both will be filled.
        `compress_ids` of either puts what it prefills into the store of either.
        Raises CrushError with engine="genai" or attention="paged", which have no store.
        """
        made = copy.copy(self)
        made._begin(with_cache(self._backend, cache_config), cache_config)
        return made

    def beside(self: AnyPipeline, cache_config: Any = None) -> AnyPipeline:
        """The same as `with_cache`, by its first name."""
        return self.with_cache(cache_config)

    @property
    def engine(self) -> str:
        """Name of the engine that runs: "crush" or "genai"."""
        return self._engine_name

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The LoRA adapters that it was made with."""
        return self._adapters.adapters

    @property
    def context_owner(self) -> ContextCompressor:
        """What makes and keeps the contexts of this pipeline."""
        return self._compressor

    def get_tokenizer(self) -> ov_genai.Tokenizer:
        """The tokenizer that prompts go through."""
        return self._tokenizer

    def get_metrics(self) -> PipelineMetrics:
        """Requests, cache usage and bytes after the last step."""
        return self._backend.metrics()

    def get_last_step(self) -> StepSeconds:
        """What the last step took; zeros with engine="genai", which does not tell."""
        return self._backend.last_step()

    @visiting
    def compress(
        self,
        text: Any,
        *,
        policy: PolicyLike = None,
        kept: float | None = None,
        protect: spans.Protect = (),
        progress: Progress | None = None,
        budget: float | str | None = None,
        cache_salt: str = "",
        adapters: ov_genai.AdapterConfig | None = None,
    ) -> Context:
        """Read a text or a conversation once and compress it, to be asked often: `generate(question, context=...)`.

        text: a str, which questions follow in the same message; or a ChatHistory or a list of messages.
        policy: what stays, as CacheConfig.policy; None = KVzip, which reads the text twice. "none" keeps all.
        kept: the fraction that stays, where policy is a name or None. None = what the policy says; where that says
            nothing, a plan of a sixth of the bf16 cache's bytes: so many tokens of each KV head, at such precisions, as
            the model's profile finds to lose least, or one setting for all of them without a profile. In the precisions
            that a pipeline names, 0.25.
        protect: passages of the text, or spans (begin, end) of its tokens, that stay.
        progress: called with the number of tokens that were read and that of all; both readings count.
        budget: its bytes over those of a bf16 cache, as CacheConfig.budget, in the place of the pipeline's.
        cache_salt: cached prefixes and contexts serve only texts of the same salt.
        adapters: LoRA that the text is read with, and questions about it, too; None = the pipeline's.
        The same text with the same policy shares the bytes of a context that there is already.
        Raises RequestError for a text that cannot be run, OutOfMemory where the store has no room.
        """
        return self._compressor.compress(text, policy, kept, protect, progress, budget, cache_salt, adapters)

    @visiting
    def compress_ids(
        self,
        ids: np.ndarray,
        policies: Sequence[Policy],
        *,
        pipelines: Sequence[PipelineBase] | None = None,
        head: int = 0,
        progress: Progress | None = None,
        staged: StagedPrompt | None = None,
        asks: bool = False,
    ) -> list[Context]:
        """Contexts of the same tokens int64 (S,), prefilled once: one of each policy. Questions are token ids, too.

        For comparing policies: the prompt's full cache is computed once, and read a second time once if a policy wants
        that. pipelines: for each policy the one whose context it makes, this one or one made by `with_cache`; None =
        this one for all. Every context is what its pipeline would have made alone; policies that are equal choose once
        for all precisions. head: tokens at the front that stay in any case. staged: what `stage_ids` made of the first
        tokens, which are not read again. asks: whether the tokens end with their question.
        Raises as `compress`, and RequestError where policies want different second readings, for a text longer than the
        staging blocks, and for a pipeline on another model. OutOfMemory where one store has no room: then nothing is
        left in any.
        """
        if not policies:
            raise RequestError("policies must have at least one, got none")
        chosen = [self] * len(policies) if pipelines is None else list(pipelines)
        if len(chosen) != len(policies):
            raise RequestError(f"pipelines must be one for each of {len(policies)} policies, got {len(chosen)}")
        for pipeline in chosen:
            if not isinstance(pipeline, PipelineBase):
                raise RequestError(f"pipelines must be pipelines, got {type(pipeline).__name__}")
        targets = [pipeline._compressor for pipeline in chosen]
        return self._compressor.compress_ids(ids, policies, targets, head, progress, staged, asks)

    def stage_ids(self, ids: np.ndarray, progress: Progress | None = None) -> AbstractContextManager[StagedPrompt]:
        """Tokens int64 (S,) read once, which stay as they were computed while the context is open.

        For many prompts that begin alike: `compress_ids` of longer ones on this pipeline reads what follows only, and
        makes what it would have made of the whole. Raises as `compress_ids`.
        """
        return self._compressor.stage_ids(ids, progress)

    @visiting
    def answer_each(
        self, asked: Sequence[tuple[Context, np.ndarray]], config: ov_genai.GenerationConfig | None = None
    ) -> list[str]:
        """Answers to questions about contexts, different ones even, all in one batch.

        asked: a context and the token ids int64 (T,) of a question that follows it. Policies choose nothing more.
        """
        return [text for text, _ in self.answer_each_with_ids(asked, config)]

    @visiting
    def answer_each_with_ids(
        self, asked: Sequence[tuple[Context, np.ndarray]], config: ov_genai.GenerationConfig | None = None
    ) -> list[tuple[str, list[int]]]:
        """What `answer_each` returns, and the tokens of each answer, the one that ended it included."""
        rows = [np.concatenate([context.ids, ids]) for context, ids in asked]
        params = [CacheParams(KeepAll(), context=context.snapshot_for(self._compressor)) for context, _ in asked]
        metrics = self._new_metrics()
        handles = self._loop.run(rows, [self._options(config, {})] * len(rows), None, metrics, params)
        outputs = [handle.outputs()[0] for handle in handles]
        return [(self._text(output, metrics), list(output.generated_ids)) for output in outputs]

    def bf16_kv_bytes(self, num_tokens: int) -> int:
        """Bytes of a bf16 cache of so many tokens, nothing evicted; 0 with engine="genai", which does not tell."""
        return self._backend.bf16_kv_bytes(num_tokens)

    def stop(self, thread: int | None = None) -> None:
        """End a running `generate` after its step; it returns what there is. For other threads or signal handlers.

        thread: identifier of the thread that it runs in; None = this one, or else the only one that has a call running.
        Raises RequestError where it could be one of several: nobody ends another's call by accident.
        """
        self._loop.stop(thread)

    def _options(self, config: ov_genai.GenerationConfig | None, options: dict[str, Any]) -> ov_genai.GenerationConfig:
        asked = options.get("adapters")
        if self._engine_name == "crush" and asked is not None:
            check_own(asked)  # here its adapters have names: a GenerationConfig forgets them
            self._adapters.choose(asked)
        return make_generation_config(config or self._config, options)

    def _resolve(self, params: CacheParams, ids: np.ndarray) -> CacheParams:
        return spans.resolve(params, ids, self._tokenizer)

    def _system_span(
        self, content: ContextText, ids: np.ndarray, policy: Policy | None, metrics: PerfMetrics
    ) -> Span | None:
        """The system prompt's tokens, looked for only where something can be evicted."""
        chosen = policy or self._policy
        return self._system.span(content, ids, metrics) if chosen is not None and chosen.evicts else None

    def _text(self, output: GenerationOutput, metrics: PerfMetrics) -> str:
        if output.text is not None:
            return output.text
        start = time.perf_counter()
        text: str = self._tokenizer.decode(output.generated_ids) if output.generated_ids else ""
        metrics.detokenization_s.append(time.perf_counter() - start)
        return text

    def _new_metrics(self) -> PerfMetrics:
        return PerfMetrics(load_time_s=self._load_s)


def kept_tokens(handle: Handle, ids: np.ndarray) -> KeptTokens | None:
    """What policies left of a request with the prompt `ids`; None if no policy chose."""
    positions = handle.kept_positions
    return None if positions is None else KeptTokens(ids, positions, handle.representative_positions)


def parsed(text: str, config: ov_genai.GenerationConfig) -> list[dict[str, Any]]:
    """The message that the config's parsers make of an answer; none where there are no parsers."""
    if not config.parsers:
        return []
    message = {"content": text}
    for parser in config.parsers:
        parser.parse(message)
    return [message]
