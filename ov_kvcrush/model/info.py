"""What the engine must know of a model beside its graph: the content of `ov_kvcrush.json`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ov_kvcrush.errors import ModelError, did_you_mean
from ov_kvcrush.model.hf_config import head_sizes, pick, rope_of, sliding_windows_of
from ov_kvcrush.utils.atomic import atomic_write

FILE_NAME = "ov_kvcrush.json"
FORMAT_VERSION = 1
MAX_JSON_BYTES = 4 << 20
_ABSENT_WHERE_NONE = ("attention_scores",)  # so that folders without them stay as they always were


@dataclass(frozen=True)
class ModelInfo:
    """Shape of a decoder-only model and where it came from; checked when built.

    num_layers, num_heads, num_kv_heads, k_head_size, v_head_size, hidden_size, vocab_size: counts, at least 1;
        num_heads is a multiple of num_kv_heads.
    context_length: tokens of prompt and answer together that the model was made for, or None if it says nothing.
    sliding_windows: one entry per layer: how many last tokens the layer attends to, or None for all of them.
    rope: `{"type", "theta", "scaling", "rotary_fraction"}` and, where sliding layers differ, `"local"` with the same
        keys; `{"type": "none"}` for models without rotary positions.
    weight_format: "fp32", "fp16", "int8", "int4", or "gguf-..." for a GGUF file's own; None when not recorded.
    source_sha256: hash over the weight files and the config that the model was made from; None when not recorded.
    attention_scores: last query rows that the scores of `openvino_model_scores.xml` are the mean of; None without it.

    Raises ModelError that names the field, its rule and the value.
    """

    architecture: str
    model_type: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    k_head_size: int
    v_head_size: int
    hidden_size: int
    vocab_size: int
    context_length: int | None
    sliding_windows: tuple[int | None, ...]
    rope: Mapping[str, Any]
    weight_format: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    source_name: str = ""
    source_sha256: str | None = None
    format_version: int = FORMAT_VERSION
    attention_scores: int | None = None

    def __post_init__(self) -> None:
        _check_count("format_version", self.format_version)
        if self.format_version != FORMAT_VERSION:
            raise ModelError(
                f"format_version must be {FORMAT_VERSION}, got {self.format_version}: export the model again, or use "
                "the version of ov-kvcrush that wrote it"
            )
        for name in ("architecture", "model_type", "source_name"):
            _check_text(name, getattr(self, name), empty=name == "source_name")
        for name in ("num_layers", "num_heads", "num_kv_heads", "k_head_size", "v_head_size", "hidden_size"):
            _check_count(name, getattr(self, name))
        _check_count("vocab_size", self.vocab_size)
        for name in ("context_length", "attention_scores"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        self._check_windows()
        _check_rope("rope", self.rope)
        self._check_origin()

    def _check_windows(self) -> None:
        if not isinstance(self.sliding_windows, tuple) or len(self.sliding_windows) != self.num_layers:
            raise ModelError(
                f"sliding_windows must be one entry for each of {self.num_layers} layers, got {self.sliding_windows!r}"
            )
        for layer, window in enumerate(self.sliding_windows):
            if window is not None:
                _check_count(f"sliding_windows[{layer}]", window)

    def _check_origin(self) -> None:
        if self.weight_format is not None:
            _check_text("weight_format", self.weight_format)
        if not isinstance(self.versions, Mapping) or not all(
            isinstance(k, str) and isinstance(v, str) for k, v in self.versions.items()
        ):
            raise ModelError(f"versions must be an object of package names and versions, got {self.versions!r}")
        digest = self.source_sha256
        if digest is not None and not (
            isinstance(digest, str) and len(digest) == 64 and set(digest) <= set("0123456789abcdef")
        ):
            raise ModelError(f"source_sha256 must be 64 lower-case hexadecimal digits or null, got {digest!r}")

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], **origin: Any) -> ModelInfo:
        """Derive the model's shape from a parsed Hugging Face `config.json`.

        config: the parsed object; names used by older model families (n_layer, n_embd, ...) are understood.
        origin: weight_format, versions, source_name, source_sha256, as in the class.
        Raises ModelError that names the key which is missing or broken.
        """
        num_layers = pick(config, "num_layers")
        architectures = config.get("architectures")
        named = isinstance(architectures, list) and architectures and isinstance(architectures[0], str)
        k_head_size, v_head_size = head_sizes(config)
        return cls(
            architecture=architectures[0] if named else "unknown",  # type: ignore[index]
            model_type=config.get("model_type", "unknown"),
            num_layers=num_layers,
            num_heads=pick(config, "num_heads"),
            num_kv_heads=pick(config, "num_kv_heads"),
            k_head_size=k_head_size,
            v_head_size=v_head_size,
            hidden_size=pick(config, "hidden_size"),
            vocab_size=pick(config, "vocab_size"),
            context_length=pick(config, "context_length", optional=True),
            sliding_windows=sliding_windows_of(config, num_layers),
            rope=rope_of(config),
            **origin,
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelInfo:
        """Build from the parsed content of `ov_kvcrush.json`; a missing or unknown field raises ModelError."""
        names = [f.name for f in dataclasses.fields(cls)]
        version = data.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:  # its fields may be new: say so before naming them
            raise ModelError(f"format_version must be {FORMAT_VERSION}, got {version}: use a newer ov-kvcrush")
        for name in data:
            if name not in names:
                hint = did_you_mean(name, names)
                raise ModelError(f"{name!r} must be a field of {FILE_NAME}{hint}, got an unknown one")
        for name in names:
            if name not in data and name not in _ABSENT_WHERE_NONE:
                raise ModelError(f"{name} must be present in {FILE_NAME}, got nothing: export the model again")
        values = dict(data)
        if isinstance(values["sliding_windows"], list):
            values["sliding_windows"] = tuple(values["sliding_windows"])
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values; `from_json` of it equals this object."""
        data = dataclasses.asdict(self)
        data["sliding_windows"] = list(self.sliding_windows)
        return {name: value for name, value in data.items() if value is not None or name not in _ABSENT_WHERE_NONE}

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> ModelInfo | None:
        """Read `ov_kvcrush.json` of a model folder; None if there is no such file, ModelError if it is broken."""
        path = Path(folder) / FILE_NAME
        data = read_json_object(path)
        if data is None:
            return None
        try:
            return cls.from_json(data)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from None

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write `ov_kvcrush.json` into an existing folder, whole or not at all; returns its path."""
        path = Path(folder) / FILE_NAME
        atomic_write(path, [(json.dumps(self.to_json(), indent=2) + "\n").encode()])
        return path


def read_model_info(folder: str | os.PathLike[str]) -> ModelInfo | None:
    """Return what is known of a model folder: `ov_kvcrush.json`, else what `config.json` says, else None.

    Raises ModelError if the file that is there is broken.
    """
    info = ModelInfo.read(folder)
    if info is not None:
        return info
    path = Path(folder) / "config.json"
    config = read_json_object(path)
    if config is None:
        return None
    try:
        return ModelInfo.from_hf_config(config, source_name=Path(folder).name)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def read_json_object(path: Path) -> dict[str, Any] | None:
    """Parse a small JSON file that must hold one object; None if it does not exist, ModelError if it is broken."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ModelError(f"{path} must be at most {MAX_JSON_BYTES} bytes, got {size}")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ModelError(f"{path} must be readable, got: {error}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path} must be valid JSON, got: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{name} must be a whole number of at least 1, got {value!r}")


def _check_text(name: str, value: object, empty: bool = False) -> None:
    if not isinstance(value, str) or not (value or empty):
        raise ModelError(f"{name} must be a {'' if empty else 'non-empty '}string, got {value!r}")


def _check_rope(name: str, rope: object) -> None:
    if not isinstance(rope, Mapping) or not isinstance(rope.get("type"), str):
        raise ModelError(f"{name} must be an object with a string 'type', got {rope!r}")
    if rope["type"] == "none":
        return
    theta, fraction = rope.get("theta"), rope.get("rotary_fraction")
    if not _number(theta) > 0:
        raise ModelError(f"{name}.theta must be a number above 0, got {theta!r}")
    if not 0 < _number(fraction) <= 1:
        raise ModelError(f"{name}.rotary_fraction must be in (0, 1], got {fraction!r}")
    if not isinstance(rope.get("scaling", {}), Mapping | None):
        raise ModelError(f"{name}.scaling must be an object or null, got {rope['scaling']!r}")
    if rope.get("local") is not None:
        _check_rope(f"{name}.local", rope["local"])


def _number(value: object) -> float:
    """The value if it is a finite number, else NaN, which no comparison holds for."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf"):
        return value
    return float("nan")
