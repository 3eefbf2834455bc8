"""What LLMPipeline and ContinuousBatchingPipeline share: loading, running requests to their end, streaming, results."""

from __future__ import annotations

import copy
import itertools
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.config import CacheConfig, SchedulerConfig, check_engine
from ov_kvcrush.contexts.context import Context, context_policy
from ov_kvcrush.core.outputs import GenerationOutput, PerfMetrics, PipelineMetrics, StepSeconds
from ov_kvcrush.core.sampling_params import make_generation_config
from ov_kvcrush.errors import ModelError, OutOfMemory, RequestError, reason_of
from ov_kvcrush.model.folder import check_model_folder
from ov_kvcrush.pipelines.backend import NO_REPLAY_PROMPT, Backend, CacheParams, FanOut, Handle, ReplayPrompt
from ov_kvcrush.pipelines.beside import backend_beside, others_for
from ov_kvcrush.pipelines.streaming import Streamer, make_sink, pump
from ov_kvcrush.policies.base import Policy
from ov_kvcrush.policies.keep_all import KeepAll
from ov_kvcrush.policies.registry import PolicyLike
from ov_kvcrush.prompts.context import ContextEncoder, ContextText
from ov_kvcrush.prompts.encoder import PromptEncoder
from ov_kvcrush.prompts.spans import CacheWish, Protect

if TYPE_CHECKING:
    from ov_kvcrush.core.snapshot import KVSnapshot

Progress = Callable[[int, int], None]  # tokens that were read, and all
AnyPipeline = TypeVar("AnyPipeline", bound="PipelineBase")


