"""ContinuousBatchingPipeline: requests come and go while others run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.contexts.context import Context, require_context
from ov_kvcrush.core.cache_params import CacheParams
from ov_kvcrush.core.outputs import EncodedGenerationResult, GenerationResult
from ov_kvcrush.core.perf_metrics import PerfMetrics
from ov_kvcrush.core.request_options import RequestOptions
from ov_kvcrush.errors import RequestError
from ov_kvcrush.pipelines.arguments import batching_arguments, only_one
from ov_kvcrush.pipelines.backend import Backend, Handle
from ov_kvcrush.pipelines.base import PipelineBase, visiting
from ov_kvcrush.pipelines.request_loop import draft_metrics
from ov_kvcrush.pipelines.streaming import Streamer
from ov_kvcrush.policies.registry import PolicyLike, as_policy
from ov_kvcrush.prompts.context import content_of
from ov_kvcrush.prompts.encoder import token_rows
from ov_kvcrush.prompts.spans import Protect, check_protect

CANCEL = ov_genai.GenerationStatus.CANCEL
_MAX_REQUEST_ID = (1 << 62) - 1


class ContinuousBatchingPipeline(PipelineBase):
    """Run many requests at once; the members are those of openvino_genai.ContinuousBatchingPipeline.

    ContinuousBatchingPipeline(models_path, scheduler_config, device, properties, tokenizer_properties), or
    (models_path, tokenizer, scheduler_config, device, **properties), or
    (model, weights, tokenizer, scheduler_config, device, properties, generation_config), as LLMPipeline has it:

    models_path: folder with an exported model; None = the default model.
    tokenizer: None = the one in the folder.
    scheduler_config: SchedulerConfig of this package or of openvino_genai, or a dict with its fields.
    properties: OpenVINO properties for `compile_model`.
    prompt_lookup: True = steps also run what followed the last tokens of a text before (docs/lookahead.md), as many as
        `num_assistant_tokens` of the config, found by up to `max_ngram_size` tokens. It changes no answer.
    draft_model: what `draft_model(path)` of this package gives: a model of the same vocabulary that guesses instead.
    engine: "crush" (default on CPU) or "genai" (default elsewhere).
    cache_config: CacheConfig, or a dict with its fields: precisions and memory of keys and values.
    Raises ModelError or CrushError before anything heavy starts if an argument cannot be used.
    """

    def __init__(
        self,
        models_path: str | Path | None = None,
        *args: Any,
        engine: str | None = None,
        cache_config: Any = None,
        **properties: Any,
    ) -> None:
        model, given = batching_arguments(models_path, args, properties)
        super().__init__(
            model,
            given.get("device", "CPU"),
            given.get("scheduler_config"),
            engine,
            {**(given.get("properties") or {}), **properties},
            given.get("tokenizer"),
            given.get("tokenizer_properties"),
            cache_config,
            given.get("generation_config"),
        )

    def _begin(self, backend: Backend, cache_config: Any) -> None:
        super()._begin(backend, cache_config)
        self._history: ov_genai.ChatHistory | None = None  # of start_chat

    def start_chat(self, system_message: str = "") -> None:
        """From now on `generate` of one text is a turn of a conversation, until `finish_chat`.

        Its KV is kept between turns with `enable_prefix_caching`.
        """
        self._history = ov_genai.ChatHistory()
        if system_message:
            self._history.append({"role": "system", "content": system_message})

    def finish_chat(self) -> None:
        """Forget the conversation."""
        self._history = None

    def get_config(self) -> ov_genai.GenerationConfig:
        """The model's own generation config, a copy."""
        return self._options(None, {})

    @visiting
    def add_request(
        self,
        request_id: int,
        prompt: Any = None,
        generation_config: ov_genai.GenerationConfig | None = None,
        *,
        input_ids: Any = None,
        policy: PolicyLike = None,
        protect: Protect = (),
        context: Context | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        cache_salt: str = "",
        **options: Any,
    ) -> Handle:
        """Queue one prompt: a text, encoded as it is, a ChatHistory, or an ov.Tensor of token ids [1, S] or [S], by
        the name input_ids too.

        It runs when somebody calls `step`, or waits for its handle, and while the handle is held.
        policy: which tokens stay in the KV cache, as CacheConfig.policy; None = as the pipeline was told.
        protect: what a policy must not drop: passages of the prompt, or spans (begin, end) of its tokens.
        context: what `compress` made of a text: the prompt, a text or ids, is a question about it; a ChatHistory is
            what is said after it, the first message in the context's own where that is open.
        cache_salt: cached prefixes and compiled grammars serve only requests of the same salt.
        priority, timeout_s, logit_bias: as RequestOptions has them.
        Raises RequestError for a prompt or a config that cannot be run, and for an id that is in use; QueueFull where
        too many wait.
        """
        if isinstance(request_id, bool) or not isinstance(request_id, int) or not 0 <= request_id <= _MAX_REQUEST_ID:
            raise RequestError(f"request_id must be an integer in 0..2^62-1, got {request_id!r}")
        prompt = only_one(prompt=prompt, input_ids=input_ids)
        config = self._options(generation_config, options)
        begun = require_context(context)
        params = CacheParams(
            as_policy(policy),
            check_protect(protect),
            context=begun.snapshot_for(self._compressor) if begun else None,
            cache_salt=cache_salt,
        )
        asked = RequestOptions(priority, timeout_s, logit_bias or {})
        metrics = self._new_metrics()
        if begun is not None and isinstance(prompt, ov_genai.ChatHistory):
            ids = self._context_encoder.conversation(begun.ids, begun.content, prompt, metrics)
        elif not isinstance(prompt, str):
            ids, params = self._encode_other(prompt, params, metrics)
            ids = ids if begun is None else np.concatenate([begun.ids, ids])
        elif begun is not None:
            ids = self._context_encoder.question(begun.ids, begun.content, prompt, metrics)
        else:
            ids = self._encoder.encode(prompt, metrics)
        return self._backend.add(request_id, ids, config, self._resolve(params, ids), asked)

    def step(self) -> None:
        """Run one inference for the requests that are due."""
        self._backend.step()

    def has_non_finished_requests(self) -> bool:
        """Whether `step` has something to do."""
        return self._backend.has_unfinished()

    @visiting
    def generate(
        self,
        prompts: Any = None,
        generation_config: ov_genai.GenerationConfig | list[ov_genai.GenerationConfig] | None = None,
        streamer: Streamer | None = None,
        *,
        prompt: Any = None,
        input_ids: Any = None,
        histories: Any = None,
        policy: PolicyLike = None,
        protect: Protect = (),
        priority: int = 0,
        timeout_s: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        **options: Any,
    ) -> list[GenerationResult] | list[EncodedGenerationResult]:
        """Run a list of texts, ChatHistory objects or id tensors to their end; each by openvino_genai's name for it,
        too.

        One config holds for all, or a list has one for each. A streamer is for a single prompt and a single sequence.
        policy, protect, priority, timeout_s, logit_bias: as for `add_request`, for all prompts.
        Returns texts for texts and histories, ids for tensors. One that the cache has no more room for ends with what
        there is, as in openvino_genai: its status is IGNORED. Raises RequestError; then none of the prompts is run.
        """
        prompts = only_one(prompts=prompts, prompt=prompt, input_ids=input_ids, histories=histories)
        single = isinstance(prompts, (str, ov_genai.ChatHistory)) or not isinstance(prompts, (list, tuple))
        items = [prompts] if single else list(prompts)
        if not items:
            raise RequestError("prompts must have at least one prompt, got none")
        turn = self._turn(items)
        items = items if turn is None else [turn]
        configs = self._configs(generation_config, len(items), options)
        if streamer is not None and (len(items) > 1 or configs[0].num_return_sequences > 1 or configs[0].num_beams > 1):
            raise RequestError(f"streamer must be None for more than one sequence, got one for {len(items)} prompts")
        metrics = self._new_metrics()
        as_text = isinstance(items[0], (str, ov_genai.ChatHistory))
        params = CacheParams(as_policy(policy), check_protect(protect))
        prompts_of = [self._encode(item, config, params, metrics) for item, config in zip(items, configs, strict=True)]
        rows = [ids for ids, _ in prompts_of]
        caches = [self._resolve(own, ids) for ids, own in prompts_of]
        asked = RequestOptions(priority, timeout_s, logit_bias or {})
        handles = self._loop.run(rows, configs, streamer, metrics, caches, asked, may_be_cut=True)
        results = [self._result(i, handle, rows[i], configs[i], metrics, as_text) for i, handle in enumerate(handles)]
        both = draft_metrics(metrics, handles)
        for result in results:
            result.extended_perf_metrics = both
        if turn is not None and handles[0].get_status() != CANCEL:
            turn.append({"role": "assistant", "content": results[0].m_generation_ids[0]})
            self._history = turn
        return results  # type: ignore[return-value]

    def _turn(self, items: list[Any]) -> ov_genai.ChatHistory | None:
        """The conversation of start_chat with what is asked now; None outside, and for what is no text."""
        if self._history is None or not isinstance(items[0], str):
            return None
        if len(items) > 1:
            raise RequestError(f"prompts must be one in a chat, got {len(items)}")
        turn = ov_genai.ChatHistory(self._history.get_messages())
        turn.append({"role": "user", "content": items[0]})
        return turn

    def _configs(self, given: Any, count: int, options: dict[str, Any]) -> list[ov_genai.GenerationConfig]:
        configs = list(given) if isinstance(given, (list, tuple)) else [given] * count
        if len(configs) != count:
            raise RequestError(
                f"generation_config must be one for all or one for each of {count} prompts, got {len(configs)}"
            )
        return [self._options(config, options) for config in configs]

    def _encode(
        self, item: Any, config: ov_genai.GenerationConfig, params: CacheParams, metrics: PerfMetrics
    ) -> tuple[np.ndarray, CacheParams]:
        if isinstance(item, str):
            return self._encoder.encode_user_text(item, config, metrics), params
        return self._encode_other(item, params, metrics)

    def _encode_other(self, item: Any, params: CacheParams, metrics: PerfMetrics) -> tuple[np.ndarray, CacheParams]:
        """The tokens of a history or of token ids, and `params` with the span of its system prompt."""
        if not isinstance(item, ov_genai.ChatHistory):
            return _one_row(item), params
        text = self._encoder.render(item, metrics)
        ids = self._encoder.encode(text, metrics, add_special_tokens=False)
        return ids, replace(params, system=self._system_span(content_of(item, text), ids, params.policy, metrics))

    def _result(
        self,
        request_id: int,
        handle: Handle,
        ids: np.ndarray,
        config: ov_genai.GenerationConfig,
        metrics: PerfMetrics,
        as_text: bool,
    ) -> GenerationResult | EncodedGenerationResult:
        outputs = handle.outputs()
        scores, reasons = [o.score for o in outputs], [o.finish_reason for o in outputs]
        if as_text:
            echo = self._tokenizer.decode(ids.tolist()) if config.echo else ""
            texts = [echo + self._text(o, metrics) for o in outputs]
            return GenerationResult(request_id, texts, scores, handle.get_status(), reasons, metrics)
        tokens = [(ids.tolist() if config.echo else []) + o.generated_ids for o in outputs]
        return EncodedGenerationResult(request_id, tokens, scores, handle.get_status(), reasons, metrics)


def _one_row(prompt: Any) -> np.ndarray:
    rows = token_rows(prompt)
    if len(rows) != 1:
        raise RequestError(f"prompt must be one row of token ids, got {len(rows)}")
    return rows[0]
