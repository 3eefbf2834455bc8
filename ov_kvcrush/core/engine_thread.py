"""The one thread that steps the engines of a compiled model; everybody else sends it commands.

A step writes staging blocks that engines share, and may commit KV to the store of another: there is one at a time,
and nothing else touches a store meanwhile.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Generic, Protocol, TypeVar

from ov_kvcrush.core.end_reason import EndReason
from ov_kvcrush.core.streamed_request import Status, StreamedRequest
from ov_kvcrush.errors import CrushError

_log = logging.getLogger(__name__)
_LONGEST_STEP_S = 60.0  # that the end of the process waits for a step,
_LONGEST_VISIT_S = 5.0  # and for callers, one of whom may be in a streamer that does not return
_NO_PROGRESS_S = 0.005  # pause after a step that could do nothing, until a command or the next try

_ENDED = "pipeline must be used while the process goes on, got its end"

T = TypeVar("T")


class Stepper(Protocol):
    """An engine, as far as its thread and those that share it use it."""

    @property
    def has_driven(self) -> bool: ...

    @property
    def has_running(self) -> bool: ...

    def step(self) -> bool: ...

    def end_all(self, error: Exception) -> None: ...


class _Task(Generic[T]):
    """A command whose caller waits for its result."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._result: T

    def __call__(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error
        self._done.set()

    def result(self) -> T:
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._result


class EngineThread:
    """Runs commands and steps, one at a time.

    The thread starts when a request is to be moved on by itself (`start`), or when a command meets another. Who finds
    it idle does what he wants himself, and pays for no hand-over; who finds it busy is served after its step. Engines
    are held weakly; when the last one is gone the thread ends.
    """

    def __init__(self) -> None:
        # Their put() may be interrupted by itself: finalizers call it in any thread at any moment.
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # Whoever's turn it is runs the commands; what wakes the thread is the thread's alone, and never lost to others.
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._engines: weakref.WeakSet[Stepper] = weakref.WeakSet()
        self._start_lock = threading.Lock()
        self._turn = threading.Lock()  # held by the thread from its first step to its last, or by one who found it idle
        self._holder: int | None = None  # the identifier of the thread whose turn it is
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._num_visitors = 0
        self._visitors = threading.Condition()

    def join(self, engine: Stepper, requests: Mapping[int, StreamedRequest]) -> None:
        """Add an engine, and its requests that have not ended: who waits for them is told when it goes."""
        self._engines.add(engine)
        weakref.finalize(engine, _end_orphans, requests, self).atexit = False

    def engines(self) -> list[Stepper]:
        """All that are there."""
        return list(self._engines)

    @property
    def is_own(self) -> bool:
        """Whether it is the calling thread's turn."""
        return self._holder == threading.get_ident()

    # -- commands ------------------------------------------------------------------------------------------------------

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` between two steps, and return or raise what it does."""
        if self.is_own:
            return function()
        if self._turn.acquire(blocking=False):
            try:
                return self._inline(function)
            finally:
                self._turn.release()
                self._run_left_over()
        if self._is_closed:
            raise CrushError(_ENDED)
        task = _Task(function)
        self.start()
        self._commands.put(task)
        self.wake()
        return task.result()

    def post(self, function: Callable[[], None]) -> None:
        """Have `function` run soon, or now if nothing else does; waits for nothing, as the garbage collector must."""
        self._commands.put(function)
        if not self.is_own:
            self._run_left_over()
        self.wake()

    def _inline(self, function: Callable[[], T]) -> T:
        self._holder = threading.get_ident()
        try:
            return function()
        finally:
            self._run_commands()
            self._holder = None

    def _run_left_over(self) -> None:
        """What was posted while it was somebody's turn who has not seen it."""
        while not self._commands.empty() and self._turn.acquire(blocking=False):
            try:
                self._inline(lambda: None)
            finally:
                self._turn.release()

    def _run_commands(self) -> None:
        try:
            while True:
                self._run_command(self._commands.get_nowait())
        except queue.Empty:
            pass

    @staticmethod
    def _run_command(command: Callable[[], None]) -> None:
        try:
            command()
        except Exception:  # of what nobody waits for
            _log.exception("a command of the engine failed")

    # -- the thread ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """See to it that the thread runs."""
        with self._start_lock:
            if self._thread is None and not self._is_closed:
                # A daemon: a process that ends does not wait for answers, but for the step (`shutdown`).
                self._thread = threading.Thread(target=self._run, name="ov_kvcrush engine", daemon=True)
                self._thread.start()
                atexit.register(self.shutdown)

    def wake(self) -> None:
        """Have the thread look for something to do, if there is one; it does so when it starts."""
        if self._thread is not None:
            self._wakes.put(None)

    def _run(self) -> None:
        while len(self._engines) and not self._is_closed:
            with self._turn:
                self._holder = threading.get_ident()
                while not self._is_closed:
                    self._run_commands()
                    if not self._step_all() and self._commands.empty():
                        break
                self._holder = None
            if len(self._engines) and not self._is_closed:
                self._wait()
        with self._turn:
            self._holder = threading.get_ident()
            for engine in self.engines():
                engine.end_all(CrushError(_ENDED))
            self._run_commands()
            self._holder = None
        if not self._is_closed:
            atexit.unregister(self.shutdown)

    def _wait(self, timeout: float | None = None) -> None:
        """Until somebody has woken the thread since it last waited."""
        with suppress(queue.Empty):
            self._wakes.get(timeout=timeout)
            while True:
                self._wakes.get_nowait()

    def _step_all(self) -> bool:
        """One step of each engine that has requests to be moved on; whether there was one."""
        driven = [engine for engine in self.engines() if engine.has_driven]
        has_moved = False
        for engine in driven:
            try:
                if engine.step():
                    has_moved = True
            except Exception as error:  # its requests know, but what broke outside of them would break again
                _log.debug("a step failed", exc_info=True)
                if engine.has_driven and not engine.has_running:
                    engine.end_all(error)
                has_moved = True
        if driven and not has_moved:
            self._wait(_NO_PROGRESS_S)
        return bool(driven)

    # -- the end -------------------------------------------------------------------------------------------------------

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Around calls whose thread must not be in native code when the interpreter ends. Raises CrushError then."""
        with self._visitors:
            if self._is_closed:
                raise CrushError(_ENDED)
            self._num_visitors += 1
        try:
            yield
        finally:
            with self._visitors:
                self._num_visitors -= 1
                self._visitors.notify_all()

    def shutdown(self) -> None:
        """End all requests and the thread, and wait for both: native code that outlives the interpreter aborts it."""
        with self._visitors:
            self._is_closed = True
        self.wake()
        if self._thread is not None:
            self._thread.join(_LONGEST_STEP_S)
        with self._visitors:
            self._visitors.wait_for(lambda: not self._num_visitors, _LONGEST_VISIT_S)


def _end_orphans(requests: Mapping[int, StreamedRequest], thread: EngineThread) -> None:
    """When an engine goes: its callers are told, and its thread looks whether any engine is left."""
    for request in list(requests.values()):
        request.end_reason, request.status = EndReason.ERROR, Status.CANCEL
        request.error = CrushError("pipeline must be held while its requests run, got one that is gone")
        request.stream.end()
    thread.wake()
