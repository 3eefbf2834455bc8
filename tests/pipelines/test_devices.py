"""Names of devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ov_kvcrush import CrushError, LLMPipeline


@pytest.mark.parametrize("engine", ["crush", "genai"])
def test_devices_are_known_in_any_case(engine: str, tiny_ir: Callable[[str], Path]) -> None:
    assert isinstance(LLMPipeline(tiny_ir("llama"), "cpu", engine=engine).generate("Hi", max_new_tokens=1), str)


@pytest.mark.parametrize("device", ["", "tpu", "cpu0", 5, None])
def test_what_is_no_device_is_refused(device: Any, tiny_ir: Callable[[str], Path]) -> None:
    with pytest.raises(CrushError, match="device must be"):
        LLMPipeline(tiny_ir("llama"), device)
