"""The arguments of `lm_eval --model_args`: flat names, each sorted to the config that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ov_kvcrush.config import CacheConfig, SchedulerConfig
from ov_kvcrush.errors import CrushError, RequestError, did_you_mean
from ov_kvcrush.policies.registry import build, describe
from ov_kvcrush.utils.checks import check_integer

# Policies have a setting of the same name.
RENAMED = {"cache_recent_tokens": "recent_tokens"}
_CACHE = {f.name: f.name for f in fields(CacheConfig) if f.name not in ("policy", *RENAMED.values())} | RENAMED
_SCHEDULER = [f.name for f in fields(SchedulerConfig)]
_LENGTHS = ("max_gen_toks", "max_gen_tokens", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class Arguments:
    """Everything that `--model_args` may say, besides `policy` with its settings and OpenVINO's properties.

    pretrained: folder of an exported model; None = the default model. engine: as of the pipelines. device: too; lm_eval
        passes "cuda:0" where its --device was not given, which means CPU here.
    max_length: tokens of context and answer; None = the model's context. Longer contexts lose their beginning.
    max_gen_toks: of an answer, where a task says nothing.
    tail_tokens: of each context whose continuations are scored, last tokens that are read after the policy has chosen.
    batch_size: requests at the same time; "auto" and 1, lm_eval's default, leave it to the engine. max_batch_size is of
        no meaning here.
    """

    pretrained: str | None = None
    device: str = "CPU"
    engine: str | None = None
    max_length: int | None = None
    max_gen_toks: int = 256
    tail_tokens: int = 1
    batch_size: int | str = 1
    max_batch_size: int | None = None

    def __post_init__(self) -> None:
        for name, minimum in (("max_gen_toks", 1), ("tail_tokens", 0)):
            check_integer(name, getattr(self, name), minimum)
        if self.max_length is not None:
            check_integer("max_length", self.max_length, 2)
        if self.device.lower().startswith("cuda"):
            object.__setattr__(self, "device", "CPU")
        if self.batch_size != "auto":
            size = self.batch_size
            check_integer("batch_size", int(size) if isinstance(size, str) and size.isdigit() else size, 1)

    @property
    def num_together(self) -> int | None:
        """Requests at the same time; None = the engine's choice."""
        return None if self.batch_size in ("auto", 1, "1") else int(self.batch_size)


@dataclass(frozen=True)
class Configs:
    """cache, scheduler: None where no argument was of theirs. properties: of OpenVINO, names in capitals."""

    own: Arguments
    cache: CacheConfig | None
    scheduler: SchedulerConfig | None
    properties: dict[str, Any]


def sort_arguments(arguments: Mapping[str, Any]) -> Configs:
    """Raises CrushError for a name that nothing has, naming the nearest, and for values that are refused."""
    own: dict[str, Any] = {}
    cache: dict[str, Any] = {}
    scheduler: dict[str, Any] = {}
    properties: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    own_names = [f.name for f in fields(Arguments)]
    for name, value in arguments.items():
        if name in own_names:
            own[name] = value
        elif name in _CACHE:
            cache[_CACHE[name]] = value
        elif name in _SCHEDULER:
            scheduler[name] = value
        elif name.isupper():
            properties[name] = value
        elif name != "policy":
            settings[name] = value
    policy = arguments.get("policy") or "none"  # lm_eval reads policy=none as None
    _check_settings(str(policy), settings, [*own_names, *_CACHE, *_SCHEDULER, "policy"])
    if policy != "none" or settings:
        cache["policy"] = build(str(policy), **settings)
    return Configs(
        own=Arguments(**own),
        cache=CacheConfig(**cache) if cache else None,
        scheduler=SchedulerConfig(**scheduler) if scheduler else None,
        properties=properties,
    )


def _check_settings(policy: str, settings: dict[str, Any], others: list[str]) -> None:
    """What a policy does not know may be meant for something else: the registry would only name its settings."""
    known = describe(policy).settings
    for name in settings:
        if policy == "none" and name not in known:
            raise CrushError(
                f"model_args must be one of {', '.join(others)}, an OpenVINO property in capitals, or with a policy "
                f"its settings, got {name!r}{did_you_mean(name, others)}"
            )


def generation_options(given: Mapping[str, Any], max_gen_toks: int) -> dict[str, Any]:
    """Options of GenerationConfig for what a task, or --gen_kwargs, says; greedy unless it says otherwise.

    Raises RequestError for `until` that is not a text or several; the pipeline refuses options that it does not know.
    """
    options = dict(given)
    until = options.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, (list, tuple, set)) or not all(isinstance(text, str) for text in until):
        raise RequestError(f"until must be a text or a list of texts, got {until!r}")
    lengths = [options.pop(name, None) for name in _LENGTHS]
    options["max_new_tokens"] = int(next((x for x in lengths if x is not None), max_gen_toks))
    # Without do_sample a temperature asks for it. The model's own generation config may sample: a task does not.
    options.setdefault("do_sample", bool(options.get("temperature")))
    if not options["do_sample"]:
        options.pop("temperature", None)
    stops = {text for text in until if text}
    return {**options, "stop_strings": stops} if stops else options
