"""One run of one engine: requests in, steps to the end, times out. The same code measures every engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Protocol

import numpy as np

from ov_kvcrush.bench.memory import growth, rss_bytes


class MeasuredHandle(Protocol):
    """What is asked of a request; both engines' handles have it."""

    def can_read(self) -> bool: ...

    def read(self) -> dict[int, Any]: ...


class MeasuredEngine(Protocol):
    """What is asked of an engine."""

    def add(self, request_id: int, ids: np.ndarray, new_tokens: int) -> MeasuredHandle: ...

    def step(self) -> None: ...

    def has_unfinished(self) -> bool: ...

    def kv_bytes(self) -> int: ...

    def storage(self) -> Storage: ...

    def last_overhead_s(self) -> float | None:
        """Time of the last step outside of the inference itself; None where the engine does not tell."""
        ...


@dataclass(frozen=True)
class Storage:
    """The attention operation that decode rows go through, and the types in which it finds keys and values."""

    attention: str
    key_precision: str
    value_precision: str


@dataclass(frozen=True)
class RunResult:
    """One run of B requests. Times count from just before the first request is added.

    ttft_s_each, tpot_ms_each: per request; ttft_s, tpot_ms are their means.
    tokens_per_s: tokens made after the last prompt was finished, per second of that time: pure decoding.
    total_tokens_per_s: all generated tokens per second of the whole run, prompts included.
    kv_bytes: peak of what the engine calls its KV cache size; blocks that prompts are read on are not part of it.
    kv_bytes_per_token, held_growth_bytes: that size per cached token, and by how much the resident size of the process
        has grown since the run began, at the last moment at which all B requests decode; None if there is none, or
        nobody tells. An engine that keeps the memory of its cache between runs does not grow.
    overhead_ms_per_step: mean over the steps in which all B requests decode, None if there is none or nobody tells.
    """

    ttft_s: float
    tpot_ms: float
    tokens_per_s: float
    total_tokens_per_s: float
    kv_bytes: int
    overhead_ms_per_step: float | None
    ttft_s_each: list[float]
    tpot_ms_each: list[float]
    num_steps: int
    num_full_decode_steps: int
    kv_bytes_per_token: float | None = None
    held_growth_bytes: int | None = None


def random_prompts(batch: int, context: int, vocab_size: int, seed: int) -> np.ndarray:
    """Prompts int64 (batch, context), all different; the same arguments give the same ids on every machine."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return rng.integers(0, vocab_size, (batch, context), dtype=np.int64)


def run_once(engine: MeasuredEngine, prompts: np.ndarray, new_tokens: int, first_id: int = 0) -> RunResult:
    """Add all prompts int64 (B, context) at once and step until each has `new_tokens` tokens.

    Raises RuntimeError if a request ends with another number of tokens.
    """
    times: list[list[float]] = [[] for _ in prompts]  # per request, one moment per token
    overheads: list[float] = []
    kv_bytes = num_steps = num_full_decode_steps = 0
    held: dict[str, Any] = {}
    idle = rss_bytes()
    start = time.perf_counter()
    paused = 0.0
    handles = [engine.add(first_id + i, ids, new_tokens) for i, ids in enumerate(prompts)]
    while engine.has_unfinished():
        is_full_decode = all(0 < len(moments) < new_tokens for moments in times)
        engine.step()
        now = time.perf_counter() - start - paused
        num_steps += 1
        num_full_decode_steps += is_full_decode
        for handle, moments in zip(handles, times, strict=True):
            while handle.can_read():
                moments += [now] * sum(len(output.generated_ids) for output in handle.read().values())
        # openvino_genai takes some 60 us to tell its metrics: the clock stands still meanwhile, for both engines.
        pause = time.perf_counter()
        now_bytes = engine.kv_bytes()
        kv_bytes = max(kv_bytes, now_bytes)
        counts = [len(moments) for moments in times]
        if min(counts) > 0 and max(counts) == new_tokens - 1:  # one step before the first request ends
            num_cached = sum(prompts.shape[1] + count - 1 for count in counts)
            held = {"kv_bytes_per_token": now_bytes / num_cached, "held_growth_bytes": growth(idle, rss_bytes())}
        overhead = engine.last_overhead_s()
        if is_full_decode and overhead is not None:
            overheads.append(overhead)
        paused += time.perf_counter() - pause
    for i, moments in enumerate(times):
        if len(moments) != new_tokens:
            raise RuntimeError(f"request {i} must give {new_tokens} tokens, got {len(moments)}")
    return replace(summarise(times, kv_bytes, overheads, num_steps, num_full_decode_steps), **held)


def summarise(
    times: Sequence[Sequence[float]],
    kv_bytes: int,
    overheads: Sequence[float],
    num_steps: int,
    num_full_decode_steps: int,
) -> RunResult:
    """Derive the result of a run from the moment of each token, in seconds from the start, per request."""
    ttft = [moments[0] for moments in times]
    tpot = [1e3 * (moments[-1] - moments[0]) / (len(moments) - 1) for moments in times]
    prompts_done, end = max(ttft), max(moments[-1] for moments in times)
    num_decoded = sum(moment > prompts_done for moments in times for moment in moments)
    return RunResult(
        ttft_s=fmean(ttft),
        tpot_ms=fmean(tpot),
        tokens_per_s=num_decoded / (end - prompts_done),
        total_tokens_per_s=sum(map(len, times)) / end,
        kv_bytes=kv_bytes,
        overhead_ms_per_step=1e3 * fmean(overheads) if overheads else None,
        ttft_s_each=ttft,
        tpot_ms_each=tpot,
        num_steps=num_steps,
        num_full_decode_steps=num_full_decode_steps,
    )
