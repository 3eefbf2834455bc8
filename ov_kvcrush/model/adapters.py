"""LoRA adapters (Hu et al., arXiv 2106.09685): openvino_genai's two classes, which here remember what they hold.

openvino_genai shows nothing of its adapters to Python, so what the graph needs is read from the same file, and the
objects are kept by the config that they were given to. Files are those that PEFT writes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openvino as ov
import openvino_genai as ov_genai
import safetensors

from ov_kvcrush.errors import ContextFileError, CrushError, RequestError, reason_of

_WEIGHT = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")
_BASE = re.compile(r"base_model\.model\.(?P<module>.+)\.base_layer\.weight")
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class LowRank(NamedTuple):
    """What is added to one product: x A^T B^T. a: float32 (r, inputs); b: float32 (outputs, r)."""

    a: np.ndarray
    b: np.ndarray


class Adapter(ov_genai.Adapter):  # type: ignore[misc]
    """A LoRA adapter: the file `adapter_model.safetensors` that PEFT writes, by its path or read into an ov.Tensor.

    Raises CrushError, naming the tensor, for a file that holds anything but LoRA of linear layers in finite numbers.
    """

    def __init__(self, source: str | os.PathLike[str] | ov.Tensor) -> None:
        self._path = None if isinstance(source, ov.Tensor) else Path(source)
        self.name = "a tensor" if self._path is None else str(self._path)
        data = _content(self._path) if self._path else np.asarray(source.data).tobytes()  # type: ignore[union-attr]
        self.digest = hashlib.sha256(data).hexdigest()[:16]
        self.layers, self.base_shapes = _layers(data, self.name)
        try:
            super().__init__(str(self._path) if self._path else source)
        except RuntimeError as error:
            raise CrushError(
                f"adapter {self.name!r} must be one that openvino_genai reads: {reason_of(error)}"
            ) from None

    @property
    def scaling(self) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora: the alpha with which PEFT itself runs the adapter.

        Neither openvino_genai nor this package multiplies by it. Raises CrushError where the file's
        `adapter_config.json` is not beside it, or has other values for some layers.
        """
        path = Path() if self._path is None else self._path.with_name("adapter_config.json")
        try:
            config = json.loads(path.read_text())
            if config.get("rank_pattern") or config.get("alpha_pattern"):
                raise CrushError(f"{path} must have one lora_alpha and one r for all layers, got patterns")
            rank, alpha = int(config["r"]), float(config["lora_alpha"])
            return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
            if isinstance(error, CrushError):
                raise
            raise CrushError(
                f"{path} must be PEFT's adapter_config.json with r and lora_alpha, got {error!r}"
            ) from None

    def __repr__(self) -> str:
        return f"Adapter({self.name!r})"


