"""Signals reach the process whatever was loaded and dropped before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ov_kvcrush.model.plugin import open_core

INTERRUPTED = """
import signal, sys
from ov_kvcrush import LLMPipeline
pipelines = [LLMPipeline(sys.argv[1], engine=sys.argv[2]) for _ in range(3)]
while pipelines:
    del pipelines[0]
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_a_core_leaves_the_signal_stack_as_it_was() -> None:
    ctypes = pytest.importorskip("ctypes")
    if sys.platform != "linux":
        pytest.skip("other systems have no alternate signal stacks")
    sigaltstack = ctypes.CDLL(None).sigaltstack
    before, after = (ctypes.create_string_buffer(24) for _ in range(2))
    sigaltstack(None, before)
    core = open_core()
    sigaltstack(None, after)
    assert core.get_versions("CPU")
    assert before.raw == after.raw


@pytest.mark.parametrize("engine", ["crush", "genai"])
def test_ctrl_c_after_pipelines_that_were_dropped_in_the_order_of_their_making(engine: str, shallow: Path) -> None:
    """It was a segmentation fault: the plugin puts signal stacks back that are not there any more."""
    command = [sys.executable, "-c", INTERRUPTED, str(shallow), engine]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
