"""A model folder and options to an engine, a tokenizer and a generation config."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import openvino_genai as ov_genai

from ov_kvcrush.config import CacheConfig, SchedulerConfig
from ov_kvcrush.core.sampling_params import make_generation_config, model_end_tokens, outside_vocabulary
from ov_kvcrush.engine.engine import Engine
from ov_kvcrush.engine.grammar.compiler import GrammarCompiler
from ov_kvcrush.errors import CrushError, ModelError, reason_of
from ov_kvcrush.genai.backend import GenaiBackend, genai_cache_properties
from ov_kvcrush.model.adapters import ModelAdapters
from ov_kvcrush.model.converted import folder_of_gguf
from ov_kvcrush.model.default import default_model_path
from ov_kvcrush.model.folder import check_model_folder
from ov_kvcrush.model.load import NONE_LOADED, load_model
from ov_kvcrush.model.plugin import kept_signal_stack
from ov_kvcrush.model.source import ModelSource, ModelText
from ov_kvcrush.pipelines.backend import Backend
from ov_kvcrush.pipelines.draft import DraftSource, check_vocabulary


def find_model(models_path: str | Path | ModelText | None, own_tokenizer: bool) -> ModelSource:
    """The model that was named: its folder, which is whole, or itself where it is a text. None = the default model.

    own_tokenizer: whether there is one, so that the folder needs none. Raises ModelError.
    """
    if isinstance(models_path, ModelText):
        return models_path
    folder = Path(models_path) if models_path is not None else default_model_path()
    if folder.suffix == ".gguf" and not folder.is_dir():
        folder = folder_of_gguf(folder)
    check_model_folder(folder, tokenizer=not own_tokenizer)
    return folder


def load_tokenizer(folder: Path, properties: dict[str, Any]) -> ov_genai.Tokenizer:
    """openvino_genai's tokenizer of a model folder. Raises ModelError if it cannot be read."""
    try:
        with kept_signal_stack():  # it loads the plugin, too
            return ov_genai.Tokenizer(str(folder), properties)
    except RuntimeError as error:
        raise ModelError(f"tokenizer in {str(folder)!r} must be readable, got: {reason_of(error)}") from None


def load_generation_config(
    source: ModelSource, tokenizer: ov_genai.Tokenizer, given: ov_genai.GenerationConfig | None = None
) -> ov_genai.GenerationConfig:
    """The model's own generation config, with the tokenizer's end-of-sequence token if it names none.

    given: of a model given as text, which has no other.
    """
    if isinstance(source, ModelText):
        config = make_generation_config(given, {})
    else:
        path = source / "generation_config.json"
        try:
            config = ov_genai.GenerationConfig(str(path)) if path.is_file() else ov_genai.GenerationConfig()
        except RuntimeError as error:
            raise ModelError(f"{path} must be a readable generation config, got: {reason_of(error)}") from None
    if config.eos_token_id < 0 and tokenizer.get_eos_token_id() >= 0:
        config.set_eos_token_id(tokenizer.get_eos_token_id())
    return config


def make_backend(
    engine: str,
    source: ModelSource,
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
    """The engine by its name, with the model loaded. is_own_tokenizer: whether the tokenizer is not that of a folder.

    prompt_lookup, draft, adapters: of engine="crush"; openvino_genai's own are among the properties.
    Raises CrushError for engine="genai" with a model given as text.
    """
    settings = CacheConfig.from_options(cache_config)
    if engine == "genai":
        if isinstance(source, ModelText):
            raise CrushError(
                "models_path must be a folder with engine='genai', got a model given as text: openvino_genai's "
                "ContinuousBatchingPipeline takes none from Python"
            )
        if cache_config is not None:
            properties = {**properties, **genai_cache_properties(settings, properties)}
        policy = settings.eviction_policy
        backend = GenaiBackend(source, tokenizer, device, scheduler_config, properties, config, policy)
        _warn_of_ends_outside(config, backend.vocab_size, source)
        return backend
    scheduler = SchedulerConfig.from_options(scheduler_config)
    attention = settings.choose_attention()
    if attention == "crush":
        settings, properties = settings.with_properties(properties)
    if draft is not None:
        check_model_folder(draft.models_path)
        check_vocabulary(load_tokenizer(draft.models_path, {}), tokenizer, draft.models_path)
    model = load_model(source, device, properties, attention, settings.sharing, settings.weights, adapters)
    _warn_of_ends_outside(config, model.vocab_size, source)
    guesser = None
    if draft is not None:
        own = {**properties, **draft.properties}
        guesser = load_model(draft.models_path, device, own, attention, (), settings.weights)
    beside = None if is_own_tokenizer or isinstance(source, ModelText) else source
    grammars = GrammarCompiler(beside, tokenizer, model.vocab_size, model_end_tokens(config))
    return Engine(model, scheduler, config, tokenizer.decode, settings, None, grammars, prompt_lookup, guesser)


def _warn_of_ends_outside(config: ov_genai.GenerationConfig, vocab_size: int | None, source: ModelSource) -> None:
    outside = outside_vocabulary(model_end_tokens(config), vocab_size)
    if outside and vocab_size is not None:
        warnings.warn(
            f"end tokens of the model in {str(source)!r} must be in 0..{vocab_size - 1}, got {outside}: left out",
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
