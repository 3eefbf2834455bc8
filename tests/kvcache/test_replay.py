"""The second reading of a prompt: its scores are those of eager attention, and it leaves nothing behind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from covering import covering, rarely
from eviction_runs import (
    EXACT,
    READ_TWICE,
    Eager,
    Tracer,
    add,
    as_lists,
    assert_logits_equal,
    counts,
    eager_model,
    held,
    line_of,
    make_engine,
    nbytes,
    prompt,
    read_prompt,
    run,
    small,
    tokens,
)
from policy_states import KINDS, cache_state
from tiny_models import SLIDING_WINDOW, SLIDING_WINDOWS

from ov_kvcrush import CrushError
from ov_kvcrush.core.eviction import ReplayPrompt
from ov_kvcrush.engine.engine import Engine
from ov_kvcrush.engine.handle import GenerationHandle, Status
from ov_kvcrush.policies.base import Budget, CacheState, Inputs, LayerState, Policy, Scorer
from ov_kvcrush.policies.kvcrush.policy import KVCrush
from ov_kvcrush.policies.scorers.kvzip import KVzip

BLOCK = 32
KVZIP = {"name": "kvzip", "chunk": 32}
EVERY_POLICY = pytest.mark.parametrize("variant", READ_TWICE, ids=json.dumps)
EndOf = Callable[[Engine, GenerationHandle], None]


def assert_nothing_left(engine: Engine) -> None:
    memory: Any = engine.cache
    assert not engine.has_unfinished()
    assert len(engine.scheduler) == len(memory._admission.prefilling) == 0
    assert (
        nbytes(engine)
        == memory.store.num_sequences
        == memory.staging.pool.num_used
        == memory.staging.pool._ref_counts.sum()
        == 0
    )


@pytest.fixture(scope="module")
def engine_of(tiny_ir: Callable[[str], Path]) -> Callable[[str, int], Engine]:
    return cache(lambda kind, rows: make_engine(tiny_ir(kind), max_num_batched_tokens=rows))


@pytest.fixture
def engine(engine_of: Callable[[str, int], Engine]) -> Iterator[Engine]:
    """The same for all tests; each must leave it empty."""
    shared = engine_of("llama", 48)
    yield shared
    assert_nothing_left(shared)


@pytest.fixture(scope="module")
def eager(tiny_hf: Callable[[str], Path]) -> Eager:
    return eager_model(tiny_hf("llama"))


# -- scores ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A prompt that is read twice. words: numbers of tokens of ReplayPrompt. rows: of a step, at most."""

    length: int
    chunk: int
    sees: str = "chunk"
    head: int = 0
    words: tuple[int, int, int] = (5, 9, 4)
    rows: int = 64
    kind: str = "llama"
    sample: float = 1.0

    def __str__(self) -> str:
        return "-".join(map(str, vars(self).values()))

    def all_words(self) -> ReplayPrompt:
        return ReplayPrompt(*(prompt(n, seed=n) for n in self.words))


CASES = [
    Case(150, 64),
    Case(160, 64, words=(0, 0, 0)),
    Case(160, 64, "all", words=(0, 0, 0), rows=16),
    Case(150, 32, "all", head=40, rows=24),
    Case(100, 2048),
    Case(100, 2048, "all", words=(40, 40, 33)),
    Case(203, 96, head=33, rows=512),
    Case(203, 50, head=64, words=(1, 0, 0), rows=33),
    Case(96, 32, head=80),
    Case(120, 32, rows=8),
    Case(203, 64, sample=0.5),
    Case(203, 64, "all", head=40, rows=16, sample=0.1),
    Case(150, 64, kind="qwen3"),
    Case(150, 64, "all", kind="gpt_neox", head=7),
    Case(150, 64, kind="gemma3", rows=16),
]


