"""One compressed context in one file: safetensors layout, with a checksum over every byte.

    8 bytes         length of the header, little endian
    header          JSON: "__metadata__" first, and in it "format", "layout_version" and "sha256", as `_MAGIC` has
                    them; then dtype, shape and place of each array
    arrays          one behind the other, in the order of ARRAYS, so that each lies at a multiple of its numbers' size

Any reader of safetensors can open it. It is read and written here, not with the safetensors package, since that copies
arrays out of the file, and since the digest is of the header too (its own 64 characters as zeros): no byte of the file
can change unseen. A digest keeps damage out, not malice: what it covers is checked all the same, and the tiles are by
`Store.load`.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ov_kvcrush.core.snapshot import FrozenPerHead
from ov_kvcrush.errors import ContextFileError, did_you_mean
from ov_kvcrush.model.fingerprints import FINGERPRINT_FIELDS, NO_ADAPTER, NOT_SHARED, token_ids_fingerprint
from ov_kvcrush.utils.atomic import atomic_write

_FORMAT = "ov_kvcrush.context"
BEGINNING = b'{"__metadata__":{"format":"%b",' % _FORMAT.encode()  # behind 8 bytes of the header's length
_MAGIC = re.compile(re.escape(BEGINNING) + rb'"layout_version":"(\d{1,9})","sha256":"([0-9a-f]{64})"[,}]')
_NO_DIGEST = "0" * 64
_MAX_HEADER = 16 << 20  # bytes
LAYOUT_VERSION = 2
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
    carried: FrozenPerHead | None = None
    representatives: FrozenPerHead | None = None
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


# -- writing -----------------------------------------------------------------------------------------------------------


def save_context(path: str | os.PathLike[str], record: ContextRecord) -> None:
    """Write a record to `path`, replacing what is there in one step.

    Whatever happens meanwhile, `path` is the old file or the new one. The same record gives the same bytes.
    Raises ContextFileError where it cannot be written; a file that was there is untouched then.
    """
    arrays = _arrays_of(record)
    metadata = {"format": _FORMAT, "layout_version": str(LAYOUT_VERSION), "sha256": _NO_DIGEST, **_texts_of(record)}
    blank, pieces = _header(metadata, arrays), [array.reshape(-1).view(np.uint8).data for array in arrays.values()]
    digest = hashlib.sha256(blank)
    for piece in pieces:
        digest.update(piece)
    header = _header({**metadata, "sha256": digest.hexdigest()}, arrays)
    try:
        atomic_write(Path(path), [header, *pieces])
    except OSError as error:
        size = len(header) + sum(map(len, pieces))
        raise ContextFileError(
            f"path must be a file to be written, with room for {size} bytes, got {path}: {error.strerror or error}"
        ) from error


def _arrays_of(record: ContextRecord) -> dict[str, Array]:
    found = {name: getattr(record, name) for name in REQUIRED}
    for name in ("carried", "representatives"):
        per_head = getattr(record, name)
        if per_head is not None:
            heads = [head for layer in per_head for head in layer]
            found[f"{name}_offsets"] = np.array([0, *accumulate(map(len, heads))], np.int64)
            found[name] = np.concatenate([np.empty(0, DTYPES[ARRAYS[name][0]]), *heads])
    return {name: np.ascontiguousarray(found[name]) for name in ARRAYS if name in found}


def _texts_of(record: ContextRecord) -> dict[str, str]:
    """What is no array, as texts of JSON: safetensors has no other values there."""
    per_head = record.carried if record.carried is not None else record.representatives
    values = {
        "fingerprint": dict(record.fingerprint),
        "policy": dict(record.policy),
        "spans": [],  # read by the first release
        "kept": {"num_evicted": record.num_evicted, "num_choices": record.num_choices},
        "heads_per_layer": None if per_head is None else [len(layer) for layer in per_head],
        "extra": dict(record.extra),
    }
    try:
        return {name: json.dumps(value, allow_nan=False) for name, value in values.items()}
    except (TypeError, ValueError, RecursionError) as error:
        raise ContextFileError(f"policy and extra must be values that JSON has, got {error}") from error


def _header(metadata: Mapping[str, str], arrays: Mapping[str, Array]) -> bytes:
    ends = [0, *accumulate(array.nbytes for array in arrays.values())]
    places = {
        name: {"dtype": ARRAYS[name][0], "shape": list(array.shape), "data_offsets": [begin, end]}
        for (name, array), (begin, end) in zip(arrays.items(), pairwise(ends), strict=True)
    }
    text = json.dumps({"__metadata__": metadata, **places}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise ContextFileError(f"policy and extra must have at most {_MAX_HEADER} bytes as JSON, got {len(text)}")
    return len(text).to_bytes(8, "little") + text


# -- reading -----------------------------------------------------------------------------------------------------------


def load_context(path: str | os.PathLike[str], expected: Mapping[str, str]) -> ContextRecord:
    """Read a file that `save_context` wrote; its arrays are read-only views of the mapped file.

    expected: fields of FINGERPRINT_FIELDS and what each must be, as many as the caller knows.
    Raises ContextFileError: no such file, not a context, of another layout version, damaged, or made with something
    else than expected, with both values of each field that differs.
    """
    for name in expected:
        if name not in FINGERPRINT_FIELDS:
            raise ContextFileError(
                f"field of a fingerprint must be one of {', '.join(FINGERPRINT_FIELDS)}, got {name!r}"
                f"{did_you_mean(name, FINGERPRINT_FIELDS)}"
            )
    data = _mapped(Path(path))
    header = _checked_header(data, path)
    try:
        record = _record(header, np.frombuffer(data, np.uint8, offset=8 + _header_length(data)))
    except ContextFileError as error:
        raise ContextFileError(f"{path} must hold a whole context, got: {error}") from error
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
        raise ContextFileError(f"{path} must hold a whole context, got a damaged header: {error!r}") from error
    _compare(record.fingerprint, expected, path)
    return record


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise ContextFileError(f"{path} must be a context that ov_kvcrush saved, got {size} bytes")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ContextFileError(
            f"path must be a file that can be read, got {path}: {error.strerror or error}"
        ) from error


def _header_length(data: mmap.mmap) -> int:
    return int.from_bytes(data[:8], "little")


def _checked_header(data: mmap.mmap, path: str | os.PathLike[str]) -> bytes:
    """The header of a file of this version that is just as it was written."""
    length = min(_header_length(data), _MAX_HEADER)
    magic = _MAGIC.match(data[8 : 8 + min(length, 256)])
    if magic is None:
        raise ContextFileError(f"{path} must be a context that ov_kvcrush saved, got a file that begins otherwise")
    version = int(magic[1])
    if version != LAYOUT_VERSION:
        by = "a newer" if version > LAYOUT_VERSION else "an older"
        raise ContextFileError(f"layout_version must be {LAYOUT_VERSION}, got {version}: written by {by} ov_kvcrush")
    begin, end = (8 + place for place in magic.span(2))
    digest = hashlib.sha256(data[:begin] + _NO_DIGEST.encode())
    with memoryview(data) as view, view[end:] as rest:
        digest.update(rest)
    if digest.hexdigest() != magic[2].decode():
        raise ContextFileError(
            f"{path} must have the SHA-256 {magic[2].decode()}, got {digest.hexdigest()}: it is damaged or cut short"
        )
    return data[8 : 8 + length]


def _compare(fingerprint: Mapping[str, str], expected: Mapping[str, str], path: str | os.PathLike[str]) -> None:
    differing = [
        f"{name} must be {expected[name]}, got {fingerprint[name]}"
        for name in FINGERPRINT_FIELDS
        if name in expected and expected[name] != fingerprint[name]
    ]
    if differing:
        raise ContextFileError(f"{path} was made with something else: {'; '.join(differing)}")


def _record(header: bytes, data: Array) -> ContextRecord:
    places = json.loads(header)
    texts = places.pop("__metadata__")
    arrays = _views(places, data)
    kept = json.loads(texts["kept"])
    sizes = json.loads(texts["heads_per_layer"])
    fingerprint = {"shared_layers": NOT_SHARED, "adapters": NO_ADAPTER, **json.loads(texts["fingerprint"])}
    numbers = [kept["num_evicted"], kept["num_choices"], *(sizes or ())]
    check_types(numbers, int)
    check_types(fingerprint.values(), str)
    return ContextRecord(
        ids=arrays["ids"],
        heads=arrays["heads"],
        tiles=arrays["tiles"],
        fingerprint=fingerprint,
        policy=dict(json.loads(texts["policy"])),
        num_evicted=kept["num_evicted"],
        num_choices=kept["num_choices"],
        carried=_per_head(arrays, "carried", sizes),
        representatives=_per_head(arrays, "representatives", sizes),
        extra=dict(json.loads(texts["extra"])),
    )


def _views(places: Mapping[str, Any], data: Array) -> dict[str, Array]:
    """The arrays of a file without copies: all of the data belongs to them, one behind the other."""
    found, end = {}, 0
    if [name for name in ARRAYS if name in places] != list(places):
        raise ContextFileError(f"arrays must be of {', '.join(ARRAYS)}, in this order, got {', '.join(places)}")
    for name, place in places.items():
        dtype, shape, (begin, stop) = place["dtype"], place["shape"], place["data_offsets"]
        check_types([*shape, begin, stop], int)
        count = math.prod(shape)
        if dtype != ARRAYS[name][0] or min(shape, default=0) < 0 or begin != end:
            raise ContextFileError(f"{name} must follow what is before it, with its dtype, got {place}")
        end = begin + count * DTYPES[dtype].itemsize
        if end != stop or end > len(data):
            raise ContextFileError(f"{name} must end at {end} within {len(data)} bytes of arrays, got {stop}")
        found[name] = data[begin:end].view(DTYPES[dtype]).reshape(shape)
    if end != len(data):
        raise ContextFileError(f"arrays must have all of {len(data)} bytes, got {end}")
    return found


def _per_head(arrays: Mapping[str, Array], name: str, heads_per_layer: list[int] | None) -> FrozenPerHead | None:
    if name not in arrays:
        return None
    flat, offsets = arrays[name], [int(x) for x in arrays[f"{name}_offsets"]]
    if heads_per_layer is None or sum(heads_per_layer) != len(offsets) - 1 or min(heads_per_layer, default=0) < 0:
        raise ContextFileError(f"heads_per_layer must be numbers of heads, {len(offsets) - 1} in all")
    if offsets[0] != 0 or offsets[-1] != len(flat) or any(a > b for a, b in pairwise(offsets)):
        raise ContextFileError(f"{name}_offsets must ascend from 0 to {len(flat)}")
    heads = iter([flat[begin:end] for begin, end in pairwise(offsets)])
    return tuple(tuple(next(heads) for _ in range(size)) for size in heads_per_layer)