class AdapterConfig(ov_genai.AdapterConfig):  # type: ignore[misc]
    """Adapters and how much of each: openvino_genai's, with its members. alpha: what an adapter is multiplied by.

    AdapterConfig(), (adapter, alpha), ([adapter, ...]) or ([(adapter, alpha), ...]). The engine has no use for a mode.
    Raises CrushError for adapters that are not of this package's `Adapter`.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._objects: list[Adapter] = []
        self._keep(*args, *named.values())

    def _keep(self, *values: Any) -> None:
        self._remember(values)
        if len(self.get_adapters()) != len(super().get_adapters()):
            raise CrushError("adapters must be of ov_kvcrush.Adapter, got one that does not tell what it holds")

    def _remember(self, values: Any) -> None:
        for value in values:
            if isinstance(value, (list, tuple)):
                self._remember(value)
            elif isinstance(value, Adapter) and not any(value is known for known in self._objects):
                self._objects.append(value)

    def add(self, adapter: Any, *alpha: Any, **named: Any) -> AdapterConfig:
        """One more adapter."""
        super().add(adapter, *alpha, **named)
        self._keep(adapter, *named.values())
        return self

    def remove(self, adapter: Any) -> AdapterConfig:
        """One less."""
        super().remove(adapter)
        return self

    def set_alpha(self, adapter: Any, alpha: float) -> AdapterConfig:
        """Another alpha of one that is there."""
        super().set_alpha(adapter, alpha)
        return self

    def set_adapters_and_alphas(self, adapters: Any) -> None:
        """These and no others."""
        super().set_adapters_and_alphas(adapters)
        self._keep(adapters)

    def get_adapters(self) -> list[Adapter]:
        """Those that were given, in the order in which they were first."""
        return [adapter for adapter in self._objects if alpha_of(self, adapter) is not None]

    def get_adapters_and_alphas(self) -> list[tuple[Adapter, float]]:
        """The same, each with its alpha."""
        return [(x, alpha) for x in self._objects if (alpha := alpha_of(self, x)) is not None]


@dataclass(frozen=True)
class AdapterParams:
    """Which adapters the rows of one request run with.

    alphas: of each adapter of the model, 0 = off; none where the model has no adapters. key: text that is equal where
    keys and values are computed alike, "" = without any adapter.
    """

    alphas: tuple[float, ...] = ()
    key: str = ""


NO_ADAPTERS = AdapterParams()


@dataclass(frozen=True, eq=False)
class ModelAdapters:
    """The adapters that a model was loaded with, and what requests may ask of them.

    default: of requests that name none.
    """

    adapters: tuple[Adapter, ...] = ()
    default: AdapterParams = field(default=NO_ADAPTERS)

    @classmethod
    def of(cls, config: ov_genai.AdapterConfig | None) -> ModelAdapters:
        """Those of a pipeline's config. Raises CrushError for some that do not tell what they hold."""
        check_own(config)
        if not config:
            return cls()
        registered = cls(tuple(config.get_adapters()))
        return cls(registered.adapters, registered.choose(config))

    def choose(self, config: ov_genai.AdapterConfig | None) -> AdapterParams:
        """What a request asks for; None = the default.

        Raises RequestError for adapters that the model was not loaded with, and for alphas that are not finite.
        """
        if config is None:
            return self.default
        found = [alpha_of(config, adapter) for adapter in self.adapters]
        asked = config.get_adapters()
        if len(asked) > sum(alpha is not None for alpha in found):
            own = [x for x in asked if isinstance(x, Adapter) and not any(x is known for known in self.adapters)]
            others = ", ".join(repr(x.name) for x in own) or "others"
            known = ", ".join(repr(x.name) for x in self.adapters) or "none"
            raise RequestError(f"adapters must be objects that the pipeline was made with, {known}, got {others}")
        return self._params([alpha or 0.0 for alpha in found])

    def from_key(self, key: str) -> AdapterParams:
        """What a context in a file was read with. Raises ContextFileError for adapters that are not there."""
        alphas = [0.0] * len(self.adapters)
        digests = [adapter.digest for adapter in self.adapters]
        for part in key.split(", ") if key else ():
            digest, _, alpha = part.partition(":")
            if digest not in digests:
                raise ContextFileError(
                    f"adapters of the context must be among those that the pipeline was made with, got {digest}, "
                    "the SHA-256 of another file"
                )
            try:
                alphas[digests.index(digest)] += float(alpha)
            except ValueError:
                raise ContextFileError(f"adapters must be digests with numbers, got {part!r}") from None
        return self._params(alphas)

    def _params(self, alphas: list[float]) -> AdapterParams:
        for adapter, alpha in zip(self.adapters, alphas, strict=True):
            if not math.isfinite(alpha):
                raise RequestError(f"alpha of adapter {adapter.name!r} must be a finite number, got {alpha}")
        on = [f"{x.digest}:{alpha!r}" for x, alpha in zip(self.adapters, alphas, strict=True) if alpha]
        return AdapterParams(tuple(alphas), ", ".join(sorted(on)))


