"""The forms in which openvino_genai's pipelines are made and called, to the ones used here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import openvino as ov
import openvino_genai as ov_genai

from ov_kvcrush.config import CacheConfig
from ov_kvcrush.errors import CrushError, RequestError
from ov_kvcrush.genai.stock_eviction import policy_of
from ov_kvcrush.model.adapters import ModelAdapters
from ov_kvcrush.model.source import ModelText
from ov_kvcrush.pipelines.draft import DraftSource, as_stock, check_draft

_BACKENDS = ("PA", "SDPA")


ModelPath = str | Path | ModelText | None


def llm_arguments(
    models_path: str | Path | None, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[ModelPath, dict[str, Any]]:
    """The model, and what stands behind it: (device, config), or (tokenizer, device, config).

    Behind the text of a model: (weights, tokenizer, device, generation_config). Takes their names out of `named`.
    Raises TypeError as a call does, CrushError for a text without its weights or its tokenizer.
    """
    if _is_text(args, named):
        return _text_of(models_path, args, named, ("device", "generation_config"))
    return _path(models_path), _bound(args, named, ("device", "config"))


def batching_arguments(
    models_path: str | Path | None, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[ModelPath, dict[str, Any]]:
    """(scheduler_config, device, properties, ...), or (tokenizer, scheduler_config, device) behind the path.

    Behind the text of a model, as openvino_genai has it in C++: (weights, tokenizer, scheduler_config, device,
    properties, generation_config). Raises TypeError, CrushError.
    """
    if _is_text(args, named):
        of_text = ("scheduler_config", "device", "properties", "generation_config")
        return _text_of(models_path, args, named, of_text)
    names = ("scheduler_config", "device", "properties", "tokenizer_properties", "vision_encoder_properties")
    found = _bound(args, named, names)
    if found.pop("vision_encoder_properties", None):
        raise CrushError("vision_encoder_properties must be left out: models of text only have no such part")
    return _path(models_path), found


def _is_text(args: tuple[Any, ...], named: dict[str, Any]) -> bool:
    return "weights" in named or (bool(args) and isinstance(args[0], ov.Tensor))


def _path(models_path: str | Path | None) -> str | Path | None:
    if isinstance(models_path, str) and models_path.lstrip().startswith("<"):
        raise CrushError("weights must be given with a model's text, as an openvino.Tensor behind it, got none")
    return models_path


def _text_of(
    model: Any, args: tuple[Any, ...], named: dict[str, Any], names: tuple[str, ...]
) -> tuple[ModelText, dict[str, Any]]:
    order = ("weights", "tokenizer", *names)
    found = _by_name(args, named, order, order)
    if "model" in named:
        if model is not None:
            raise TypeError("got multiple values for argument 'model'")
        model = named.pop("model")
    tokenizer = found.get("tokenizer")
    if not isinstance(tokenizer, ov_genai.Tokenizer):
        raise CrushError(
            f"tokenizer must be an openvino_genai.Tokenizer with a model's text, got {type(tokenizer).__name__}"
        )
    return ModelText(model, found.pop("weights")), found


def _bound(args: tuple[Any, ...], named: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    order = ("tokenizer", *names) if args and isinstance(args[0], ov_genai.Tokenizer) else names
    return _by_name(args, named, order, ("tokenizer", *names))


def _by_name(
    args: tuple[Any, ...], named: dict[str, Any], order: tuple[str, ...], names: tuple[str, ...]
) -> dict[str, Any]:
    """Positional arguments and those of `named` by their names, taken out of it."""
    if len(args) > len(order):
        raise TypeError(f"at most {len(order) + 1} positional arguments: models_path, {', '.join(order)}")
    found = dict(zip(order, args, strict=False))
    for name in names:
        if name in named:
            if name in found:
                raise TypeError(f"got multiple values for argument {name!r}")
            found[name] = named.pop(name)
    return found


def model_properties(properties: dict[str, Any], scheduler_config: Any) -> tuple[dict[str, Any], Any]:
    """What of the properties is for `compile_model`, and the scheduler config, which may be among them.

    ATTENTION_BACKEND is one of openvino_genai's: both of its values mean the attention of the engine. Raises CrushError
    for what selects a mode that there is none of.
    """
    rest = dict(properties)
    backend = rest.pop("ATTENTION_BACKEND", "PA")
    if backend not in _BACKENDS:
        raise CrushError(f"ATTENTION_BACKEND must be PA or SDPA, got {backend!r}")
    if "scheduler_config" in rest:
        if scheduler_config is not None:
            raise CrushError("scheduler_config must be given once, got it among the properties, too")
        scheduler_config = rest.pop("scheduler_config")
    return rest, scheduler_config


def adapters_of(properties: dict[str, Any], engine: str) -> tuple[dict[str, Any], ModelAdapters]:
    """The properties without `adapters`, and these. Raises CrushError, for any at all with engine="genai"."""
    rest = dict(properties)
    config = rest.pop("adapters", None)
    if engine == "genai" and config:
        raise CrushError(
            "adapters must be empty with engine='genai', got some: openvino_genai does not heed them in requests that "
            "are added one by one, as here"
        )
    return rest, ModelAdapters.of(config)


def lookahead_of(properties: dict[str, Any], engine: str) -> tuple[dict[str, Any], bool, DraftSource | None]:
    """The properties without `prompt_lookup` and `draft_model`, and these two; openvino_genai has its own."""
    rest = dict(properties)
    if engine == "genai":
        return {name: as_stock(value) for name, value in rest.items()}, False, None
    wanted, draft = rest.pop("prompt_lookup", False), rest.pop("draft_model", None)
    if not isinstance(wanted, bool):
        raise CrushError(f"prompt_lookup must be True or False, got {wanted!r}")
    if wanted and draft is not None:
        raise CrushError("prompt_lookup must be False with a draft_model, got both")
    return rest, wanted, None if draft is None else check_draft(draft)


def with_stock_eviction(scheduler_config: Any, cache_config: Any) -> Any:
    """The cache config with the policy that an openvino_genai.SchedulerConfig asks for, if it asks for one.

    Raises CrushError where the cache config has a policy or a budget, too.
    """
    if not getattr(scheduler_config, "use_cache_eviction", False):
        return cache_config
    settings = CacheConfig.from_options(cache_config)
    if settings.policy is not None or settings.is_planned:
        raise CrushError(
            "use_cache_eviction must be False where cache_config says what is evicted, got both; leave one of them out"
        )
    return replace(settings, policy=policy_of(scheduler_config.cache_eviction_config))


def only_one(**given: Any) -> Any:
    """The one of several names that was given. Raises RequestError for none or more."""
    found = {name: value for name, value in given.items() if value is not None}
    if len(found) != 1:
        raise RequestError(f"one of {', '.join(given)} must be given, got {' and '.join(found) or 'none'}")
    return next(iter(found.values()))
