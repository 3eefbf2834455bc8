"""One engine in a process of its own: jobs come as JSON lines on standard input, answers go out the same way."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from queue import SimpleQueue
from typing import IO, Any

from ov_kvcrush.errors import CrushError


def main() -> None:
    """Load the engine of the first line, then run once per further line, until standard input ends."""
    questions, answers = _take_pipes()
    lines: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_read_lines, args=(questions, lines), daemon=True).start()

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


def _take_pipes() -> tuple[IO[str], IO[str]]:
    """Keep the pipes to the parent for this process's own use; what libraries print goes to standard error."""
    ends = os.dup(0), os.dup(1)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    # OpenVINO's telemetry forks a process that may outlive this one. It must not hold the pipes open, and must not find
    # sys.stdin locked by a thread that waits for input: it would wait for that lock for ever.
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: _close(ends))
    return os.fdopen(ends[0], encoding="utf-8"), os.fdopen(ends[1], "w", encoding="utf-8")


def _close(ends: Iterable[int]) -> None:
    for end in ends:
        os.close(end)


def _read_lines(questions: IO[str], lines: SimpleQueue[str]) -> None:
    """Feed the queue. The end of input is the parent's end, however it came: nothing here may outlive it."""
    for line in questions:
        lines.put(line)
    os._exit(0)


def _replies(lines: SimpleQueue[str]) -> Iterator[dict[str, Any]]:
    """One answer per line: first that the engine is loaded, then what each run gave."""
    from ov_kvcrush.bench.engines import make_engine
    from ov_kvcrush.bench.measure import random_prompts, run_once
    from ov_kvcrush.bench.traffic import run_traffic
    from ov_kvcrush.utils import process_memory as memory

    job = json.loads(lines.get())
    start = time.perf_counter()
    engine = make_engine(job)
    load_s, load_peak = time.perf_counter() - start, memory.peak_rss_bytes()
    can_reset = memory.reset_peak()
    loaded = memory.rss_bytes() if can_reset else None
    yield {
        "load_s": load_s,
        "load_peak_rss_bytes": load_peak,
        "loaded_rss_bytes": loaded,
        "storage": asdict(engine.storage()),
    }
    prompts = random_prompts(job["batch"], job["context"], job["vocab_size"], job["seed"])
    next_id = 0
    while job.get("traffic"):
        lines.get()
        yield {"run": asdict(run_traffic(engine, job, next_id))}
        next_id += 1000
    while True:
        run = json.loads(lines.get())
        result = run_once(engine, prompts[:, : run.get("prompt_tokens")], run["new_tokens"], next_id)
        next_id += len(prompts)
        yield {"run": asdict(result), "peak_rss_bytes": memory.peak_rss_bytes()}


if __name__ == "__main__":
    main()
