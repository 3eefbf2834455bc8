"""The parent's side of a worker: start it, give it lines, end it, and say clearly if it died."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from ov_kvcrush.errors import CrushError

_END_S = 10  # a worker leaves at once when its input ends; after this long it is killed
# The worker sees the parent's sys.path, so it measures the same code whatever way that was found.
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from ov_kvcrush.bench.worker import main; main()"


class WorkerError(RuntimeError):
    """A worker died, or its engine failed in the middle of a run."""


class Worker:
    """A running worker process."""

    def __init__(self, name: str, process: subprocess.Popen[str], stderr: IO[bytes]) -> None:
        self._name = name
        self._process = process
        self._stderr = stderr

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def ask(self, message: dict[str, object]) -> dict[str, Any]:
        """Send one line, wait for the answer. Raises CrushError if it was refused, WorkerError if the worker broke."""
        stdin, stdout = _pipes(self._process)
        with suppress(BrokenPipeError):  # a dead worker; what it left is read below
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()
        line = stdout.readline()
        if not line.endswith("\n"):
            raise WorkerError(self._obituary())
        reply: dict[str, Any] = json.loads(line)
        if "refused" in reply:
            raise CrushError(f"{self._name}: {reply['refused']}")
        if "failed" in reply:
            raise WorkerError(f"engine {self._name} failed: {reply['failed']}")
        return reply

    def _obituary(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        words = self._stderr.read().decode(errors="replace").strip().splitlines()
        text = f"the worker of engine {self._name} died, {_how(code)}"
        return f"{text}; it last said: {words[-1]}" if words else text


@contextmanager
def worker(name: str) -> Iterator[Worker]:
    """Run a worker process for the length of a with block; it is gone afterwards, whatever happens in the block."""
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends its workers
        )
        try:
            yield Worker(name, process, stderr)
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    stdin, stdout = _pipes(process)
    with suppress(BrokenPipeError):
        stdin.close()
    try:
        process.wait(_END_S)
    except BaseException:  # a second Ctrl-C among them
        process.kill()
        process.wait()
    stdout.close()


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = str(-code)
    return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
