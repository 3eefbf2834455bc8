"""A pipeline for evaluations: token ids in, answers or the likelihood of given answers out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ov_kvcrush.config import CacheConfig, SchedulerConfig
from ov_kvcrush.core.cache_params import DEFAULT_CACHE_PARAMS
from ov_kvcrush.engine.engine import Engine
from ov_kvcrush.errors import RequestError
from ov_kvcrush.eval.likelihood.forcing import ForcedEngine
from ov_kvcrush.model.default import default_model_path
from ov_kvcrush.model.info import read_model_info
from ov_kvcrush.pipelines.continuous_batching import ContinuousBatchingPipeline

_CONTEXT = 2048  # tokens, where nothing on disk says what the model has: lm-eval's own default


class ScoringPipeline(ContinuousBatchingPipeline):
    """A ContinuousBatchingPipeline that can also score given answers. Raises the same errors."""

    def __init__(
        self,
        models_path: str | Path | None,
        device: str,
        engine: str | None,
        cache: CacheConfig | None,
        scheduler: SchedulerConfig | None,
        properties: dict[str, Any],
    ) -> None:
        if models_path is None:
            models_path = default_model_path()
        self.folder = Path(models_path)
        super().__init__(self.folder, scheduler, device, properties, engine=engine, cache_config=cache)
        self._cache_config = (cache or CacheConfig()).with_properties(properties)[0]
        self._forced_engine: ForcedEngine | None = None

    @property
    def max_tokens(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        info = read_model_info(self.folder)
        context = (info.context_length if info else None) or _CONTEXT
        return min(context, self._backend.cache.capacity_tokens(None)) if isinstance(self._backend, Engine) else context

    def forced_engine(self, purpose: str) -> ForcedEngine:
        """An engine for given answers, on the model of this pipeline. Raises RequestError with engine="genai"."""
        if not isinstance(self._backend, Engine):
            raise RequestError(
                f"engine must be 'crush' for {purpose}, got 'genai': openvino_genai does not tell how likely a given "
                "text is; tasks of the type generate_until run on it"
            )
        if self._forced_engine is None:
            self._forced_engine = ForcedEngine.on_model_of(self._backend, self._cache_config)
        return self._forced_engine

    def make_engine(self, cache: CacheConfig, purpose: str) -> ForcedEngine:
        """An engine for given and own answers, on the model of this pipeline, with a cache of its own.

        Raises RequestError with engine="genai".
        """
        if not isinstance(self._backend, Engine):
            raise RequestError(f"engine must be 'crush' for {purpose}, got 'genai'")
        return ForcedEngine.on_model_of(self._backend, cache)

    def encode(self, text: str, add_special_tokens: bool) -> np.ndarray:
        """Token ids int64 (S,). Raises RequestError for a text that the tokenizer would cut."""
        return self._encoder.encode(text, self._new_metrics(), add_special_tokens)

    def render(self, messages: list[dict[str, str]], answers: bool) -> str:
        """The text of a conversation up to the model's answer; answers=False: up to the end of its last message.

        Marks that a template puts behind a message are cut off then, so that the message can be continued.
        """
        text = self._encoder.render(messages, self._new_metrics(), answers=answers)
        if answers:
            return text
        last = messages[-1]["content"].strip()
        at = text.rfind(last)
        if at < 0:
            raise RequestError("chat template must leave messages as they are to go on with one, got one that does not")
        return text[: at + len(last)]

    def answer(self, prompts: list[np.ndarray], options: list[dict[str, Any]]) -> list[str]:
        """The answers to token ids int64 (S,), each with its own options of GenerationConfig."""
        metrics = self._new_metrics()
        configs = [self._options(None, given) for given in options]
        handles = self._loop.run(prompts, configs, None, metrics, [DEFAULT_CACHE_PARAMS] * len(prompts))
        return [self._text(handle.outputs()[0], metrics) for handle in handles]
