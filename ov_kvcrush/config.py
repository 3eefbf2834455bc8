"""Settings of the engine: frozen, checked when built."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from ov_kvcrush.errors import CrushError
from ov_kvcrush.policies.base import Policy
from ov_kvcrush.policies.registry import PolicyLike, as_policy, name_of
from ov_kvcrush.utils.checks import check_choice, check_fraction, check_integer, check_number, known_options

ENGINES = ("crush", "genai")
PRECISIONS = ("f32", "bf16", "f16", "u8", "u4", "u2")
DEFAULT_BUDGET = "1/6"  # of the bf16 cache: where tokens are to be evicted and nobody says how many stay
LEAST_RECALL = 64  # tokens: two tiles
ATTENTIONS = ("auto", "crush", "paged")
WEIGHTS = ("auto", "packed", "plugin")
OWN_SCHEDULER_FIELDS = ("max_step_ms", "max_waiting")  # openvino_genai's SchedulerConfig has no such thing
_PRECISION_PROPERTIES = ("KV_CACHE_PRECISION", "KEY_CACHE_PRECISION", "VALUE_CACHE_PRECISION")


@dataclass(frozen=True)
class SchedulerConfig:
    """What one step of the crush engine may do, and how much memory the KV cache may take.

    The names are openvino_genai's; its own `SchedulerConfig` is accepted wherever this one is.

    max_num_batched_tokens: rows of one inference, decode rows first, then prompt chunks.
    num_kv_blocks: capacity of the KV cache in blocks of 32 tokens; 0 = given by `cache_size`.
    cache_size: capacity in GiB; 0 with `num_kv_blocks=0` = half of the memory that is free when the model is loaded.
    dynamic_split_fuse: cut prompts into chunks; False = a prompt enters only whole.
    max_num_seqs: sequences that run at the same time.
    enable_prefix_caching: keep the KV of ended requests, and reuse it for prompts of which at least half begins with
        the same tokens. As in openvino_genai, an LLMPipeline that is given no scheduler config does so.
    max_step_ms: bound on the time between two tokens of an answer while prompts are read beside it: chunks are as long
        as it allows, by what the last ones took. 0 = no bound. Prompts that nobody waits beside are not cut by it.
    max_waiting: requests that may wait for their turn; one more is refused with QueueFull. 0 = any number.
    """

    max_num_batched_tokens: int = 512
    num_kv_blocks: int = 0
    cache_size: float = 0
    dynamic_split_fuse: bool = True
    max_num_seqs: int = 256
    enable_prefix_caching: bool = False
    max_step_ms: float = 200
    max_waiting: int = 0

    def __post_init__(self) -> None:
        minima = {"max_num_batched_tokens": 1, "num_kv_blocks": 0, "max_num_seqs": 1, "max_waiting": 0}
        for name, minimum in minima.items():
            check_integer(name, getattr(self, name), minimum)
        check_number("max_step_ms", self.max_step_ms, 0)
        if isinstance(self.cache_size, bool) or not isinstance(self.cache_size, (int, float)) or self.cache_size < 0:
            raise CrushError(f"cache_size must be a number of GiB of at least 0, got {self.cache_size!r}")

    def to_string(self) -> str:
        """The settings, one a line, as openvino_genai writes its own."""
        shown = {f.name: getattr(self, f.name) for f in fields(self)}
        lines = [
            f"  {name}: {str(value).lower() if isinstance(value, bool) else value}" for name, value in shown.items()
        ]
        return "\n".join(["SchedulerConfig { ", *lines, " }"])

    @classmethod
    def from_options(cls, options: Any = None) -> SchedulerConfig:
        """Build from None, this class, a dict, or openvino_genai.SchedulerConfig.

        What openvino_genai's says of eviction is not among it: pipelines make a policy of it.
        Raises CrushError for an unknown field and for features that this engine does not have.
        """
        if options is None:
            return cls()
        if isinstance(options, cls):
            return options
        known = [f.name for f in fields(cls) if f.name not in OWN_SCHEDULER_FIELDS]
        if isinstance(options, dict):
            return cls(**known_options(options, cls, "scheduler option"))
        if not all(hasattr(options, name) for name in known):
            raise CrushError(f"scheduler_config must be a SchedulerConfig or a dict, got {type(options).__name__}")
        if getattr(options, "use_sparse_attention", False):
            raise CrushError("use_sparse_attention must be False with engine='crush', got True; engine='genai' runs it")
        values = {name: getattr(options, name) for name in known}
        return cls(**values)


@dataclass(frozen=True)
class CacheConfig:
    """How the crush engine stores keys and values.

    key_precision, value_precision: "f32", "bf16", "f16", "u8", "u4" or "u2", for tokens that left the recent window.
        Quantised keys have a scale per channel and 32 tokens, quantised values one per token and group of channels
        (KIVI, arXiv 2402.02750).
    recent_tokens: the newest tokens of every head that are not quantised; up to 31 more are not. They are kept in the
        precision the model computes in, but in f32 only beside keys or values in f32, else in bf16.
    group_size: channels that share a scale of quantised values: a multiple of 16. Where it does not divide the head
        size it is the largest number that divides both.
    max_bytes: limit of the store, never exceeded; 0 = by the SchedulerConfig's num_kv_blocks or cache_size.
    staging_bytes: full-precision blocks that prompts are read on, given back when a prompt is complete. Longer prompts
        are read chunk by chunk through the store, which is slower. 0 = enough for 65536 tokens, or for the model's
        context if that is longer, and at most a quarter of the free memory.
    prefix_bytes: what the KV of ended requests may hold, where it is kept for prompts that begin alike
        (`enable_prefix_caching`) or for a chat's next turn; the least recently used goes first, and all of it gives way
        to requests that need it. 0 = what is free of a store whose size is given; of one that takes half of the free
        memory a quarter, but the latest stays whatever it holds. Contexts do not count: they are their holder's.
    policy: which tokens stay: a Policy of `ov_kvcrush.policies`, a name, or a dict with "name" and settings; None =
        all. A request may ask for another.
    budget: bytes of the cache over those of a bf16 cache of all tokens, as "1/8" or 0.125: a plan says how many tokens
        each KV head keeps and at which precision, solved from the model's profile (`ov_kvcrush-profile`), or without
        one taken from a ladder of uniform settings. `policy` says which tokens, by default the profile's or KVCrush;
        how many is the budget's. budget_bytes: the same as a number of bytes for each text. Without any of these a
        policy by its name or by settings without kept and kept_tokens, here or of a request or a context, has a plan of
        DEFAULT_BUDGET, a sixth, where the precisions are left alone too; its min_tokens in u8 are always within it.
        That costs less in as many bytes than 25 % of the tokens in u8. Who names kept, kept_tokens, precisions or how
        heads share (split, pyramidkv, adakv, kv_compress, leankv), or gives a Policy, gets what that says.
    quality: instead of a budget: the fewest bytes at which nine of ten texts are predicted to keep a KL divergence of
        the next-token distribution to the full cache of at most this, in nats. Needs a profile.
    profile: file of the profile; None = kv_profile.json in the model's folder, if it is there, and for contexts, whose
        question comes later, kv_profile.unknown.json if that is.
    shared_layers: layers of the model that read the keys and values of an earlier layer and have none of their own
        (KVSharer, arXiv 2410.18517): a mapping from layer to layer, kept as pairs in order, such as
        `eval/calibrate/kv_sharer.py` finds. Both must have the same heads, head size and sliding window, and a layer
        that is read reads none. The model is loaded with them, so a pipeline made by `with_cache` has the first's.
    recall_tokens: tokens that a decode step reads of each KV head, beside the first ones of the text and the recent
        window: those of the tiles whose mean keys its queries are closest to (docs/recall.md). Everything stays
        stored. An integer of at least 64, or a fraction below 1 of what the head holds, as 0.1 or "1/8"; None = all.
        Steps of more than four rows of a sequence read everything.
    attention: "crush" = the store; "paged" = OpenVINO's own PagedAttention, with none of the above; "auto" = "crush"
        where the native library is there, else "paged".
    weights: how steps of up to eight rows read the compressed weights of MLPs, LM head and projections of 4 bits
        (docs/weights.md): "packed" = from a copy in the order in which our products read it,
        `LoadedModel.packed_bytes`; "plugin" = as OpenVINO does, with no copy; "auto" = "packed" beside
        attention="crush" where the copy takes at most a quarter of the free memory, unless OpenVINO is told not to
        quantise what weights are multiplied with (DYNAMIC_QUANTIZATION_GROUP_SIZE=0). The model is loaded with them, so
        a pipeline made by `with_cache` has the first's.
    """

    key_precision: str = "u8"
    value_precision: str = "u8"
    recent_tokens: int = 32
    group_size: int = 64
    max_bytes: int = 0
    staging_bytes: int = 0
    prefix_bytes: int = 0
    policy: PolicyLike = None
    shared_layers: Mapping[int, int] | tuple[tuple[int, int], ...] = ()
    attention: str = "auto"
    budget: float | str | None = None
    budget_bytes: int = 0
    quality: float | None = None
    profile: str | Path | None = None
    recall_tokens: int | float | str | None = None
    weights: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", as_policy(self.policy))
        object.__setattr__(self, "shared_layers", _layer_pairs(self.shared_layers))
        for name in ("key_precision", "value_precision"):
            check_choice(name, getattr(self, name), PRECISIONS)
        check_choice("attention", self.attention, ATTENTIONS)
        check_choice("weights", self.weights, WEIGHTS)
        if self.weights == "packed" and self.attention == "paged":
            raise CrushError("weights must be 'auto' or 'plugin' with attention='paged', got 'packed'")
        minima = {"recent_tokens": 0, "group_size": 16, "max_bytes": 0, "staging_bytes": 0, "prefix_bytes": 0}
        for name, minimum in minima.items():
            check_integer(name, getattr(self, name), minimum)
        if self.group_size % 16:
            raise CrushError(f"group_size must be a multiple of 16, got {self.group_size}")
        self._check_budget()
        if self.recall_tokens is not None:
            object.__setattr__(self, "recall_tokens", parse_recall(self.recall_tokens))
            if self.attention == "paged":
                raise CrushError("recall_tokens must be left out with attention='paged', which has no store")

    def _check_budget(self) -> None:
        check_integer("budget_bytes", self.budget_bytes, 0)
        if self.budget is not None:
            object.__setattr__(self, "budget", parse_budget(self.budget))
        if self.quality is not None:
            check_number("quality", self.quality, 0)
        given = self._budgets
        if len(given) > 1:
            raise CrushError(f"only one of budget, budget_bytes and quality can be given, got {' and '.join(given)}")
        if not given:
            return
        if self.attention == "paged":
            raise CrushError(f"{given[0]} must be left out with attention='paged', which has no store")
        if (self.key_precision, self.value_precision) != ("u8", "u8"):
            raise CrushError(
                f"key_precision and value_precision must be left out with {given[0]}, whose plan chooses them, got "
                f"{self.key_precision!r}, {self.value_precision!r}"
            )

    @property
    def is_planned(self) -> bool:
        """Whether a plan says how many tokens stay, and at which precision."""
        return bool(self._budgets)

    @property
    def has_default_budget(self) -> bool:
        """Whether a policy that says nothing of how much stays has a plan of DEFAULT_BUDGET."""
        return not self.is_planned and (self.key_precision, self.value_precision) == ("u8", "u8")

    @property
    def _budgets(self) -> list[str]:
        """Names of the settings that ask for a plan."""
        none = {"budget": None, "budget_bytes": 0, "quality": None}
        return [name for name, value in none.items() if getattr(self, name) != value]

    @classmethod
    def from_options(cls, options: Any = None) -> CacheConfig:
        """Build from None, this class or a dict. Raises CrushError for an unknown field."""
        if options is None:
            return cls()
        if isinstance(options, cls):
            return options
        if not isinstance(options, dict):
            raise CrushError(f"cache_config must be a CacheConfig or a dict, got {type(options).__name__}")
        return cls(**known_options(options, cls, "cache option"))

    @property
    def eviction_policy(self) -> Policy | None:
        """`policy`, as it was made when this was built."""
        assert self.policy is None or isinstance(self.policy, Policy)
        return self.policy

    @property
    def sharing(self) -> tuple[tuple[int, int], ...]:
        """`shared_layers` as they were made when this was built: (layer, the one that it reads), ascending."""
        assert isinstance(self.shared_layers, tuple)
        return self.shared_layers

    def choose_attention(self) -> str:
        """Return "crush" or "paged". Warns where "auto" must do without the native library.

        Raises CrushError where "crush" was asked for without it, or precisions or shared layers for "paged".
        """
        from ov_kvcrush import native

        reason = native.why_unavailable() if self.attention != "paged" else None
        if self.attention == "crush" and reason:
            raise CrushError(f"attention must be 'paged' where the native library is missing, got 'crush': {reason}")
        if self.attention == "paged" and self.eviction_policy and self.eviction_policy.evicts:
            raise CrushError(f"policy must be 'none' with attention='paged', got {name_of(self.eviction_policy)!r}")
        if self.attention == "paged" and (self.key_precision, self.value_precision) != ("u8", "u8"):
            raise CrushError(
                "key_precision and value_precision must be left alone with attention='paged', got "
                f"{self.key_precision!r}, {self.value_precision!r}; it has the property KV_CACHE_PRECISION instead"
            )
        if self.sharing and (reason or self.attention == "paged"):
            where = f"where the native library is missing: {reason}" if reason else "with attention='paged'"
            raise CrushError(f"shared_layers must be left out {where}, got {dict(self.sharing)}")
        if reason:
            if self.weights == "packed":
                raise CrushError(f"weights must not be 'packed' where the native library is missing: {reason}")
            if self.recall_tokens is not None:
                raise CrushError(f"recall_tokens must be left out where the native library is missing: {reason}")
            if self.eviction_policy and self.eviction_policy.evicts:
                raise CrushError(f"policy must be 'none' where the native library is missing: {reason}")
            warnings.warn(
                f"the KV cache is not compressed: {reason}. Prompts and answers run on OpenVINO's PagedAttention, "
                "without key_precision, value_precision and max_bytes",
                RuntimeWarning,
                stacklevel=2,
            )
        return "paged" if reason or self.attention == "paged" else "crush"

    def with_properties(self, properties: dict[str, Any]) -> tuple[CacheConfig, dict[str, Any]]:
        """Take OpenVINO's properties of cache precision, where there are any, out of `properties`."""
        rest = {name: value for name, value in properties.items() if name not in _PRECISION_PROPERTIES}
        both, key, value = (_precision_name(properties.get(name)) for name in _PRECISION_PROPERTIES)
        key, value = key or both, value or both
        return replace(
            self, key_precision=key or self.key_precision, value_precision=value or self.value_precision
        ), rest


