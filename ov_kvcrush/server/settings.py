"""What the arguments of `ov_kvcrush-serve` mean, checked before a model is loaded."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from ov_kvcrush.config import CacheConfig, SchedulerConfig
from ov_kvcrush.errors import CrushError
from ov_kvcrush.model.default import DEFAULT_MODEL_NAME
from ov_kvcrush.utils.checks import check_choice, check_integer, check_number, check_string

_ADAPTER_FILE = "adapter_model.safetensors"  # of the folders that PEFT writes
TOOL_FORMATS = ("auto", "hermes", "llama")


@dataclass(frozen=True)
class ServerSettings:
    """One server. Raises CrushError naming the first field that cannot be used.

    model: folder of an exported model; None = the default model. alias: its name in the API; None = the folder's.
    host, port: where it listens; 0 = any free port.
    api_keys: who sends one of them may ask, and has contexts and cached prefixes of its own. None = anybody who reaches
        the server, which must then listen on this machine only.
    budget, max_kv_mb: as CacheConfig's budget and max_bytes; budget also compresses prompts of requests.
    max_waiting: requests that may wait for their turn; one more is answered with 429.
    contexts_dir: folder that keeps contexts; None = they are gone when the server is.
    max_contexts_mb: MiB of the store that contexts may hold at a time; None = half of it.
    max_contexts: contexts of one key.
    share_prefixes: whether the prompts of one key may use the cached prefixes of another, who can then find out by
        timing what was asked.
    max_body_mb: the longest body, but for files of contexts, which have max_upload_mb.
    request_timeout_s: after which a request ends with 408, wherever it is. body_timeout_s: that a body may take.
    idle_timeout_s: that a connection may say nothing. drain_timeout_s: that running requests have when the server is
        told to end.
    tool_format: what a model writes to call a tool; "auto" = by its chat template.
    adapters: LoRA adapters, each as NAME=PATH: PEFT's folder or the file in it. Its name is that of a model in the API.
    """

    model: str | None = None
    alias: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    budget: float | str | None = None
    max_kv_mb: int | None = None
    max_waiting: int = 256
    contexts_dir: str | Path | None = None
    max_contexts_mb: int | None = None
    max_contexts: int = 1000
    share_prefixes: bool = False
    max_body_mb: int = 16
    max_upload_mb: int = 2048
    request_timeout_s: float = 600
    body_timeout_s: float = 30
    idle_timeout_s: float = 30
    drain_timeout_s: float = 120
    tool_format: str = "auto"
    adapters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("model", "alias"):
            if getattr(self, name) is not None:
                check_string(name, getattr(self, name))
        check_string("host", self.host)
        minima = {"port": 0, "max_waiting": 1, "max_contexts": 1, "max_body_mb": 1, "max_upload_mb": 1}
        for name, minimum in minima.items():
            check_integer(name, getattr(self, name), minimum)
        if self.port > 65535:
            raise CrushError(f"port must be at most 65535, got {self.port}")
        for name in ("max_kv_mb", "max_contexts_mb"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        for name in ("request_timeout_s", "body_timeout_s", "idle_timeout_s", "drain_timeout_s"):
            check_number(name, getattr(self, name), 0.1)
        check_choice("tool_format", self.tool_format, TOOL_FORMATS)
        self._check_keys()
        self._check_adapters()
        self.cache_config()

    def _check_keys(self) -> None:
        object.__setattr__(self, "api_keys", tuple(self.api_keys))
        for key in self.api_keys:
            if not isinstance(key, str) or not key or not key.isascii() or not key.isprintable() or " " in key:
                raise CrushError("api_keys must be printable ASCII without blanks, got one that is not")
        if not self.api_keys and not self.is_local:
            raise CrushError(
                f"api_keys must have at least one where others can reach the server, got none with host={self.host!r}; "
                "give --api-key, or --host 127.0.0.1"
            )

    def _check_adapters(self) -> None:
        object.__setattr__(self, "adapters", tuple(self.adapters))
        names = {self.model_name}
        for adapter in self.adapters:
            name, _, path = adapter.partition("=") if isinstance(adapter, str) else ("", "", "")
            if not name.strip() or not path:
                raise CrushError(f"adapters must be NAME=PATH, got {adapter!r}")
            if name in names:
                raise CrushError(f"adapters must have names of their own beside the model's, got {name!r} twice")
            names.add(name)

    @property
    def adapter_paths(self) -> dict[str, Path]:
        """The files of adapters by their names."""
        named = (adapter.partition("=") for adapter in self.adapters)
        return {name: Path(path, _ADAPTER_FILE) if Path(path).is_dir() else Path(path) for name, _, path in named}

    @property
    def is_local(self) -> bool:
        """Whether nobody outside this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def model_name(self) -> str:
        """The model's name in the API."""
        if self.alias is not None:
            return self.alias
        return DEFAULT_MODEL_NAME if self.model is None else Path(self.model).resolve().name

    def cache_config(self) -> CacheConfig:
        """What the engine is told of its store. Raises CrushError."""
        return CacheConfig(budget=self.budget, max_bytes=(self.max_kv_mb or 0) << 20)

    def scheduler_config(self) -> SchedulerConfig:
        """What the engine is told of its queue and of prefixes."""
        return SchedulerConfig(max_waiting=self.max_waiting, enable_prefix_caching=True)
