"""What the arguments of `ov_kvcrush-chat` mean, checked before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ov_kvcrush import native
from ov_kvcrush.cli.policy_options import PolicyOptions
from ov_kvcrush.config import CacheConfig, SchedulerConfig, check_engine
from ov_kvcrush.core.lookahead_params import NGRAM_SIZE, NUM_TOKENS
from ov_kvcrush.core.sampling_params import SamplingParams, make_generation_config
from ov_kvcrush.errors import CrushError, RequestError
from ov_kvcrush.genai.backend import genai_cache_properties
from ov_kvcrush.genai.eviction import translate
from ov_kvcrush.policies.base import Policy

DEFAULT_CHAT_POLICY = "kvcrush"
DEFAULT_MIN_TOKENS = 1024  # a chat of as many tokens keeps all of them
_MIB_PER_GIB = 1024


@dataclass(frozen=True)
class ChatOptions:
    """Model, engine and sampling of one run of the command.

    model: folder of an exported model; None = the default model.
    temperature: 0 = greedy. top_p: in (0, 1], 1 = no limit; only with a temperature above 0.
    engine, device: as in LLMPipeline.
    key_precision, value_precision: as in CacheConfig; None = the engine's default.
    max_kv_mb: limit of the KV store in MiB; None = by the free memory. openvino_genai takes whole GiB only.
    budget, recall_tokens, weights: as in CacheConfig. prompt_lookup: as in LLMPipeline.
    policy: what stays in the cache; without a name KVCrush with our engine, where it can evict, else everything.
        Where nothing says how much stays or in which precision: as much as a plan of DEFAULT_BUDGET.
    Raises RequestError or CrushError naming the first field that cannot be used.
    """

    model: str | None = None
    system: str = ""
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    engine: str | None = None
    device: str = "CPU"
    key_precision: str | None = None
    value_precision: str | None = None
    max_kv_mb: int | None = None
    policy: PolicyOptions = field(default_factory=PolicyOptions)
    budget: str | None = None
    recall_tokens: str | None = None
    weights: str | None = None
    prompt_lookup: bool = False

    def __post_init__(self) -> None:
        SamplingParams(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.temperature > 0,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )
        if self.top_p != 1 and self.temperature == 0:
            raise RequestError(f"top_p must be 1 while temperature is 0 (greedy), got {self.top_p}; set --temperature")
        make_generation_config(None, self.generation_options())
        self._check_cache(check_engine(self.engine, self.device))
        check_unicode("system", self.system)

    def _check_cache(self, engine: str) -> None:
        if self.max_kv_mb is not None and self.max_kv_mb < 1:
            raise CrushError(f"max_kv_mb must be at least 1, got {self.max_kv_mb}")
        if engine == "genai" and (self.max_kv_mb or 0) % _MIB_PER_GIB:
            raise CrushError(
                f"max_kv_mb must be a multiple of {_MIB_PER_GIB} with engine='genai', whose cache_size is in whole "
                f"GiB, got {self.max_kv_mb}"
            )
        config = self.cache_config()
        if engine == "genai" and config:
            translate(config.eviction_policy, self.device)
            genai_cache_properties(config, {})

    def cache_config(self) -> CacheConfig | None:
        """What the engine is told of precisions, of the store's limit and of what stays in it; None = nothing."""
        values: dict[str, Any] = {"key_precision": self.key_precision, "value_precision": self.value_precision}
        if self.max_kv_mb is not None and check_engine(self.engine, self.device) != "genai":
            values["max_bytes"] = self.max_kv_mb << 20
        values["policy"] = self.eviction_policy()
        values |= {"budget": self.budget, "recall_tokens": self.recall_tokens, "weights": self.weights}
        given = {name: value for name, value in values.items() if value is not None}
        return CacheConfig(**given) if given else None

    def eviction_policy(self) -> Policy | None:
        """What stays in the cache; None = everything. Raises CrushError for settings that contradict each other."""
        name, settings = self.policy.name, self.policy.settings()
        is_genai = check_engine(self.engine, self.device) == "genai"
        if name is None and settings and is_genai:
            raise CrushError(f"policy must be given with {min(settings)}: engine='genai' has none by default, got none")
        if self.policy.is_empty and (is_genai or native.why_unavailable()):
            return None
        has_precisions = self.key_precision is not None or self.value_precision is not None
        make = self.policy.build if has_precisions or is_genai else self.policy.build_open
        policy = make(name or DEFAULT_CHAT_POLICY, DEFAULT_MIN_TOKENS)
        return policy if policy.evicts else None

    def scheduler_config(self) -> SchedulerConfig | None:
        """What openvino_genai is told of the limit, and to keep the KV of a chat as it does by default; else None.

        It cannot keep the KV of a chat with a policy.
        """
        if self.max_kv_mb is None or check_engine(self.engine, self.device) != "genai":
            return None
        keeps_all = self.eviction_policy() is None
        return SchedulerConfig(cache_size=self.max_kv_mb // _MIB_PER_GIB, enable_prefix_caching=keeps_all)

    def generation_options(self) -> dict[str, Any]:
        """The options for `LLMPipeline.generate`; what is not among them stays as the model's own config has it."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.prompt_lookup:  # openvino_genai has no defaults of its own
            options |= {"num_assistant_tokens": NUM_TOKENS, "max_ngram_size": NGRAM_SIZE}
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "rng_seed": self.seed}
            if self.top_p != 1:
                options["top_p"] = self.top_p
        return options


def check_unicode(name: str, text: str) -> str:
    """Return `text`; raise RequestError if it came from bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} must be UTF-8 text, got other bytes after {error.start} characters") from None
    return text
