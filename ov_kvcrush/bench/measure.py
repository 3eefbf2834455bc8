"""One run of one engine: requests in, steps to the end, times out. The same code measures every engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Protocol

import numpy as np

from ov_kvcrush.utils.process_memory import growth, rss_bytes


class MeasuredHandle(Protocol):
    """What is asked of a request; both engines' handles have it."""

    def can_read(self) -> bool: ...

    def read(self) -> dict[int, Any]: ...

    def cancel(self) -> None: ...


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

    def last_policy_s(self) -> float | None:
        """The part of it that went into choosing what stays and doing it; None where the engine does not tell."""
        ...

    def kept_tokens(self, handle: Any) -> int | None:
        """Tokens whose KV a head holds now, on average, of a request that `add` returned; None where nobody tells."""
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
    kv_bytes_per_token, held_growth_bytes: that size per token of the texts, kept or not, and by how much the resident
        size of the process has grown since the run began, at the last moment at which all B requests decode; None if
        there is none, or nobody tells. An engine that keeps the memory of its cache between runs does not grow.
    overhead_ms_per_step: mean over the steps in which all B requests decode, None if there is none or nobody tells.
    policy_ms, policy_share: time of all policy work of the run (scores, choices, adopting and moving what was chosen),
        and its share of the time until the last token; None if nobody tells.
    kept_tokens: of a prompt, that a head holds at the first token, on average over requests; None if nobody tells.
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
    policy_ms: float | None = None
    policy_share: float | None = None
    kept_tokens: float | None = None


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
    policy_times: list[float | None] = []
    kept: dict[int, int | None] = {}  # by request
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
            num_tokens = sum(prompts.shape[1] + count - 1 for count in counts)
            held = {"kv_bytes_per_token": now_bytes / num_tokens, "held_growth_bytes": growth(idle, rss_bytes())}
        for i in range(len(handles)):
            if counts[i] and i not in kept:
                kept[i] = engine.kept_tokens(handles[i])
        policy_times.append(engine.last_policy_s())
        overhead = engine.last_overhead_s()
        if is_full_decode and overhead is not None:
            overheads.append(overhead)
        paused += time.perf_counter() - pause
    for i, moments in enumerate(times):
        if len(moments) != new_tokens:
            raise RuntimeError(f"request {i} must give {new_tokens} tokens, got {len(moments)}")
    held |= _policy_work(policy_times, max(moments[-1] for moments in times))
    held["kept_tokens"] = _mean_if_told(list(kept.values()))
    return replace(summarise(times, kv_bytes, overheads, num_steps, num_full_decode_steps), **held)


def _policy_work(step_times: Sequence[float | None], run_s: float) -> dict[str, float | None]:
    mean_s = _mean_if_told(step_times)
    total_s = None if mean_s is None else mean_s * len(step_times)
    return {
        "policy_ms": None if total_s is None else 1e3 * total_s,
        "policy_share": None if total_s is None else total_s / run_s,
    }


def _mean_if_told(values: Sequence[float | None]) -> float | None:
    told = [value for value in values if value is not None]
    return fmean(told) if told else None


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
