"""Settings of the engine: frozen, checked when built."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ov_kvcrush.errors import CrushError, nearest

ENGINES = ("crush", "genai")


@dataclass(frozen=True)
class SchedulerConfig:
    """What one step of the crush engine may do, and how much memory the KV cache may take.

    The names are openvino_genai's; its own `SchedulerConfig` is accepted wherever this one is.

    max_num_batched_tokens: rows of one inference, decode rows first, then prompt chunks.
    num_kv_blocks: capacity of the KV cache in blocks of 32 tokens; 0 = given by `cache_size`.
    cache_size: capacity in GiB; 0 with `num_kv_blocks=0` = half of the memory that is free when the model is loaded.
    dynamic_split_fuse: cut prompts into chunks; False = a prompt enters only whole.
    max_num_seqs: sequences that run at the same time.
    enable_prefix_caching: keep the KV of ended requests, and reuse it for prompts that begin with the same tokens.
    """

    max_num_batched_tokens: int = 512
    num_kv_blocks: int = 0
    cache_size: float = 0
    dynamic_split_fuse: bool = True
    max_num_seqs: int = 256
    enable_prefix_caching: bool = False

    def __post_init__(self) -> None:
        for name, minimum in (("max_num_batched_tokens", 1), ("num_kv_blocks", 0), ("max_num_seqs", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise CrushError(f"{name} must be an integer of at least {minimum}, got {value!r}")
        if isinstance(self.cache_size, bool) or not isinstance(self.cache_size, (int, float)) or self.cache_size < 0:
            raise CrushError(f"cache_size must be a number of GiB of at least 0, got {self.cache_size!r}")

    @classmethod
    def from_options(cls, options: Any = None) -> SchedulerConfig:
        """Build from None, this class, a dict, or openvino_genai.SchedulerConfig.

        Raises CrushError for an unknown field and for features that this engine does not have.
        """
        if options is None:
            return cls()
        if isinstance(options, cls):
            return options
        known = [f.name for f in fields(cls)]
        if isinstance(options, dict):
            for name in options:
                if name not in known:
                    raise CrushError(
                        f"scheduler option must be one of {', '.join(known)}, got {name!r}{nearest(name, known)}"
                    )
            return cls(**options)
        if not all(hasattr(options, name) for name in known):
            raise CrushError(f"scheduler_config must be a SchedulerConfig or a dict, got {type(options).__name__}")
        for feature in ("use_cache_eviction", "use_sparse_attention"):
            if getattr(options, feature, False):
                raise CrushError(f"{feature} must be False with engine='crush', got True; engine='genai' runs it")
        values = {name: getattr(options, name) for name in known}
        return cls(**values)


def check_engine(engine: str | None, device: str) -> str:
    """Return the engine to use: the one asked for, else "crush" on CPU and "genai" on every other device."""
    if engine is None:
        return "crush" if device.upper().split(".")[0] == "CPU" else "genai"
    if engine not in ENGINES:
        raise CrushError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}{nearest(engine, ENGINES)}")
    if engine == "crush" and device.upper().split(".")[0] != "CPU":
        raise CrushError(f"device must be CPU with engine='crush', got {device!r}; use engine='genai' on other devices")
    return engine
