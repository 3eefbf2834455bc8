"""One engine in a process of its own: jobs come as JSON lines on standard input, answers go out the same way."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ov_kvcrush.errors import CrushError


def main() -> None:
    """Load the engine of the first line, then run once per further line, until standard input ends."""
    # Libraries may print: what they print goes to standard error, so that standard output holds answers only.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lines: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_read_lines, args=(lines,), daemon=True).start()

    def answer(reply: dict[str, Any]) -> None:
        answers.write(json.dumps(reply) + "\n")
        answers.flush()

    try:
        for reply in _replies(lines):
            answer(reply)
    except CrushError as error:
        answer({"refused": str(error)})
    except Exception as error:
        answer({"failed": f"{type(error).__name__}: {error}"})


def _read_lines(lines: SimpleQueue[str]) -> None:
    """Feed the queue. The end of input is the parent's end, however it came: nothing here may outlive it."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def _replies(lines: SimpleQueue[str]) -> Iterator[dict[str, Any]]:
    """One answer per line: first that the engine is loaded, then what each run gave."""
    from ov_kvcrush.bench.engines import make_engine
    from ov_kvcrush.bench.measure import random_prompts, run_once

    job = json.loads(lines.get())
    start = time.perf_counter()
    engine = make_engine(job)
    yield {"load_s": time.perf_counter() - start, "peak_rss_bytes": peak_rss_bytes()}
    prompts = random_prompts(job["batch"], job["context"], job["vocab_size"], job["seed"])
    next_id = 0
    while True:
        result = run_once(engine, prompts, json.loads(lines.get())["new_tokens"], next_id)
        next_id += len(prompts)
        yield {"run": asdict(result), "peak_rss_bytes": peak_rss_bytes()}


def peak_rss_bytes() -> int | None:
    """Largest resident size this process had so far, None where the system does not tell."""
    try:
        # Not ru_maxrss first: on Linux a child starts with the peak of the process that forked it.
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