def parse_budget(value: Any) -> float:
    """A fraction in (0, 1], also as text: "1/8", "0.125". Raises CrushError."""
    found = value
    if isinstance(value, str):
        try:
            found = float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError):
            raise CrushError(f"budget must be a fraction such as 1/8 or 0.125, got {value!r}") from None
    check_fraction("budget", found)
    return float(found)


def parse_recall(value: Any) -> int | float:
    """Tokens, an integer of at least 64, or a fraction below 1, also as text: "2048", "1/8". Raises CrushError."""
    found = value
    if isinstance(value, str):
        try:
            number = Fraction(value.replace(" ", ""))
        except (ValueError, ZeroDivisionError):
            number = Fraction(0)
        found = int(number) if number.denominator == 1 else float(number)
    is_number = isinstance(found, (int, float)) and not isinstance(found, bool)
    if not is_number or not (0 < found < 1 or (isinstance(found, int) and found >= LEAST_RECALL)):
        raise CrushError(
            f"recall_tokens must be an integer of at least {LEAST_RECALL} or a fraction below 1, got {value!r}"
        )
    return int(found) if isinstance(found, int) else float(found)


def budget_text(budget: float) -> str:
    """A budget as people write it: 1/6 where it is one over a whole number, else a decimal. `parse_budget` reads it."""
    parts = round(1 / budget)
    return f"1/{parts}" if math.isclose(1 / parts, budget, rel_tol=1e-9) else repr(budget)