class PipelineBase:
    """A loaded model, its tokenizer, and an engine that runs requests on it."""

    def __init__(
        self,
        models_path: str | Path | None,
        device: str,
        scheduler_config: Any,
        engine: str | None,
        properties: dict[str, Any],
        tokenizer: ov_genai.Tokenizer | None,
        tokenizer_properties: dict[str, Any] | None = None,
        cache_config: Any = None,
    ) -> None:
        start = time.perf_counter()
        self._engine_name = check_engine(engine, device)
        folder = Path(models_path) if models_path is not None else _default_model()
        check_model_folder(folder, tokenizer=tokenizer is None)
        self._folder = folder
        self._has_own_tokenizer = tokenizer is not None
        self._tokenizer = tokenizer or load_tokenizer(folder, tokenizer_properties or {})
        self._config = load_generation_config(folder, self._tokenizer)
        self._encoder = PromptEncoder(self._tokenizer)
        self._contexts = ContextEncoder(self._encoder, self._tokenizer)
        self._words: ReplayPrompt | None = None
        backend = make_backend(
            self._engine_name, folder, device, scheduler_config, cache_config, properties, self._tokenizer, self._config
        )
        self._load_s = time.perf_counter() - start
        self._begin(backend)

    def _begin(self, backend: Backend) -> None:
        """All that belongs to one engine, and not to the model and its tokenizer."""
        self._backend = backend
        self._compressed: weakref.WeakValueDictionary[tuple[Any, ...], Context] = weakref.WeakValueDictionary()
        self._ids = itertools.count(1 << 62)  # of requests made here; callers of add_request choose theirs below
        self._active: list[Handle] = []  # of all `generate` calls that run, each in its own thread

    def beside(self: AnyPipeline, cache_config: Any = None) -> AnyPipeline:
        """A second pipeline on the same loaded model, with a store of its own, in other precisions perhaps.

        cache_config: CacheConfig, or a dict with its fields, as for a pipeline alone; nothing of it is taken over from
        this one. Model, tokenizer, scheduler config and staging blocks are shared: `staging_bytes` must be left out,
        and the steps of the two take turns, whichever threads run them. Each store has a limit of its own: with the
        defaults of both they may grow to more than there is, so give `max_bytes` where both will be filled.
        `compress_ids` of either puts what it reads into the store of either.
        Raises CrushError with engine="genai" or attention="paged", which have no store.
        """
        made = copy.copy(self)
        made._begin(backend_beside(self._backend, cache_config))
        return made

    @property
    def engine(self) -> str:
        """Name of the engine that runs: "crush" or "genai"."""
        return self._engine_name

    def get_tokenizer(self) -> ov_genai.Tokenizer:
        """The tokenizer that prompts go through."""
        return self._tokenizer

    def get_metrics(self) -> PipelineMetrics:
        """Requests, cache usage and bytes after the last step."""
        return self._backend.metrics()

    def get_last_step(self) -> StepSeconds:
        """What the last step took; zeros with engine="genai", which does not tell."""
        return self._backend.last_step()

    def compress(
        self,
        text: Any,
        *,
        policy: PolicyLike = None,
        kept: float | None = None,
        protect: Protect = (),
        progress: Progress | None = None,
    ) -> Context:
        """Read a text or a conversation once and compress it, to be asked often: `generate(question, context=...)`.

        text: a str, which questions follow in the same message; or a ChatHistory or a list of messages.
        policy: what stays, as CacheConfig.policy; None = KVzip, which reads the text twice. "none" keeps all.
        kept: the fraction that stays, where policy is a name or None; None = 0.25.
        protect: passages of the text, or spans (begin, end) of its tokens, that stay.
        progress: called with the number of tokens that were read and that of all; both readings count.
        The same text with the same policy shares the bytes of a context that there is already.
        Raises RequestError for a text that cannot be run, OutOfMemory where the store has no room.
        """
        metrics = self._new_metrics()
        chosen = context_policy(policy, kept)
        state, ids, head = self._contexts.open(text, metrics)
        first = state.messages[0] if state.messages and not state.is_open else {}
        system = first["content"] if first.get("role") == "system" else ""
        use = CacheWish(chosen, protect, system=system, words=self._words_for(chosen)).of(ids, self._tokenizer)
        use = replace(use, system=(0, head) if head else use.system, prefill_only=True)
        key = (ids.tobytes(), chosen, use.protect, use.system)
        known = self._compressed.get(key)
        if known is not None and known.is_open:
            return known.fork()
        start = time.perf_counter()
        kv = self._read(ids, use, progress).as_base()
        seconds = time.perf_counter() - start
        context = Context(self, ids, state, kv, chosen if chosen.evicts else None, seconds)
        self._compressed[key] = context
        return context

    def compress_ids(
        self,
        ids: np.ndarray,
        policies: Sequence[Policy],
        *,
        pipelines: Sequence[PipelineBase] | None = None,
        head: int = 0,
        progress: Progress | None = None,
    ) -> list[Context]:
        """Contexts of the same tokens int64 (S,), read once: one of each policy. Questions are token ids, too.

        For comparing policies: the prompt's full cache is computed once, and read a second time once if a policy wants
        that. pipelines: for each policy the one whose context it makes, this one or one `beside` it; None = this one
        for all. Every context is what its pipeline would have made alone; policies that are equal choose once for all
        precisions. head: tokens at the front that stay in any case.
        Raises as `compress`, and RequestError where policies want different second readings, for a text longer than the
        staging blocks, and for a pipeline that is not beside this one. OutOfMemory where one store has no room: then
        nothing is left in any.
        """
        if not policies:
            raise RequestError("policies must have at least one, got none")
        homes = [self] * len(policies) if pipelines is None else list(pipelines)
        others = others_for(policies, homes)
        words = next((w for w in map(self._words_for, policies) if w is not NO_REPLAY_PROMPT), NO_REPLAY_PROMPT)
        system = (0, head) if head else None
        use = CacheParams(policy=KeepAll(), system=system, words=words, prefill_only=True, others=others)
        handle = self._read_handle(ids, use, progress)
        state = ContextText(self._tokenizer.decode(ids.tolist()))
        return [
            Context(home, ids, state, kv.as_base(), policy if policy.evicts else None)
            for home, kv, policy in zip(homes, handle.held_others, policies, strict=True)
        ]

    def answer_each(
        self, asked: Sequence[tuple[Context, np.ndarray]], config: ov_genai.GenerationConfig | None = None
    ) -> list[str]:
        """Answers to questions about contexts, different ones even, all in one batch.

        asked: a context and the token ids int64 (T,) of a question that follows it. Policies choose nothing more.
        """
        rows = [np.concatenate([context.ids, ids]) for context, ids in asked]
        uses = [CacheParams(policy=KeepAll(), context=context.of(self)) for context, _ in asked]
        settings = self._options(config, {})
        metrics = self._new_metrics()
        handles = self._run(rows, [settings] * len(rows), None, metrics, uses)
        return [self._text(handle.read_all()[0], metrics) for handle in handles]

    def _extend(self, context: Context, text: str, policy: Policy | None, progress: Progress | None) -> Context:
        kv = context.of(self)
        state, more = self._contexts.more(context.content, text, self._new_metrics())
        ids = np.concatenate([context.ids, more])
        use = CacheParams(policy=policy or KeepAll(), context=kv, prefill_only=True)
        return Context(self, ids, state, self._read(ids, use, progress).as_base(), context.chosen_by)

    def _read(self, ids: np.ndarray, use: CacheParams, progress: Progress | None) -> KVSnapshot:
        """Run a prompt without an answer; its KV."""
        handle = self._read_handle(ids, use, progress)
        assert handle.held is not None
        return handle.held

    def _read_handle(self, ids: np.ndarray, use: CacheParams, progress: Progress | None) -> Handle:
        handle = self._backend.add(next(self._ids), ids, self._options(None, {"max_new_tokens": 1}), use)
        self._active.append(handle)
        num_read = 0
        try:
            while handle.get_status() == ov_genai.GenerationStatus.RUNNING:
                self._backend.step()
                num_read = max(num_read, handle.progress[0])  # one that lost its memory begins again
                if progress:
                    progress(num_read, handle.progress[1])
        except BaseException:
            self._give_up([handle], use.others)
            raise
        finally:
            self._active.remove(handle)
        if len(handle.held_others) == len(use.others) if use.others else handle.held is not None:
            return handle
        self._give_up([handle], use.others)
        if handle.get_status() != ov_genai.GenerationStatus.FINISHED:
            raise RequestError(f"context must be read to its end, got a stop after {num_read} tokens")
        raise OutOfMemory(
            f"context must fit into the KV store beside what is there, got {len(ids)} tokens; raise max_bytes"
        )

    def _give_up(self, handles: list[Handle], others: Sequence[FanOut] = ()) -> None:
        """End requests that nobody waits for any more, and give back what they hand out. others: of each of them."""
        for handle in handles:
            handle.cancel()
        self._backend.process_aborts()
        for handle in handles:
            if handle.held is not None:
                self._backend.drop_held(handle.held)
            for kv, other in zip(handle.held_others, others, strict=False):  # one that had no room ended it
                (other.home or self._backend).drop_held(kv)

    def _words_for(self, policy: Policy | None) -> ReplayPrompt:
        if policy is None or not policy.inputs.replay:
            return NO_REPLAY_PROMPT
        if self._words is None:
            self._words = self._contexts.words(self._new_metrics())
        return self._words

    def stop(self) -> None:
        """End the running `generate` after its step; it returns what there is. For other threads or signal handlers."""
        for handle in list(self._active):
            handle.stop()

    def _options(self, config: ov_genai.GenerationConfig | None, options: dict[str, Any]) -> ov_genai.GenerationConfig:
        return make_generation_config(config or self._config, options)

    def _run(
        self,
        prompts: list[np.ndarray],
        configs: list[ov_genai.GenerationConfig],
        streamer: Streamer | None,
        metrics: PerfMetrics,
        caches: list[CacheParams],
    ) -> list[Handle]:
        """Run prompts to their end together. Fills `metrics`. If anything is raised, none of them is left running."""
        start = time.perf_counter()
        sink = make_sink(streamer, self._tokenizer, configs[0])
        handles: list[Handle] = []
        goes_on = True
        try:
            for ids, config, cache in zip(prompts, configs, caches, strict=True):
                handles.append(self._backend.add(next(self._ids), ids, config, cache))
                self._active.append(handles[-1])
            while any(handle.get_status() == ov_genai.GenerationStatus.RUNNING for handle in handles):
                self._backend.step()
                metrics.inference_s.append(self._backend.last_step().inference)
                metrics.sampling_s.append(self._backend.last_step().sampling)
                if sink and goes_on:
                    goes_on = pump(handles[0], sink)
            if sink:
                if goes_on:  # another thread's step may have brought the last tokens
                    pump(handles[0], sink)
                sink.end()
            self._backend.process_aborts()
        except BaseException:
            self._give_up(handles)
            raise
        finally:
            self._active = [handle for handle in self._active if handle not in handles]
        metrics.generate_s.append(time.perf_counter() - start)
        for handle in handles:
            _add_stats(metrics, handle)
        return handles

    def _text(self, output: GenerationOutput, metrics: PerfMetrics) -> str:
        if output.text is not None:
            return output.text
        start = time.perf_counter()
        text: str = self._tokenizer.decode(output.generated_ids) if output.generated_ids else ""
        metrics.detokenization_s.append(time.perf_counter() - start)
        return text

    def _new_metrics(self) -> PerfMetrics:
        return PerfMetrics(load_time_s=self._load_s)


