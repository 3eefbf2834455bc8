"""OV_KVCRUSH_ISA: no kernels above it are used, and a wrong value is an error that says what is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from native_stores import ISAS, layer, require_native

NAMES = ["scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx"]
PROGRAM = f"""
import json
from ov_kvcrush import native
shape = {layer()!r}
codecs = dict(key="u8", value="u8", recent="bf16", recent_tokens=32, group_size=32)
try:
    info = native.info()
    store = native.Store(layers=[shape], **codecs)
    seen = {{**info, "store": store.isa, "prefill": native.can_prefill([shape], "bf16")}}
    for isa in ("amx", "avx512bf16-emulated"):
        try:
            native.Store(layers=[shape], **codecs, isa=isa)
            seen[isa] = "made"
        except ValueError as error:
            seen[isa] = str(error)
except ValueError as error:
    seen = {{"error": str(error)}}
    try:
        native.Store(layers=[shape], **codecs)
    except ValueError as again:
        seen["again"] = str(again)
print(json.dumps(seen))
"""


def seen_with(cap: str) -> dict[str, object]:
    """What a process finds whose environment has this value."""
    require_native()
    environment = {**os.environ, "OV_KVCRUSH_ISA": cap}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("cap", NAMES)
def test_no_kernels_above_the_cap_are_used(cap: str) -> None:
    seen = seen_with(cap)
    own = os.environ.get("OV_KVCRUSH_ISA", "")
    below = NAMES[: NAMES.index(cap) + 1]
    isas = seen["isas"]
    assert isinstance(isas, list)
    assert set(isas) <= set(below)
    if not own:
        assert isas == [isa for isa in ISAS if isa in below]
    assert seen["isa_cap"] == cap
    assert seen["isa"] == seen["store"] == isas[-1]
    assert seen["prefill"] == (isas[-1] in ("avx512bf16", "amx"))
    for asked, needed in (("amx", "amx"), ("avx512bf16-emulated", "avx512")):
        assert seen[asked] == "made" if needed in isas else f"OV_KVCRUSH_ISA={cap}" in str(seen[asked])


def test_an_unknown_cap_is_an_error_each_time() -> None:
    message = f"OV_KVCRUSH_ISA must be one of {', '.join(NAMES)}, got sse9"
    assert seen_with("sse9") == {"error": message, "again": message}


def test_an_empty_cap_is_none() -> None:
    seen = seen_with("")
    assert seen["isa_cap"] == ""
    assert seen["isas"] == ISAS or os.environ.get("OV_KVCRUSH_ISA")