def _layer_pairs(shared: Any) -> tuple[tuple[int, int], ...]:
    """Pairs (layer, the one that it reads), ascending. Raises CrushError for what no model can be loaded with."""
    pairs = [tuple(pair) if isinstance(pair, Iterable) else pair for pair in _items(shared)]
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2 or any(type(x) is not int or x < 0 for x in pair):
            raise CrushError(f"shared_layers must be pairs of layers, integers of at least 0, got {pair!r}")
        if pair[1] >= pair[0]:
            raise CrushError(f"shared_layers must read earlier layers, got {pair[0]}: {pair[1]}")
    readers = dict(pairs)
    if len(readers) < len(pairs):
        raise CrushError(f"shared_layers must have each layer once, got {shared!r}")
    for layer, owner in pairs:
        if owner in readers:
            raise CrushError(
                f"shared_layers must read layers that have keys and values of their own, got {layer}: {owner} and "
                f"{owner}: {readers[owner]}"
            )
    return tuple(sorted(pairs))


def _items(shared: Any) -> Iterable[Any]:
    if isinstance(shared, Mapping):
        return shared.items()
    if isinstance(shared, (tuple, list)):
        return shared
    raise CrushError(f"shared_layers must be a mapping from layers to layers, or pairs, got {shared!r}")


def _precision_name(value: Any) -> str | None:
    """OpenVINO takes its types as objects and by name; a type's own name is written "bfloat16"."""
    if value is None:
        return None
    name = value.to_string() if hasattr(value, "to_string") else str(value)
    return str(name).lower()


def check_engine(engine: str | None, device: str) -> str:
    """Return the engine to use: the one asked for, else "crush" on CPU and "genai" on every other device."""
    if not isinstance(device, str):
        raise CrushError(f"device must be a name such as 'CPU', got {device!r}")
    if engine is None:
        return "crush" if device.upper().split(".")[0] == "CPU" else "genai"
    check_choice("engine", engine, ENGINES)
    if engine == "crush" and device.upper().split(".")[0] != "CPU":
        raise CrushError(f"device must be CPU with engine='crush', got {device!r}; use engine='genai' on other devices")
    return engine