def _default_model() -> Path:
    from ov_kvcrush.model.default import default_model_path

    return default_model_path()


def load_tokenizer(folder: Path, properties: dict[str, Any]) -> ov_genai.Tokenizer:
    """openvino_genai's tokenizer of a model folder. Raises ModelError if it cannot be read."""
    try:
        return ov_genai.Tokenizer(str(folder), properties)
    except RuntimeError as error:
        raise ModelError(f"tokenizer in {str(folder)!r} must be readable, got: {reason_of(error)}") from None


def load_generation_config(folder: Path, tokenizer: ov_genai.Tokenizer) -> ov_genai.GenerationConfig:
    """The model's own generation config, with the tokenizer's end-of-sequence token if it names none."""
    path = folder / "generation_config.json"
    try:
        config = ov_genai.GenerationConfig(str(path)) if path.is_file() else ov_genai.GenerationConfig()
    except RuntimeError as error:
        raise ModelError(f"{path} must be a readable generation config, got: {reason_of(error)}") from None
    if config.eos_token_id < 0 and tokenizer.get_eos_token_id() >= 0:
        config.set_eos_token_id(tokenizer.get_eos_token_id())
    return config


def make_backend(
    engine: str,
    folder: Path,
    device: str,
    scheduler_config: Any,
    cache_config: Any,
    properties: dict[str, Any],
    tokenizer: ov_genai.Tokenizer,
    config: ov_genai.GenerationConfig,
) -> Backend:
    """The engine by its name, with the model loaded."""
    settings = CacheConfig.from_options(cache_config)
    if engine == "genai":
        from ov_kvcrush.genai.backend import GenaiBackend, genai_cache_properties

        if cache_config is not None:
            properties = {**properties, **genai_cache_properties(settings, properties)}
        policy = settings.eviction_policy
        return GenaiBackend(folder, tokenizer, device, scheduler_config, properties, config, policy)
    from ov_kvcrush.engine.engine import Engine
    from ov_kvcrush.model.load import load_model

    scheduler = SchedulerConfig.from_options(scheduler_config)
    attention = settings.choose_attention()
    if attention == "crush":
        settings, properties = settings.with_properties(properties)
    model = load_model(folder, device, properties, attention)
    return Engine(model, scheduler, config, tokenizer.decode, settings)


def _add_stats(metrics: PerfMetrics, handle: Handle) -> None:
    stats = handle.get_stats()
    metrics.num_input_tokens += stats.num_input_tokens
    metrics.num_reused_tokens += stats.num_reused_tokens
    metrics.kv_bytes += stats.kv_bytes
    if stats.kept_tokens is not None:
        metrics.kept_tokens = (metrics.kept_tokens or 0) + stats.kept_tokens
    for times in stats.token_times:
        metrics.num_generated_tokens += len(times)
        if times:
            metrics.ttft_s.append(times[0] - stats.arrival)
        if len(times) > 1:
            intervals = np.diff(times).tolist()
            metrics.token_intervals_s += intervals
            metrics.tpot_s.append(sum(intervals) / len(intervals))
