"""openvino_genai and this package side by side, on the same tiny model in f32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import openvino_genai as stock
import pytest
from both_libraries import BOTH, EXACT, Pipes


@pytest.fixture(scope="module")
def folder(tiny_ir: Callable[[str], Path]) -> Path:
    return tiny_ir("llama")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Pipes:
    return {lib: lib.LLMPipeline(folder, "CPU", **EXACT) for lib in BOTH}


@pytest.fixture(scope="module")
def batching(folder: Path) -> Pipes:
    return {lib: lib.ContinuousBatchingPipeline(folder, stock.SchedulerConfig(), "CPU", EXACT) for lib in BOTH}