def alpha_of(config: ov_genai.AdapterConfig, adapter: Adapter) -> float | None:
    """How much of `adapter` the config asks for; None = it does not name it."""
    try:
        return float(config.get_alpha(adapter))
    except RuntimeError:
        return None


def check_own(config: Any) -> None:
    """Raise CrushError for what is no config of this package's adapters; openvino_genai's may be empty."""
    if config is None or isinstance(config, AdapterConfig):
        return
    if not isinstance(config, ov_genai.AdapterConfig):
        raise CrushError(f"adapters must be an AdapterConfig, got {type(config).__name__}")
    if config.get_adapters():
        raise CrushError(
            "adapters must be an ov_kvcrush.AdapterConfig of ov_kvcrush.Adapter objects, got openvino_genai's own, "
            "which do not tell what they hold"
        )


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CrushError(
            f"adapter must be a file that can be read, got {str(path)!r}: {error.strerror or error}"
        ) from None


def _layers(data: bytes, name: str) -> tuple[dict[str, LowRank], dict[str, tuple[int, ...]]]:
    """The matrices of each module, and the shapes of base weights, which PEFT repeats beside those of an LM head."""
    try:
        tensors: dict[str, Any] = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise CrushError(f"adapter {name!r} must be a safetensors file, got: {error}") from None
    matrices: dict[str, dict[str, np.ndarray]] = {}
    bases: dict[str, tuple[int, ...]] = {}
    for tensor, content in tensors.items():
        if base := _BASE.fullmatch(tensor):
            bases[base["module"]] = tuple(content["shape"])
            continue
        found = _WEIGHT.fullmatch(tensor)
        if found is None or len(content["shape"]) != 2:
            raise CrushError(
                f"adapter {name!r} must hold LoRA of linear layers only, as PEFT writes it: tensors [r, inputs] and "
                f"[outputs, r] named base_model.model.<module>.lora_A.weight and .lora_B.weight, got {tensor!r} of "
                f"shape {content['shape']}"
            )
        matrices.setdefault(found["module"], {})[found["matrix"]] = _values(content, tensor, name)
    layers = {module: _pair(pair, module, name) for module, pair in matrices.items()}
    if not layers:
        raise CrushError(f"adapter {name!r} must hold LoRA, got a file without any")
    return layers, bases


def _values(content: Mapping[str, Any], tensor: str, name: str) -> np.ndarray:
    dtype = content["dtype"]
    if dtype not in _DTYPES:
        raise CrushError(f"tensor {tensor!r} of adapter {name!r} must be of {', '.join(_DTYPES)}, got {dtype}")
    values = np.frombuffer(content["data"], _DTYPES[dtype]).reshape(content["shape"])
    with np.errstate(over="ignore"):
        values = (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values.astype(np.float32)
    # Rows that the adapter is off for multiply with it too: 0 times what is not finite would be theirs.
    if not np.isfinite(values).all():
        raise CrushError(f"tensor {tensor!r} of adapter {name!r} must have finite numbers, got others")
    return values


def _pair(pair: Mapping[str, np.ndarray], module: str, name: str) -> LowRank:
    for matrix in "AB":
        if matrix not in pair:
            raise CrushError(f"adapter {name!r} must have the tensor {tensor_name(module, matrix)!r}, got none")
    low = LowRank(pair["A"], pair["B"])
    if low.a.shape[0] != low.b.shape[1] or not low.a.shape[0]:
        raise CrushError(
            f"tensor {tensor_name(module, 'B')!r} of adapter {name!r} must be [outputs, {low.a.shape[0]}] as its A is "
            f"{list(low.a.shape)}, got {list(low.b.shape)}"
        )
    return low


def tensor_name(module: str, matrix: str) -> str:
    """As PEFT names it. matrix: A or B."""
    return f"base_model.model.{module}.lora_{matrix}.weight"
