"""LLMPipeline: prompts in, answers out; a chat that keeps its KV between turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as ov_genai

from ov_kvcrush.config import SchedulerConfig
from ov_kvcrush.contexts.context import Context, require_context
from ov_kvcrush.core.cache_params import CacheParams
from ov_kvcrush.core.outputs import DecodedResults, EncodedResults
from ov_kvcrush.core.perf_metrics import PerfMetrics
from ov_kvcrush.core.request_options import RequestOptions
from ov_kvcrush.core.sampling_params import check_generation_config, end_tokens, model_end_tokens
from ov_kvcrush.core.snapshot import KVSnapshot
from ov_kvcrush.errors import RequestError
from ov_kvcrush.pipelines.arguments import llm_arguments
from ov_kvcrush.pipelines.backend import Backend, Handle
from ov_kvcrush.pipelines.base import PipelineBase, kept_tokens, parsed, visiting
from ov_kvcrush.pipelines.request_loop import draft_metrics
from ov_kvcrush.pipelines.streaming import Streamer
from ov_kvcrush.policies.registry import PolicyLike, as_policy
from ov_kvcrush.prompts.context import ContextText, content_of
from ov_kvcrush.prompts.conversation import NEW_CHAT, ConversationEncoder, HistoryTokens, KnownTokens
from ov_kvcrush.prompts.encoder import check_text, token_rows
from ov_kvcrush.prompts.spans import Protect, check_protect

CANCEL = ov_genai.GenerationStatus.CANCEL


class LLMPipeline(PipelineBase):
    """Generate text; the members are those of openvino_genai.LLMPipeline.

    LLMPipeline(models_path, device, config, **properties), or (models_path, tokenizer, device, config, **properties),
    or (model, weights, tokenizer, device, generation_config, **properties) for a model that lies in no folder:

    models_path: folder with an exported model, or a GGUF file, which is converted once, into $OV_KVCRUSH_CACHE or the
        user's cache directory; None = the default model, SmolLM2-135M-Instruct.
    tokenizer: None = the one in the folder.
    model, weights, generation_config: the text of its IR, an openvino.Tensor of its weights, and what holds where
        `generate` gets no config. What stands in `config.json` is not known of it (docs/coming_from_openvino_genai.md).
    device: "CPU" (default), or another device of `openvino.Core().available_devices` with engine="genai".
    config, **properties: OpenVINO properties for `compile_model`; a "scheduler_config" may be among them.
    prompt_lookup: True = steps also run what followed the last tokens of a text before (docs/lookahead.md), as many as
        `num_assistant_tokens` of the config, found by up to `max_ngram_size` tokens. It changes no answer.
    draft_model: what `draft_model(path)` of this package gives: a model of the same vocabulary that guesses instead.
    engine: "crush" (default on CPU) or "genai" (default elsewhere).
    cache_config: CacheConfig, or a dict with its fields: precisions and memory of keys and values.
    scheduler_config: SchedulerConfig of this package or of openvino_genai, or a dict with its fields. None = ours with
        enable_prefix_caching=True.
    Raises ModelError or CrushError before anything heavy starts if an argument cannot be used.
    """

    _default_scheduler_config = SchedulerConfig(enable_prefix_caching=True)

    def __init__(
        self,
        models_path: str | Path | None = None,
        *args: Any,
        engine: str | None = None,
        scheduler_config: Any = None,
        cache_config: Any = None,
        **properties: Any,
    ) -> None:
        model, given = llm_arguments(models_path, args, properties)
        properties = {**(given.get("config") or {}), **properties}
        super().__init__(
            model,
            given.get("device", "CPU"),
            scheduler_config,
            engine,
            properties,
            given.get("tokenizer"),
            cache_config=cache_config,
            generation_config=given.get("generation_config"),
        )

    def _begin(self, backend: Backend, cache_config: Any) -> None:
        super()._begin(backend, cache_config)
        self._conversations = ConversationEncoder(self._encoder, self._tokenizer)
        self._of_histories = HistoryTokens()
        self._chat_known = NEW_CHAT  # tokens of start_chat's conversation
        self._history: ov_genai.ChatHistory | None = None  # of start_chat; None outside
        self._chat_context: Context | None = None  # what the chat goes on from, if it began with one
        self._chat_start: Context | None = None  # the one it began with
        self._is_open = False  # its last message goes on with the next turn

    def get_generation_config(self) -> ov_genai.GenerationConfig:
        """The config that holds where `generate` gets none, a copy."""
        return self._options(None, {})

    def set_generation_config(self, config: ov_genai.GenerationConfig) -> None:
        """Set the config that holds where `generate` gets none.

        Its end-of-sequence token, if any, replaces the old; where the model has several, they stay or go together.
        Raises RequestError for what openvino_genai finds wrong with it.
        """
        eos, own = self._config.eos_token_id, model_end_tokens(self._model_config)
        new = self._options(config, {})
        if new.eos_token_id < 0 and eos >= 0:
            new.set_eos_token_id(eos)
        if new.eos_token_id in own:
            new.stop_token_ids = new.stop_token_ids | own
        check_generation_config(new)
        self._config = new

    def start_chat(self, system_message: str = "", *, context: Context | None = None) -> None:
        """From now on `generate` of a text is a turn of one conversation, until `finish_chat`.

        context: what the conversation begins with; it must have its own system message. A policy chooses from what
        follows it.
        """
        if not self._tokenizer.chat_template:
            raise RequestError("chat needs a tokenizer with a chat template, got one without")
        if context is not None and system_message:
            raise RequestError("system_message must be left out with a context, which has its own, got both")
        begun = require_context(context)
        if begun is not None:
            begun.snapshot_for(self._compressor)
        self.finish_chat()
        self._history = ov_genai.ChatHistory()
        if begun is not None:
            self._chat_start, self._chat_context = begun.fork(), begun.fork()
            self._is_open = begun.content.is_open
            self._history = begun.content.history()
            self._chat_known = NEW_CHAT.joined(begun.content.rendered, begun.ids)
        if system_message:
            self._history.append({"role": "system", "content": system_message})

    def finish_chat(self) -> None:
        """Forget the conversation; give back its KV, and what is kept of other prompts."""
        self._history = None
        self._chat_known = NEW_CHAT
        self._chat_start = self._chat_context = None
        self._is_open = False
        self._backend.clear_prefixes()

    def chat_context(self) -> Context:
        """The conversation so far as a context, if it began with one. Raises RequestError where it did not.

        A last turn whose answer was ended by a stop string is not in it.
        """
        if self._chat_context is None:
            raise RequestError("chat must have begun with a context to be one, got none")
        return self._chat_context.fork()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Same as `generate`."""
        return self.generate(*args, **kwargs)

    @visiting
    def generate(
        self,
        inputs: Any,
        generation_config: ov_genai.GenerationConfig | None = None,
        streamer: Streamer | None = None,
        *,
        policy: PolicyLike = None,
        protect: Protect = (),
        context: Context | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        **options: Any,
    ) -> Any:
        """Generate from a str, list[str], ChatHistory, ov.Tensor of ids [B, S] or TokenizedInputs.

        Returns a str for a str (DecodedResults if several sequences are asked for), DecodedResults for a list or a
        history, EncodedResults for ids. A history keeps its KV for the next turn, as a chat does.
        policy: which tokens stay in the KV cache, as CacheConfig.policy; None = as the pipeline was told.
        protect: what a policy must not drop: passages of the prompt, or spans (begin, end) of its tokens.
        context: what `compress` made of a text: the inputs, a str, list[str] or ids, are questions about it, which
            share its bytes. A policy chooses from what follows it.
        priority, timeout_s, logit_bias: as RequestOptions has them.
        Raises RequestError naming the field for anything that cannot be run; OutOfMemory, RequestTimeout, or what broke
        where there is no whole answer.
        """
        asked = RequestOptions(priority, timeout_s, logit_bias or {})
        config = self._options(generation_config, options)
        metrics = self._new_metrics()
        begun = require_context(context)
        params = CacheParams(
            as_policy(policy),
            check_protect(protect),
            context=begun.snapshot_for(self._compressor) if begun else None,
        )
        if begun is not None and (isinstance(inputs, ov_genai.ChatHistory) or self._history is not None):
            raise RequestError("context must be given to start_chat() for a conversation, got one in a turn")
        if isinstance(inputs, ov_genai.ChatHistory):
            results, _, known = self._generate_turn(
                inputs, self._of_histories.of(inputs), config, streamer, metrics, params, asked
            )
            self._of_histories.set(inputs, known)
            return results
        if isinstance(inputs, str) and self._history is not None:
            return self._generate_in_chat(inputs, config, streamer, metrics, params, asked)
        texts = [inputs] if isinstance(inputs, str) else inputs
        if isinstance(texts, (list, tuple)) and all(isinstance(t, str) for t in texts):
            if not texts:
                raise RequestError("inputs must have at least one prompt, got none")
            rows = [self._encode_text(text, begun, config, metrics) for text in texts]
            handles = self._run_rows(rows, config, streamer, metrics, params, asked)
            results = self._decoded(handles, rows, config, metrics)
            return results.texts[0] if isinstance(inputs, str) and len(results.texts) == 1 else results
        if isinstance(inputs, (ov.Tensor, ov_genai.TokenizedInputs)):
            rows = [ids if begun is None else np.concatenate([begun.ids, ids]) for ids in token_rows(inputs)]
            handles = self._run_rows(rows, config, streamer, metrics, params, asked)
            return self._encoded(handles, rows, config, metrics)
        raise RequestError(
            f"inputs must be a str, list[str], ChatHistory, ov.Tensor or TokenizedInputs, got {type(inputs).__name__}"
        )

    def _encode_text(
        self, text: str, context: Context | None, config: ov_genai.GenerationConfig, metrics: PerfMetrics
    ) -> np.ndarray:
        if context is None:
            return self._encoder.encode_user_text(text, config, metrics)
        return self._context_encoder.question(context.ids, context.content, text, metrics)

    def _run_rows(
        self,
        rows: list[np.ndarray],
        config: ov_genai.GenerationConfig,
        streamer: Streamer | None,
        metrics: PerfMetrics,
        params: CacheParams,
        asked: RequestOptions,
    ) -> list[Handle]:
        num_sequences = max(config.num_return_sequences, config.num_beams)
        if streamer is not None and (len(rows) > 1 or num_sequences > 1):
            raise RequestError(
                f"streamer must be None for more than one sequence, got one for "
                f"{len(rows)} prompts x {num_sequences} {'beams' if config.num_beams > 1 else 'sequences'}"
            )
        caches = [self._resolve(params, ids) for ids in rows]
        return self._loop.run(rows, [config] * len(rows), streamer, metrics, caches, asked)

    def _generate_in_chat(
        self,
        text: str,
        config: ov_genai.GenerationConfig,
        streamer: Streamer | None,
        metrics: PerfMetrics,
        params: CacheParams,
        asked: RequestOptions,
    ) -> Any:
        """One turn of start_chat's conversation. A turn that fails or is cancelled leaves the history as it was."""
        assert self._history is not None
        check_text(text, empty=True)
        before = content_of(self._history, is_open=self._is_open)
        history = before.history(before.asked(text))
        if self._chat_context:
            params = replace(params, context=self._chat_context.snapshot_for(self._compressor))
        results, status, known = self._generate_turn(
            history, self._chat_known, config, streamer, metrics, params, asked
        )
        if status != CANCEL:
            self._chat_known = known
            history.append({"role": "assistant", "content": results.texts[0]})
            self._history, self._is_open = history, False
        return results.texts[0] if len(results.texts) == 1 else results

    def _generate_turn(
        self,
        history: ov_genai.ChatHistory,
        known: KnownTokens,
        config: ov_genai.GenerationConfig,
        streamer: Streamer | None,
        metrics: PerfMetrics,
        params: CacheParams,
        asked: RequestOptions,
    ) -> tuple[DecodedResults, ov_genai.GenerationStatus, KnownTokens]:
        """A turn of a conversation of which the caller knows `known`, and what is known of it then."""
        if not len(history):
            raise RequestError("history must have at least one message, got an empty one")
        text = self._encoder.render(history, metrics)
        content = content_of(history, text)
        prompt = self._conversations.encode(known, text, metrics)
        ids = prompt.ids
        begun = self._chat_context if params.context else None
        if begun and self._chat_start and not np.array_equal(ids[: begun.num_tokens], begun.ids):
            begun = self._chat_start  # the template changes what was answered: all turns are read anew
            ids = self._context_encoder.joined(begun.ids, begun.content, text, metrics)
            params = replace(params, context=begun.snapshot_for(self._compressor))
            prompt = NEW_CHAT.joined(text, ids)
        system = self._system_span(content, ids, params.policy, metrics)
        turn = replace(params, keep_kv=not begun, return_snapshot=bool(begun), system=system)
        handle = self._run_rows([ids], config, streamer, metrics, turn, asked)[0]
        results = self._decoded([handle], [ids], config, metrics)
        if handle.get_status() != CANCEL:
            answer = handle.outputs()[0]
            answer_ids = answer.generated_ids
            if answer_ids and self._is_end(answer_ids[-1], config):
                answer_ids = answer_ids[:-1]
            # After a stop string the tokens may hold more or less than the text: only the prompt is sure then.
            said = "" if answer.text is not None else self._text(answer, metrics)
            known = self._conversations.answered(prompt, said, answer_ids if answer.text is None else [])
            if begun and handle.snapshot:
                answered = {"role": "assistant", "content": results.texts[0]}
                state = replace(content, rendered=known.text, messages=(*content.messages, answered))
                self._go_on(begun, handle.snapshot, state, known.ids)
        return results, handle.get_status(), known

    def _go_on(self, begun: Context, snapshot: KVSnapshot, state: ContextText, ids: np.ndarray) -> None:
        """The chat's context from now on. Where the cached tokens are not the conversation's, it is what it was."""
        # The last token of the answer was not run: a request that goes on from it runs it first.
        new = Context(self._compressor, ids, state, snapshot, begun.chosen_by)
        if snapshot.num_tokens <= len(ids):
            self._chat_context = new

    def _is_end(self, token: int, config: ov_genai.GenerationConfig) -> bool:
        return token in end_tokens(config, self._model_config) | model_end_tokens(self._model_config)

    def _decoded(
        self, handles: list[Handle], rows: list[np.ndarray], config: ov_genai.GenerationConfig, metrics: PerfMetrics
    ) -> DecodedResults:
        results = DecodedResults([], [], metrics, [])
        for handle, ids in zip(handles, rows, strict=True):
            echo = self._tokenizer.decode(ids.tolist()) if config.echo else ""
            for output in handle.outputs():
                results.texts.append(echo + self._text(output, metrics))
                results.parsed += parsed(results.texts[-1], config)
                results.scores.append(output.score)
                results.finish_reasons.append(output.finish_reason)
            results.kept.append(kept_tokens(handle, ids))
        results.extended_perf_metrics = draft_metrics(metrics, handles)
        return results

    def _encoded(
        self, handles: list[Handle], rows: list[np.ndarray], config: ov_genai.GenerationConfig, metrics: PerfMetrics
    ) -> EncodedResults:
        results = EncodedResults([], [], metrics, [])
        for handle, ids in zip(handles, rows, strict=True):
            for output in handle.outputs():
                results.tokens.append((ids.tolist() if config.echo else []) + output.generated_ids)
                results.scores.append(output.score)
                results.finish_reasons.append(output.finish_reason)
            results.kept.append(kept_tokens(handle, ids))
        results.extended_perf_metrics = draft_metrics(metrics, handles)
        return results
