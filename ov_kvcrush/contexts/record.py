"""All that a context's file holds, checked when built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ov_kvcrush.errors import ContextFileError
from ov_kvcrush.model.fingerprints import FINGERPRINT_FIELDS, token_ids_fingerprint

LAYOUT_VERSION = 1
DTYPES: dict[str, np.dtype[Any]] = {
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U8": np.dtype("u1"),
}
# dtype and number of axes of each array, in their order in the file: those of the largest numbers first
ARRAYS = {
    "ids": ("I64", 1),
    "heads": ("I64", 2),
    "carried_offsets": ("I64", 1),
    "representatives_offsets": ("I64", 1),
    "carried": ("F32", 1),
    "representatives": ("I32", 1),
    "tiles": ("U8", 1),
}
REQUIRED = ("ids", "heads", "tiles")

Array = npt.NDArray[Any]
PerHead = tuple[tuple[Array, ...], ...]  # [layer][KV head]


@dataclass(frozen=True, eq=False)
class ContextRecord:
    """All that a file holds. Raises ContextFileError for what no file could hold.

    ids: int64 (S,), the text's tokens. heads: int64 (KV heads of all layers, 2 or more) and tiles: uint8 (bytes,), as
    from `Store.dump`. fingerprint: what it was made with, one text for each of FINGERPRINT_FIELDS.
    policy: as from `settings_of`. extra: what else the caller needs, as JSON
    has it. num_evicted, num_choices and representatives (int32) as in EvictionState; carried (float32) is its
    policy_state.
    """

    ids: Array
    heads: Array
    tiles: Array
    fingerprint: Mapping[str, str]
    policy: Mapping[str, Any] = field(default_factory=dict)
    num_evicted: int = 0
    num_choices: int = 0
    carried: PerHead | None = None
    representatives: PerHead | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in REQUIRED:
            _check_array(name, getattr(self, name), *ARRAYS[name])
        if self.ids.size and int(self.ids.min()) < 0:
            raise ContextFileError(f"ids must be at least 0, got {int(self.ids.min())}")
        if self.heads.shape[1] < 2:
            raise ContextFileError(f"heads must have at least 2 columns, got {self.heads.shape[1]}")
        self._check_kept()
        self._check_fingerprint()

    @property
    def policy_state(self) -> PerHead | None:
        """`carried`, by the name that EvictionState has for it."""
        return self.carried

    def _check_kept(self) -> None:
        for name, limit in (("num_evicted", len(self.ids)), ("num_choices", 2**53)):
            if not 0 <= getattr(self, name) <= limit:
                raise ContextFileError(f"{name} must be in 0..{limit}, got {getattr(self, name)}")
        shapes = set()
        for name in ("carried", "representatives"):
            per_head = getattr(self, name)
            for array in (head for layer in per_head or () for head in layer):
                _check_array(name, array, *ARRAYS[name])
            if per_head is not None:
                shapes.add(tuple(map(len, per_head)))
                if sum(map(len, per_head)) != len(self.heads):
                    raise ContextFileError(
                        f"{name} must have an array for each of the {len(self.heads)} heads, got "
                        f"{sum(map(len, per_head))}"
                    )
        if len(shapes) > 1:
            raise ContextFileError(f"representatives must have the layers that carried has, got {shapes}")

    def _check_fingerprint(self) -> None:
        check_types(self.fingerprint.values(), str)
        if set(self.fingerprint) != set(FINGERPRINT_FIELDS):
            raise ContextFileError(
                f"fingerprint must have the fields {', '.join(FINGERPRINT_FIELDS)}, got {', '.join(self.fingerprint)}"
            )
        for name, value in {
            "layout_version": str(LAYOUT_VERSION),
            "token_ids": token_ids_fingerprint(self.ids),
        }.items():
            if self.fingerprint[name] != value:
                raise ContextFileError(f"{name} must be {value}, got {self.fingerprint[name]}")


def _check_array(name: str, array: Any, dtype: str, ndim: int) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != DTYPES[dtype] or array.ndim != ndim:
        got = f"{array.dtype} with {array.ndim}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ContextFileError(f"{name} must be an array of {DTYPES[dtype].name} with {ndim} axes, got {got}")


def check_types(values: Iterable[Any], kind: type) -> None:
    for value in values:
        if type(value) is not kind:
            raise ContextFileError(f"values must be of type {kind.__name__}, got {value!r}")
