"""A model folder and options to an engine, a tokenizer and a generation config."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import openvino_genai as ov_genai

from ov_kvcrush.config import CacheConfig, SchedulerConfig
from ov_kvcrush.core.sampling_params import model_end_tokens, outside_vocabulary
from ov_kvcrush.engine.engine import Engine
from ov_kvcrush.engine.grammar.compiler import GrammarCompiler
from ov_kvcrush.errors import CrushError, ModelError, reason_of
from ov_kvcrush.genai.backend import GenaiBackend, genai_cache_properties
from ov_kvcrush.model.adapters import ModelAdapters
from ov_kvcrush.model.folder import check_model_folder
from ov_kvcrush.model.load import NONE_LOADED, load_model
from ov_kvcrush.model.plugin import kept_signal_stack
from ov_kvcrush.pipelines.backend import Backend
from ov_kvcrush.pipelines.draft import DraftSource, check_vocabulary


def load_tokenizer(folder: Path, properties: dict[str, Any]) -> ov_genai.Tokenizer:
    """openvino_genai's tokenizer of a model folder. Raises ModelError if it cannot be read."""
    try:
        with kept_signal_stack():  # it loads the plugin, too
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
    is_own_tokenizer: bool,
    prompt_lookup: bool = False,
    draft: DraftSource | None = None,
    adapters: ModelAdapters = NONE_LOADED,
) -> Backend:
    """The engine by its name, with the model loaded. is_own_tokenizer: whether the tokenizer is not the folder's.

    prompt_lookup, draft, adapters: of engine="crush"; openvino_genai's own are among the properties.
    """
    settings = CacheConfig.from_options(cache_config)
    if engine == "genai":
        if cache_config is not None:
            properties = {**properties, **genai_cache_properties(settings, properties)}
        policy = settings.eviction_policy
        backend = GenaiBackend(folder, tokenizer, device, scheduler_config, properties, config, policy)
        _warn_of_ends_outside(config, backend.vocab_size, folder)
        return backend
    scheduler = SchedulerConfig.from_options(scheduler_config)
    attention = settings.choose_attention()
    if attention == "crush":
        settings, properties = settings.with_properties(properties)
    if draft is not None:
        check_model_folder(draft.models_path)
        check_vocabulary(load_tokenizer(draft.models_path, {}), tokenizer, draft.models_path)
    model = load_model(folder, device, properties, attention, settings.sharing, settings.weights, adapters)
    _warn_of_ends_outside(config, model.vocab_size, folder)
    guesser = None
    if draft is not None:
        own = {**properties, **draft.properties}
        guesser = load_model(draft.models_path, device, own, attention, (), settings.weights)
    grammars = GrammarCompiler(
        None if is_own_tokenizer else folder, tokenizer, model.vocab_size, model_end_tokens(config)
    )
    return Engine(model, scheduler, config, tokenizer.decode, settings, None, grammars, prompt_lookup, guesser)


def _warn_of_ends_outside(config: ov_genai.GenerationConfig, vocab_size: int | None, folder: Path) -> None:
    outside = outside_vocabulary(model_end_tokens(config), vocab_size)
    if outside and vocab_size is not None:
        warnings.warn(
            f"end tokens of the model in {str(folder)!r} must be in 0..{vocab_size - 1}, got {outside}: left out",
            stacklevel=2,
        )


def with_cache(backend: Backend, cache_config: Any) -> Backend:
    """An engine on the same model and staging blocks with the store that `cache_config` asks for.

    Raises CrushError for an engine without a store, and for settings that the two cannot differ in.
    """
    settings = CacheConfig.from_options(cache_config)
    if not isinstance(backend, Engine):
        raise CrushError("engine must be 'crush' for a pipeline beside another, got 'genai', which has no store")
    return backend.with_cache(settings)
