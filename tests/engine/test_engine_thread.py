"""One thread steps; callers wait on handles. Errors end the request they belong to, and nobody waits for another."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from ov_kvcrush import (
    ContinuousBatchingPipeline,
    CrushError,
    EndReason,
    GenerationConfig,
    GenerationStatus,
    LLMPipeline,
    OutOfMemory,
    QueueFull,
    RequestError,
    RequestTimeout,
    StreamingStatus,
)
from ov_kvcrush.core.engine_thread import EngineThread
from ov_kvcrush.engine.step_pace import StepPace

F32 = {"INFERENCE_PRECISION_HINT": "f32"}
CACHE = {"key_precision": "f32", "value_precision": "f32"}
IDS = np.random.default_rng(5).integers(0, 256, 6000)
WAIT = 60.0


def make(folder: Path, cache: dict[str, Any] | None = None, **scheduler: Any) -> ContinuousBatchingPipeline:
    return ContinuousBatchingPipeline(
        folder, scheduler or None, properties=F32, cache_config={**CACHE, **(cache or {})}
    )


def ids(length: int, begin: int = 0) -> ov.Tensor:
    return ov.Tensor(IDS[None, begin : begin + length].copy())


def greedy(new_tokens: int = 8) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tiny_ir: Callable[[str], Path]) -> Path:
    return tiny_ir("llama")


@pytest.fixture(scope="module")
def shared(folder: Path) -> ContinuousBatchingPipeline:
    return make(folder)


@pytest.fixture
def pipe(shared: ContinuousBatchingPipeline) -> Iterator[ContinuousBatchingPipeline]:
    """The same for all tests; each must leave it empty."""
    yield shared
    shared._backend.process_aborts()
    gc.collect()
    metrics = shared.get_metrics()
    assert (metrics.requests, metrics.kv_cache_size_in_bytes, metrics.staging_size_in_bytes) == (0, 0, 0)


# -- reading -----------------------------------------------------------------------------------------------------------


def test_ways_to_read_agree(pipe: ContinuousBatchingPipeline) -> None:
    expected = pipe.generate([ids(30)], greedy())[0].m_generation_ids[0]

    def tokens_of(outputs: Any) -> list[int]:
        return [token for output in outputs for token in output[0].generated_ids]

    handle = pipe.add_request(1, ids(30), greedy())
    read = []
    while len(read) < 8:
        read.append(handle.read(WAIT))
    assert tokens_of(read) == expected
    with pytest.raises(IndexError, match="all tokens of the request were read"):
        handle.read(WAIT)
    assert tokens_of(pipe.add_request(2, ids(30), greedy())) == expected

    async def together() -> list[list[int]]:
        async def one(index: int) -> list[int]:
            return tokens_of([outputs async for outputs in pipe.add_request(index, ids(30), greedy())])

        return await asyncio.gather(*(one(i) for i in range(3, 7)))

    assert asyncio.run(together()) == [expected] * 4

    done = threading.Event()
    handle = pipe.add_request(7, ids(30), greedy())
    handle.on_change(lambda: done.set() if handle.end_reason else None)
    assert done.wait(WAIT)
    assert handle.end_reason == EndReason.LENGTH
    assert tokens_of(handle) == expected

    text, handle = "", pipe.add_request(8, ids(30), greedy())
    while piece := handle.read_text(WAIT):
        text += piece
    assert text == pipe.get_tokenizer().decode(expected)


def test_a_caller_may_drive_by_itself(pipe: ContinuousBatchingPipeline) -> None:
    handle = pipe.add_request(1, ids(30), greedy(5))
    time.sleep(0.1)
    assert not handle.can_read()
    pipe.step()
    assert handle.can_read()
    assert len(handle.read()[0].generated_ids) == 1
    assert not handle.can_read()
    while pipe.has_non_finished_requests():
        pipe.step()
    assert handle.end_reason == EndReason.LENGTH


def test_read_waits_no_longer_than_it_is_told(folder: Path) -> None:
    pipe = make(folder)
    handle = pipe.add_request(1, ids(4000), greedy(1))
    with pytest.raises(TimeoutError, match=r"no token came within 0.001 s"):
        handle.read(0.001)
    handle.cancel()
    assert handle.wait(WAIT)
    assert (handle.end_reason, handle.error) == (EndReason.CANCELLED, None)


@pytest.mark.parametrize("include", [False, True])
def test_a_handle_hands_out_no_more_than_the_answer(include: bool, pipe: ContinuousBatchingPipeline) -> None:
    """Tokens that may begin a stop string are held back until they are known not to."""
    whole = pipe.generate([ids(30)], greedy(24))[0].m_generation_ids[0]
    text = pipe.get_tokenizer().decode(whole)
    cut = len(text) // 2
    stop = text[cut : cut + 5]
    config = greedy(24)
    config.stop_strings, config.include_stop_str_in_output = {stop}, include
    handle = pipe.add_request(1, ids(30), config)
    read = [token for outputs in handle for token in outputs[0].generated_ids]
    (answer,) = handle.outputs()
    assert handle.end_reason == EndReason.STOP
    assert read == answer.generated_ids
    assert answer.text == text[: text.index(stop) + include * len(stop)]
    handle = pipe.add_request(2, ids(30), config)
    pieces = list(iter(lambda: handle.read_text(WAIT), ""))
    assert "".join(pieces) == answer.text
    if not include:
        assert all(stop[0] not in piece or stop not in "".join(pieces[: i + 1]) for i, piece in enumerate(pieces))


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_streamer_that_stops_gets_what_it_saw(is_cancelled: bool, pipe: ContinuousBatchingPipeline) -> None:
    """However far the engine was by then."""
    whole = pipe.generate([ids(30)], greedy(40))[0].m_generation_ids[0]

    class Slow:
        seen = 0

        def __call__(self, piece: str) -> StreamingStatus:
            self.seen += 1
            time.sleep(0.02)
            if self.seen < 3:
                return StreamingStatus.RUNNING
            return StreamingStatus.CANCEL if is_cancelled else StreamingStatus.STOP

    (result,) = pipe.generate([ids(30)], greedy(40), Slow())
    got = result.m_generation_ids[0]
    assert got == whole[: len(got)]
    assert 3 <= len(got) < 40
    assert (result.m_status == GenerationStatus.CANCEL) == is_cancelled


# -- ends --------------------------------------------------------------------------------------------------------------


def test_a_dropped_handle_ends_its_request(pipe: ContinuousBatchingPipeline) -> None:
    kept, dropped = pipe.add_request(1, ids(30), greedy(40)), pipe.add_request(2, ids(40), greedy(40))
    pipe.step()
    assert pipe.get_metrics().requests == 2
    del dropped
    pipe.step()
    assert pipe.get_metrics().requests == 1
    assert kept.wait(WAIT)
    assert len(kept.outputs()[0].generated_ids) == 40


def test_a_full_cache_is_told_and_not_a_short_answer(folder: Path) -> None:
    tight = make(folder, {"max_bytes": 1 << 19})
    store: Any = tight._backend.cache.store  # type: ignore[attr-defined]
    room = tight._backend.cache.capacity_tokens(None)  # type: ignore[attr-defined]
    with tight.compress("x" * (room - 64), policy="none") as context:
        handle = tight.add_request(1, ids(200), greedy(8))
        assert handle.wait(WAIT)
        assert (handle.end_reason, handle.get_status()) == (EndReason.MEMORY, GenerationStatus.IGNORED)
        with pytest.raises(OutOfMemory, match=r"got 200 tokens with \d+ of \d+ bytes in use; raise max_bytes or close"):
            handle.raise_error()
        for question in (ids(200), ids(8)):
            result = tight.generate([question], greedy(150))[0]
            assert result.m_status == GenerationStatus.IGNORED
            assert len(result.m_generation_ids[0]) < 150
        assert tight.get_metrics().max_cache_usage == 100
        assert context.is_open
    assert len(tight.generate([ids(200)], greedy(8))[0].m_generation_ids[0]) == 8
    assert store.nbytes == 0


def test_a_policy_that_breaks_ends_its_request_only(
    pipe: ContinuousBatchingPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ov_kvcrush.policies.registry import build

    policy: Any = build("snapkv", kept_tokens=16, sink_tokens=1, recent_tokens=4, min_tokens=8, window=4)
    expected = pipe.generate([ids(30)], greedy())[0].m_generation_ids
    monkeypatch.setattr(type(policy), "select", lambda *_: 1 // 0)
    broken = pipe.add_request(1, ids(60), greedy(), policy=policy)
    good = pipe.add_request(2, ids(30), greedy())
    while pipe.has_non_finished_requests():
        pipe.step()
    assert (broken.end_reason, good.end_reason) == (EndReason.ERROR, EndReason.LENGTH)
    assert [good.outputs()[0].generated_ids] == expected
    with pytest.raises(ZeroDivisionError):
        broken.raise_error()
    with pytest.raises(ZeroDivisionError):
        pipe.generate([ids(60)], greedy(), policy=policy)


def test_a_step_that_breaks_is_told_to_all_who_were_in_it(
    pipe: ContinuousBatchingPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the thread of another, too: nobody takes what there was for a whole answer."""
    backend: Any = pipe._backend
    infer, calls = backend._runner.infer, iter(range(1000))
    monkeypatch.setattr(backend._runner, "infer", lambda: infer() if next(calls) != 3 else 1 // 0)
    barrier = threading.Barrier(3)

    def ask(index: int) -> Any:
        barrier.wait()
        with pytest.raises(ZeroDivisionError):
            pipe.generate([ids(30 + index)], greedy(2000))
        return True

    with ThreadPoolExecutor(3) as threads:
        assert all(threads.map(ask, range(3))) or next(calls) > 3
    assert len(pipe.generate([ids(30)], greedy())[0].m_generation_ids[0]) == 8


def test_ctrl_c_of_one_is_not_anothers(pipe: ContinuousBatchingPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    backend: Any = pipe._backend
    other = pipe.add_request(1, ids(30), greedy(20))
    infer = backend._runner.infer

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(backend._runner, "infer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipe.step()
    monkeypatch.setattr(backend._runner, "infer", infer)
    assert other.end_reason == EndReason.ERROR
    with pytest.raises(RuntimeError, match="broken off by KeyboardInterrupt in another thread"):
        other.raise_error()


def test_time_limits_hold_wherever_a_request_is(folder: Path) -> None:
    pipe = make(folder, max_num_seqs=1, max_num_batched_tokens=16)
    first = pipe.add_request(1, ids(3000), greedy(2000), timeout_s=0.2)
    waiting = pipe.add_request(2, ids(30), greedy(8), timeout_s=1e-6)
    assert first.wait(WAIT)
    assert waiting.wait(WAIT)
    for handle in (first, waiting):
        assert handle.end_reason == EndReason.TIMEOUT
        with pytest.raises(RequestTimeout, match="request must end within timeout_s="):
            handle.raise_error()
    with pytest.raises(TimeoutError):
        pipe.generate([ids(30)], greedy(3900), timeout_s=0.01)
    assert pipe.get_metrics().kv_cache_size_in_bytes == 0
    for bad in (0, -1, float("nan"), "1", True):
        with pytest.raises(RequestError, match="timeout_s must be a finite number of seconds above 0"):
            pipe.add_request(3, ids(3), timeout_s=bad)


@pytest.mark.parametrize("engine", ["crush", "genai"])
def test_who_waits_for_a_pipeline_that_is_gone_is_told(engine: str, folder: Path) -> None:
    pipe = ContinuousBatchingPipeline(folder, properties=F32, engine=engine)
    handles = [pipe.add_request(i, ids(30), greedy(3900)) for i in range(2)]
    handles[0].read(WAIT)
    del pipe
    for handle in handles:
        assert handle.wait(WAIT)
        with pytest.raises(CrushError, match="pipeline must be held while its requests run"):
            handle.raise_error()


def test_stop_ends_one_s_own_call(folder: Path) -> None:
    pipe = LLMPipeline(folder, **F32)
    started, lengths = threading.Barrier(3), {}

    def ask(index: int) -> None:
        first = [True]

        def streamer(piece: str) -> None:
            if first.pop() if first else False:
                started.wait(WAIT)

        lengths[index] = len(pipe.generate(ids(30), greedy(300), streamer).tokens[0])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    started.wait(WAIT)
    with pytest.raises(RequestError, match="thread must be that of the call to be ended where several run, got"):
        pipe.stop()
    pipe.stop(threads[0].ident)
    for thread in threads:
        thread.join(WAIT)
    assert lengths[1] == 300


def test_the_queue_is_bounded(folder: Path) -> None:
    pipe = make(folder, max_waiting=2)
    held = [pipe.add_request(i, ids(30), greedy(4)) for i in range(2)]
    with pytest.raises(QueueFull, match="requests that wait must be at most max_waiting=2, got 2 and one more"):
        pipe.add_request(2, ids(30), greedy(4))
    pipe.step()
    held.append(pipe.add_request(2, ids(30), greedy(4)))
    assert all(handle.wait(WAIT) for handle in held)
    with pytest.raises(RequestError, match=r"num_return_sequences must be at most max_num_seqs=4, got 5"):
        make(folder, max_num_seqs=4).generate([ids(3)], do_sample=True, num_return_sequences=5)


def test_process_that_ends_while_a_daemon_generates_ends_in_peace(folder: Path) -> None:
    script = f"""
        import threading, time
        from ov_kvcrush import LLMPipeline
        pipe = LLMPipeline({str(folder)!r})
        begun = threading.Event()
        def ask():
            while True:
                pipe.generate("Hello", max_new_tokens=100000, ignore_eos=True, streamer=lambda piece: begun.set())
        for _ in range(3):
            threading.Thread(target=ask, daemon=True).start()
        assert begun.wait(60)
        print("over")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "over\n"), done.stderr[-2000:]


# -- nobody waits for another ------------------------------------------------------------------------------------------


def test_forking_and_closing_a_context_wait_for_no_step(pipe: ContinuousBatchingPipeline) -> None:
    context = pipe.compress("In the harbour lie boats. " * 4, policy="none")
    thread, begun, goes_on = pipe._backend.thread, threading.Event(), threading.Event()
    blocked = threading.Thread(target=lambda: thread.call(lambda: (begun.set(), goes_on.wait(WAIT))))
    blocked.start()
    assert begun.wait(WAIT)
    try:
        twin = context.fork()
        context.close()
        assert twin.num_tokens == context.num_tokens
        assert pipe.get_metrics().kv_cache_size_in_bytes > 0
    finally:
        goes_on.set()
        blocked.join(WAIT)
    assert len(pipe.add_request(1, "Where?", greedy(4), context=twin).read(WAIT)[0].generated_ids) == 1
    twin.close()


def test_commands_are_run_one_at_a_time_whoever_sends_them() -> None:
    thread, inside, seen = EngineThread(), [0], []

    def command(index: int) -> int:
        inside[0] += 1
        seen.append(inside[0])
        time.sleep(0.0005)
        inside[0] -= 1
        return index

    class Idle:
        has_driven = has_running = False

        def step(self) -> bool:
            return False

        def end_all(self, error: Exception) -> None:
            pass

    engine = Idle()
    thread.join(engine, {})
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda i: thread.call(lambda: command(i)), range(200))) == list(range(200))
        for _ in range(50):
            thread.post(lambda: seen.append(1))
        with pytest.raises(ZeroDivisionError):
            thread.call(lambda: 1 // 0)
    thread.call(lambda: None)
    assert seen == [1] * 250


def test_what_wakes_the_thread_is_not_taken_by_another() -> None:
    """Who finds it idle runs the commands that are there, but does not step: the thread must still look."""
    thread, stepped = EngineThread(), threading.Event()

    class Busy:
        has_driven = has_running = False

        def step(self) -> bool:
            self.has_driven = False
            stepped.set()
            return True

        def end_all(self, error: Exception) -> None:
            pass

    engine = Busy()
    thread.join(engine, {})
    thread.start()

    def drive() -> None:
        engine.has_driven = True
        thread.wake()

    for _ in range(500):
        thread.call(drive)
        assert stepped.wait(WAIT)
        stepped.clear()


def test_an_engine_without_work_waits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for work when it is told, and not meanwhile."""
    pipe, looked = make(folder), []
    thread = pipe._backend.thread
    step_all = thread._step_all
    monkeypatch.setattr(thread, "_step_all", lambda: (looked.append(1), step_all())[1])
    pipe.generate([ids(30)], greedy())
    assert looked
    time.sleep(0.2)  # for what follows the last token
    looked.clear()
    time.sleep(0.5)
    assert not looked
    assert len(pipe.add_request(1, ids(30), greedy(1)).read(WAIT)) == 1
    assert looked


def test_a_short_prompt_does_not_wait_for_a_long_one(folder: Path) -> None:
    pipe = make(folder, max_num_batched_tokens=64)
    long = pipe.add_request(1, ids(3900), greedy(2))
    for _ in range(4):
        pipe.step()
    short = pipe.add_request(2, ids(16, 100), greedy(2))
    pipe.step()
    assert short.can_read()
    assert not long.can_read()
    while pipe.has_non_finished_requests():
        pipe.step()
    assert long.end_reason == EndReason.LENGTH


def test_a_long_prompt_is_not_starved_by_short_ones(folder: Path) -> None:
    """Every step has a new short one that would take all its rows."""
    pipe = make(folder, max_num_batched_tokens=64, max_num_seqs=64)
    long = pipe.add_request(0, ids(600), greedy(1))
    held, steps = [], 0
    while not long.end_reason:
        held.append(pipe.add_request(1 + steps, ids(64, steps), greedy(1)))
        pipe.step()
        steps += 1
        assert steps < 200
    assert sum(handle.end_reason is not None for handle in held) > 4
    for handle in held:
        handle.cancel()


def test_a_prompt_without_memory_lets_small_ones_pass_but_not_for_ever(folder: Path) -> None:
    pipe = make(folder, {"max_bytes": 1 << 20})
    cache: Any = pipe._backend.cache  # type: ignore[attr-defined]
    room = cache.capacity_tokens(None)
    holder = pipe.add_request(0, ids(room // 2), greedy(room // 4))
    while not holder.can_read():
        pipe.step()
    large = pipe.add_request(1, ids(room // 2 + 200), greedy(2))
    small = pipe.add_request(2, ids(16), greedy(2))
    pipe.step()
    assert small.can_read()
    assert not large.can_read()
    held = []
    for index in range(200):
        held.append(pipe.add_request(10 + index, ids(16), greedy(1)))
        pipe.step()
    passed = sum(handle.end_reason is not None for handle in held)
    assert 0 < passed < 64
    holder.cancel()
    assert large.wait(WAIT)
    assert large.end_reason == EndReason.LENGTH
    assert all(handle.wait(WAIT) for handle in held)


def test_higher_priority_comes_first(folder: Path) -> None:
    pipe = make(folder, max_num_batched_tokens=32, max_num_seqs=1)
    first = pipe.add_request(0, ids(64), greedy(4))
    pipe.step()
    usual, urgent = pipe.add_request(1, ids(20), greedy(2)), pipe.add_request(2, ids(90), greedy(2), priority=5)
    ended = []
    while pipe.has_non_finished_requests():
        pipe.step()
        ended += [h for h in (first, usual, urgent) if h.end_reason and h not in ended]
    assert ended == [first, urgent, usual]
    with pytest.raises(RequestError, match="priority must be an integer, got 'high'"):
        pipe.add_request(3, ids(3), priority="high")  # type: ignore[arg-type]


def test_sequences_of_a_request_take_the_seats_they_will_need(folder: Path) -> None:
    pipe = make(folder, max_num_seqs=4)
    scheduler: Any = pipe._backend.scheduler  # type: ignore[attr-defined]
    drawn = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 12, "ignore_eos": True}
    handles = [pipe.add_request(i, ids(20 + i), **drawn) for i in range(3)]
    while pipe.has_non_finished_requests():
        pipe.step()
        assert len(scheduler.running) <= 4
    assert [len(handle.outputs()) for handle in handles] == [3, 3, 3]


# -- the pace of steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_ms", [0.05, 0.5, 4.0])
def test_chunks_keep_a_step_within_its_time(row_ms: float) -> None:
    """On a machine that takes 20 ms for decodes and row_ms for a row, growing with the text before it."""
    pace, took = StepPace(0.2), []
    done = 0
    for _ in range(4):
        pace.note(1, 0, 0.020)
    while done < 6000:
        rows = pace.rows_beside_decodes(512)
        assert 16 <= rows <= 512
        seconds = 0.020 + rows * row_ms * 1e-3 * (1 + done / 3000)
        took.append((rows, seconds))
        pace.note(1, rows, seconds)
        done += rows
    assert all(seconds <= 0.3 or rows == 16 for rows, seconds in took)
    assert max(rows for rows, _ in took) > 32 or row_ms == 4.0
    assert StepPace(0).rows_beside_decodes(512) == 512
