"""A second IR beside the first, with attention scores as outputs, over the same weights file."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import tempfile
from pathlib import Path

from ov_kvcrush.errors import CrushError, ExportError
from ov_kvcrush.model.folder import IR_NAME, SCORES_NAME
from ov_kvcrush.model.graph.score_outputs import add_score_outputs
from ov_kvcrush.utils.checks import check_integer

_CONSTANT = re.compile(rb'offset="(\d+)"([^>]*?\bsize=)"(\d+)"')
_ALIGNMENT = 64
# The added operations have a few numbers of their own; more would be a copy of weights.
_MAX_ADDED_BYTES = 64 << 10


def check_attention_scores(window: int | None) -> None:
    """Raise ExportError unless `window` is None or an integer of at least 1."""
    try:
        if window is not None:
            check_integer("attention_scores", window, 1)
    except CrushError as error:
        raise ExportError(f"{error}: it is the number of last query rows to average over") from None


def write_scores_model(folder: Path, window: int) -> None:
    """Write `openvino_model_scores.xml` into a folder with `openvino_model.xml` and `.bin`; see `add_score_outputs`.

    The new model is serialised as a whole, then each of its constants is looked up in the first one's weights file; the
    few that are new are appended to that, which moves nothing the first XML points to. That one is not touched.
    Raises ModelError if the model has attention whose scores cannot be told.
    """
    import openvino as ov

    xml, weights = folder / f"{IR_NAME}.xml", folder / f"{IR_NAME}.bin"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".scores-") as temporary:
        whole = Path(temporary) / "whole.xml"
        model = ov.Core().read_model(xml)
        add_score_outputs(model, window)
        ov.save_model(model, whole, compress_to_fp16=False)
        del model  # it maps the weights file
        moved, added = _shared_offsets(xml, weights, whole)
        with open(weights, "ab") as file:
            file.write(added)
            file.flush()
            os.fsync(file.fileno())
        whole.write_bytes(_with_offsets(whole.read_bytes(), moved))
        whole.replace(folder / f"{SCORES_NAME}.xml")


def _shared_offsets(xml: Path, weights: Path, whole: Path) -> tuple[dict[tuple[int, int], int], bytes]:
    """Where the constants (offset, size) of `whole` are in `weights`, and what must be appended to it for that."""
    end = weights.stat().st_size
    with _mapped(weights) as shared, _mapped(whole.with_suffix(".bin")) as own:
        # First come, first kept: equal constants have one place.
        places: dict[tuple[int, bytes], int] = {}
        for offset, size in _constants(xml):
            places.setdefault((size, _digest(shared, offset, size)), offset)
        moved, added = {}, bytearray()
        for offset, size in _constants(whole):
            key = (size, _digest(own, offset, size))
            if key not in places:
                added += bytes(-(end + len(added)) % _ALIGNMENT)
                places[key] = end + len(added)
                added += own[offset : offset + size]
            moved[offset, size] = places[key]
            if len(added) > _MAX_ADDED_BYTES:
                raise ExportError(
                    f"constants that attention scores add must fit {_MAX_ADDED_BYTES} bytes, got at least {len(added)}"
                )
    return moved, bytes(added)


def _constants(xml: Path) -> list[tuple[int, int]]:
    """Offset and size of each constant, once, in the order of the file."""
    found = ((int(offset), int(size)) for offset, _, size in _CONSTANT.findall(xml.read_bytes()))
    return list(dict.fromkeys(found))


def _with_offsets(text: bytes, moved: dict[tuple[int, int], int]) -> bytes:
    def move(match: re.Match[bytes]) -> bytes:
        offset, between, size = match.groups()
        return b'offset="%d"%s"%s"' % (moved[int(offset), int(size)], between, size)

    return _CONSTANT.sub(move, text)


def _digest(data: mmap.mmap, offset: int, size: int) -> bytes:
    with memoryview(data) as view, view[offset : offset + size] as part:
        return hashlib.sha256(part).digest()


def _mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