def replayed_scores(engine: Engine, case: Case, ids: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Of each layer (H, S): what the policy is shown."""
    view: Any = engine.cache._view  # type: ignore[attr-defined]
    shown = []

    def choose(*args: Any, then: Any = view.choose) -> Any:
        shown.append(args[5])
        return then(*args)

    monkeypatch.setattr(view, "choose", choose)
    policy = small({"name": "kvzip", "chunk": case.chunk, "sees": case.sees, "sample": case.sample})
    use = {"replay_prompt": case.all_words(), "system": (0, case.head) if case.head else None}
    handle = add(engine, 0, ids, policy, new_tokens=3, use=use)
    run(engine)
    assert len(tokens(handle)[0]) == 3
    assert len(shown) == 1
    return [np.concatenate(layer) for layer in shown[0]]


def slow_scores(folder: Path, case: Case, ids: np.ndarray) -> list[np.ndarray]:
    """The same by Hugging Face's eager attention, each chunk behind the whole text in one run."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    num_heads = model.config.num_attention_heads
    size, length, words = -(-case.chunk // BLOCK) * BLOCK, case.length, case.all_words()
    found = [np.full((num_heads, length), np.nan, np.float32) for _ in range(model.config.num_hidden_layers)]
    for layer in found:
        layer[:, : case.head] = 0
    begin = case.head
    while begin < length:
        end = min(begin // BLOCK * BLOCK + size, length)
        ask = [words.first] if begin == case.head else [words.again, ids[begin - 8 : begin]]
        repeated = begin + math.ceil(case.sample * (end - begin))
        rows = np.concatenate([*ask, words.answer, ids[begin:repeated]])
        places, total = np.arange(length), length + len(rows)
        in_front = places < max(1, -(-case.head // BLOCK)) * BLOCK
        in_chunk = (places >= begin // BLOCK * BLOCK) & (places < -(-end // BLOCK) * BLOCK)
        seen = np.ones(length, bool) if case.sees == "all" else in_front | in_chunk
        visible = np.tri(total, dtype=bool)
        visible[length:, :length] = seen
        # A sliding window is one of what the rows have before them, seen or their own.
        number = np.concatenate([places, seen.sum() + np.arange(len(rows))])
        behind = np.concatenate([np.cumsum(seen) - 1, number[length:]])
        near = number[:, None] - np.concatenate([places, number[length:]]) < SLIDING_WINDOW
        near[length:] = number[length:, None] - behind < SLIDING_WINDOW
        masks = {"full_attention": visible, "sliding_attention": visible & near}
        masks = {k: torch.where(torch.from_numpy(m), 0.0, -torch.inf)[None, None] for k, m in masks.items()}
        with torch.no_grad():
            attentions = model(
                torch.from_numpy(np.concatenate([ids, rows]))[None],
                attention_mask=masks if case.kind in SLIDING_WINDOWS else masks["full_attention"],
                position_ids=torch.arange(total)[None],
                output_attentions=True,
            ).attentions
        for layer, attention in zip(found, attentions, strict=True):
            layer[:, begin:repeated] = attention[0, :, length:, begin:repeated].max(axis=1).values.numpy()
        begin = end
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_equal_eager_attention(
    case: Case,
    engine_of: Callable[[str, int], Engine],
    tiny_hf: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids, engine = prompt(case.length, seed=3), engine_of(case.kind, case.rows)
    ours = replayed_scores(engine, case, ids, monkeypatch)
    assert_nothing_left(engine)
    theirs = slow_scores(tiny_hf(case.kind), case, ids)
    for mine, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-3, rtol=0)
        assert np.nanmax(expected[:, case.head :]) > 0.1


@EVERY_POLICY
def test_what_is_read_twice_is_chosen_by_both_readings(variant: dict[str, Any], engine: Engine) -> None:
    """Other words, another choice; the same words, the same; always the budget."""
    chosen = []
    for seed in (0, 1, 0):
        words = ReplayPrompt(prompt(6, seed=seed), prompt(6, seed=seed), prompt(3, seed=seed))
        line = read_prompt(engine, add(engine, 0, prompt(150), small(variant), use={"replay_prompt": words}))
        chosen.append(as_lists(held(engine, line)))
        assert counts(held(engine, line)).mean() == 24
        run(engine)
    assert chosen[0] == chosen[2] != chosen[1]


# -- with others -------------------------------------------------------------------------------------------------------


def test_several_at_once_attend_to_what_they_keep_and_equal_single_ones(engine: Engine, eager: Eager) -> None:
    policies = [*(small(v) for v in READ_TWICE), None, small({"name": "snapkv"}), small(KVZIP, sees="all")]
    prompts = [prompt(60 + 31 * i, seed=i) for i in range(len(policies))]
    tracer, handles = Tracer(engine, 300), []
    with tracer.noting():
        for i, (ids, policy) in enumerate(zip(prompts, policies, strict=True)):
            handles.append(add(engine, i, ids, policy, new_tokens=20))
            engine.step()
        run(engine)
    assert_logits_equal([trace for handle in handles for trace in tracer.of(handle)], eager)
    for handle, ids, policy in zip(handles, prompts, policies, strict=True):
        single = add(engine, 99, ids, policy, new_tokens=20)
        run(engine)
        assert tokens(handle) == tokens(single)


@EVERY_POLICY
def test_sequences_of_a_request_attend_to_what_was_kept(variant: dict[str, Any], engine: Engine, eager: Eager) -> None:
    options = {"do_sample": True, "num_return_sequences": 3, "rng_seed": 4, "temperature": 2.0}
    handle = add(engine, 0, prompt(90), small(variant), new_tokens=20, **options)
    tracer = Tracer(engine, 120)
    tracer.run()
    assert len({tuple(t) for t in tokens(handle)}) == 3
    assert_logits_equal(tracer.of(handle), eager)


def replaying(engine: Engine, handle: GenerationHandle) -> bool:
    replay = engine.cache.replay(line_of(handle))
    return replay is not None and replay.reader is not None and replay.reader.num_cached > 0


def step_until_it_replays(engine: Engine, handle: GenerationHandle, again: int = 3) -> None:
    while not replaying(engine, handle):
        engine.step()
    for _ in range(again):
        engine.step()
    assert replaying(engine, handle)


def stop(engine: Engine, handle: GenerationHandle) -> None:
    handle.stop()


def cancel(engine: Engine, handle: GenerationHandle) -> None:
    handle.cancel()


def fail(engine: Engine, handle: GenerationHandle) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._runner, "infer", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()


@pytest.mark.parametrize("end", [stop, cancel, fail])
def test_request_that_ends_while_it_is_read_again_gives_all_back(end: EndOf, engine: Engine) -> None:
    handle = add(engine, 0, prompt(150), small(KVZIP), use={"return_snapshot": True})
    step_until_it_replays(engine, handle)
    end(engine, handle)
    engine.process_aborts()
    assert handle.snapshot is None
    assert handle.get_status() == (Status.STOP if end is stop else Status.CANCEL)
    assert_nothing_left(engine)


@pytest.mark.parametrize("end", [stop, cancel])
def test_request_that_ends_while_it_is_read_again_disturbs_no_other(end: EndOf, engine: Engine) -> None:
    policies = [small(KVZIP), small({"name": "kvcrush"})]
    others = [add(engine, 1 + i, prompt(120, seed=i), policy) for i, policy in enumerate(policies)]
    handle = add(engine, 0, prompt(150), small(KVZIP))
    step_until_it_replays(engine, handle, again=0)
    end(engine, handle)
    run(engine)
    for i, (other, policy) in enumerate(zip(others, policies, strict=True)):
        single = add(engine, 0, prompt(120, seed=i), policy)
        run(engine)
        assert tokens(other) == tokens(single)


def test_request_that_loses_its_memory_while_it_is_read_again_begins_anew(
    tiny_ir: Callable[[str], Path], engine: Engine, eager: Eager, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe: Any = engine.cache
    limit = probe.store.bytes_for(32) + probe.store.bytes_for(24 + 32) + 2 * probe.store.capture_bytes(32)
    tight = make_engine(tiny_ir("llama"), {**EXACT, "max_bytes": limit}, max_num_batched_tokens=32)
    was_replaying = []

    def preempt(lines: list[Any], then: Any = tight.scheduler._preempt) -> None:
        (line,) = lines
        replay = tight.cache.replay(line)
        was_replaying.append(replay is not None and replay.reader is not None)
        then(lines)

    monkeypatch.setattr(tight.scheduler, "_preempt", preempt)
    hungry = add(tight, 0, prompt(22), new_tokens=40)
    handle = add(tight, 1, prompt(160, seed=5), small(KVZIP), new_tokens=8)
    tracer = Tracer(tight, 200)
    tracer.run()
    assert was_replaying == [True]
    assert [len(tokens(h)[0]) for h in (hungry, handle)] == [40, 8]
    assert_logits_equal([trace for h in (hungry, handle) for trace in tracer.of(h)], eager)
    assert_nothing_left(tight)
    single = add(engine, 0, prompt(160, seed=5), small(KVZIP), new_tokens=8)
    run(engine)
    assert tokens(handle) == tokens(single)


def test_prompts_wait_for_staging_blocks(tiny_ir: Callable[[str], Path], engine: Engine) -> None:
    """The pool has room for the two readings of one of them."""
    tight = make_engine(tiny_ir("llama"), {**EXACT, "staging_bytes": 9 << 15}, max_num_batched_tokens=48)
    assert tight.cache.staging.pool.num_blocks == 9  # type: ignore[attr-defined]
    handles = [add(tight, i, prompt(150, seed=i), small(KVZIP)) for i in range(4)]
    run(tight)
    assert_nothing_left(tight)
    for i, handle in enumerate(handles):
        single = add(engine, 0, prompt(150, seed=i), small(KVZIP))
        run(engine)
        assert tokens(handle) == tokens(single)


@pytest.mark.parametrize("seed", [*range(2), *rarely(*range(2, 6))])
def test_random_traffic_attends_to_what_is_kept(seed: int, tiny_ir: Callable[[str], Path], eager: Eager) -> None:
    """Contexts and what goes on from them, prompts that are read twice or once, early ends, too little memory."""
    rng = np.random.default_rng(seed)
    probe: Any = make_engine(tiny_ir("llama")).cache
    limit = probe.store.bytes_for(int(rng.integers(250, 400)))
    settings = {**EXACT, "max_bytes": limit, "staging_bytes": 16 << 15}
    engine = make_engine(
        tiny_ir("llama"), settings, max_num_batched_tokens=int(rng.choice([16, 48, 200])), enable_prefix_caching=True
    )
    policies = [None, small({"name": "snapkv"}), *(small({**v, "chunk": 64}, kept_tokens=40) for v in READ_TWICE)]
    tracer, handles, contexts, known = Tracer(engine, 400), [], [], set()
    with tracer.noting():
        for i in range(14):
            policy = policies[rng.integers(len(policies))]
            use: dict[str, Any] = {}
            if i % 5 == 0:
                use, ids = {"prefill_only": True}, prompt(int(rng.integers(30, 150)), seed=i)
            elif contexts and rng.random() < 0.6:
                source, kv = contexts[rng.integers(len(contexts))]
                ids = np.concatenate([source, prompt(int(rng.integers(1, 60)), seed=i)])
                use = {"context": kv, "return_snapshot": bool(rng.random() < 0.3)}
            else:
                ids = prompt(120)[: rng.integers(40, 120)]
            options = {"num_return_sequences": 2, "do_sample": True, "rng_seed": i} if not use else {}
            handles.append(add(engine, i, ids[:180], policy, int(rng.integers(1, 40)), use=use, **options))
            for _ in range(rng.integers(0, 30)):
                engine.step()
                assert nbytes(engine) <= limit
            if rng.random() < 0.2:
                getattr(handles[rng.integers(len(handles))], rng.choice(["cancel", "stop"]))()
            for handle in handles:
                kv = handle.snapshot
                if kv is not None and kv not in known and kv.num_tokens < 120:
                    contexts.append((line_of(handle).ids[: kv.num_tokens], kv))
                    known.add(kv)
            if len(contexts) > 2:  # who goes on from it still can
                contexts.pop(0)[1].release()
        run(engine)
    assert_logits_equal([trace for handle in handles for trace in tracer.of(handle) if trace.logits], eager)
    for handle in handles:
        if handle.snapshot is not None and not engine.snapshots.is_gone(handle.snapshot):
            handle.snapshot.release()
    engine.clear_prefixes()
    assert_nothing_left(engine)


# -- contexts, as the engine has them ----------------------------------------------------------------------------------


def read(engine: Engine, ids: np.ndarray, policy: Policy | None) -> Any:
    handle = add(engine, 500, ids, policy, use={"prefill_only": True})
    run(engine)
    assert tokens(handle) == [[]]
    return handle.snapshot.as_base()


@pytest.mark.parametrize(
    ("policy", "growth"), covering(["kvzip", "h2o", None], [None, "snapkv", "h2o", "kvcrush", "kvzip"])
)
def test_request_that_goes_on_attends_to_what_the_context_kept(
    policy: str | None, growth: str | None, engine: Engine, eager: Eager
) -> None:
    """What the context kept is not chosen from again; of what follows the policy keeps its budget."""
    tracer = Tracer(engine, 260)
    with tracer.noting():
        kv = read(engine, prompt(100), policy and small({"name": policy}))
    base = kv.state.positions_of(100) or [[np.arange(100)] * 2] * 2
    ids = np.concatenate([prompt(100), prompt(50, seed=1)])
    handle = add(engine, 0, ids, growth and small({"name": growth}), new_tokens=60, use={"context": kv})
    with tracer.noting():
        line = read_prompt(engine, handle)
        reads_once = growth not in (None, "kvzip")
        assert counts(held(engine, line)).mean() == counts(base).mean() + (24 if reads_once else 50)
        while engine.has_unfinished():
            positions = held(engine, line)
            assert as_lists([[head[head < 100] for head in layer] for layer in positions]) == as_lists(base)
            if reads_once:
                assert counts(positions).mean() <= counts(base).mean() + 24 + 8
            engine.step()
    assert handle.get_stats().num_reused_tokens == 100
    assert_logits_equal(tracer.of(handle), eager)
    kv.release()


def test_what_went_on_from_a_context_serves_no_prompt_without_it(tiny_ir: Callable[[str], Path]) -> None:
    """Its beginning was chosen by another policy than the request's own."""
    engine = make_engine(tiny_ir("llama"), enable_prefix_caching=True)
    policy, ids = small({"name": "snapkv"}), prompt(120)
    handle = add(engine, 0, prompt(150), policy)
    run(engine)
    engine.clear_prefixes()
    kv = read(engine, ids, small(KVZIP))
    again = np.concatenate([ids, prompt(40, seed=1)])
    asked = add(engine, 0, again, policy, use={"context": kv})
    run(engine)
    more = np.concatenate([again, np.array(tokens(asked)[0]), prompt(5, seed=2)])
    plain = add(engine, 0, more, policy)
    run(engine)
    assert plain.get_stats().num_reused_tokens == 0
    assert len(tokens(handle)[0]) == 12
    kv.release()
    engine.clear_prefixes()
    assert_nothing_left(engine)


def test_context_that_is_dropped_stays_for_those_that_wait_for_it(tiny_ir: Callable[[str], Path]) -> None:
    engine = make_engine(tiny_ir("llama"), max_num_seqs=1)
    kv = read(engine, prompt(100), small(KVZIP))
    ids = [np.concatenate([prompt(100), prompt(10 + i, seed=i)]) for i in range(3)]
    expected = []
    for row in ids:
        expected.append(add(engine, 0, row, use={"context": kv}))
        run(engine)
    handles = [add(engine, i, row, use={"context": kv}) for i, row in enumerate(ids)]
    engine.step()
    kv.release()
    run(engine)
    assert [tokens(h) for h in handles] == [tokens(h) for h in expected]
    assert_nothing_left(engine)
    with pytest.raises(CrushError, match="context must be open, got one that was closed"):
        add(engine, 9, ids[0], use={"context": kv})


def test_limits_of_a_request_that_goes_on_count_what_its_context_holds(tiny_ir: Callable[[str], Path]) -> None:
    """The store has room for 128 tokens a head, of which the context of 300 takes 24 or more."""
    probe: Any = make_engine(tiny_ir("llama")).cache
    for growth in (None, small({"name": "snapkv"}), small(KVZIP)):
        captured = probe.store.capture_bytes(growth.inputs.window) if growth else 0
        cache = {**EXACT, "max_bytes": probe.store.bytes_for(128) + captured}
        engine = make_engine(tiny_ir("llama"), cache, max_num_batched_tokens=16)
        kv = read(engine, prompt(300), small({"name": "snapkv"}))
        row = np.concatenate([prompt(300), prompt(20, seed=1)])
        handle = add(engine, 0, row, growth, new_tokens=200, use={"context": kv})
        run(engine)
        num_tokens = len(tokens(handle)[0])
        assert num_tokens == 200 if growth and not growth.inputs.replay else 20 <= num_tokens <= 128 - 24 - 20 + 1
        with pytest.raises(CrushError, match="prompt must have at least one token behind its context, got none"):
            add(engine, 0, prompt(300), use={"context": kv})
        if growth is None or growth.inputs.replay:
            with pytest.raises(CrushError, match=r"must fit into the KV store of .* got 500 tokens"):
                add(engine, 0, np.concatenate([prompt(300), prompt(200)]), growth, use={"context": kv})
        kv.release()
        assert_nothing_left(engine)


# -- what cannot be read twice -----------------------------------------------------------------------------------------


def test_prompt_that_does_not_fit_the_staging_blocks_twice_is_refused(tiny_ir: Callable[[str], Path]) -> None:
    engine = make_engine(tiny_ir("llama"), {**EXACT, "staging_bytes": 9 << 15})
    message = (
        r"prompt must fit into the staging blocks to be read twice, as policy 'kvzip' wants: it takes 458752 bytes, "
        r"got staging of 294912; raise staging_bytes"
    )
    with pytest.raises(CrushError, match=message):
        add(engine, 0, prompt(190), small({"name": "kvzip"}))
    fits = add(engine, 0, prompt(190), small(KVZIP))
    short = add(engine, 1, prompt(20), small({"name": "kvzip"}, kept_tokens=40))
    run(engine)
    assert [len(tokens(handle)[0]) for handle in (fits, short)] == [12, 12]
    assert_nothing_left(engine)


# -- KVCrush over KVzip ------------------------------------------------------------------------------------------------


class Highest(Scorer):
    """The highest attention of the window."""

    name = "highest"

    @property
    def inputs(self) -> Inputs:
        return Inputs(window=8)

    def score(self, layer: LayerState, index: int, length: int) -> list[np.ndarray]:
        return [np.array([max(row[s] for row in x.attention) for s in range(len(x))], np.float32) for x in layer]


@pytest.mark.parametrize(("kind", "page", "bits"), covering(KINDS, [0, 8], ["attention", "scores"]))
def test_kvcrush_takes_its_bits_from_the_second_reading(kind: str, page: int, bits: str) -> None:
    """As if that were the attention of a window."""
    options: dict[str, Any] = {"sink_tokens": 2, "recent_tokens": 6, "page": page, "bits": bits}
    over_kvzip = KVCrush(Budget(kept_tokens=24, min_tokens=16), scorer=KVzip(), **options)
    over_window = replace(over_kvzip, scorer=Highest())
    assert (over_kvzip.inputs.window, over_kvzip.inputs.replay) == (0, KVzip().inputs.replay)
    protected = over_kvzip.protected(90)
    state = cache_state(1, over_kvzip.inputs, kind, protected, (2, 2), answering=False)
    swapped = [tuple(replace(head, attention=head.replayed, replayed=None) for head in x) for x in state.layers]
    mine = over_kvzip.select(state, 24)
    theirs = over_window.select(CacheState(tuple(swapped), 90, protected), 24)
    assert as_lists(mine.kept) == as_lists(theirs.kept)
    assert as_lists(mine.representatives or []) == as_lists(theirs.representatives or [])
    assert mine.representatives
