"""openvino.Core without a trap: with more than one of them a Ctrl-C could end the process."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import openvino as ov

_SS_DISABLE = 2  # of <bits/ss_flags.h>


class _SignalStack(ctypes.Structure):
    """stack_t of <signal.h>."""

    _fields_ = (("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t))


def open_core() -> ov.Core:
    """A new ov.Core with its CPU plugin loaded, which leaves this thread's alternate signal stack as it was.

    The plugin (openvino 2026.4) sets one of its own when it is loaded; when it is unloaded it puts back the one that it
    found, which may be that of another plugin that is gone. Python's signal handlers run on that stack, so after two
    pipelines were dropped in the order in which they were made, the next Ctrl-C was a segmentation fault.
    """
    with _kept_signal_stack():
        core = ov.Core()
        core.get_versions("CPU")  # loads it
    return core


@contextmanager
def _kept_signal_stack() -> Iterator[None]:
    sigaltstack = getattr(ctypes.CDLL(None), "sigaltstack", None) if sys.platform == "linux" else None
    if sigaltstack is None:
        yield
        return
    before = _SignalStack()
    sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        # One that is too small for the registers that the plugin uses is refused; none is better than one that goes.
        if sigaltstack(ctypes.byref(before), None):
            sigaltstack(ctypes.byref(_SignalStack(None, _SS_DISABLE, 0)), None)
