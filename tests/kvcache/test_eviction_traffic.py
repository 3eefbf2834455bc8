"""Requests with policies among each other: batches, forks, long answers, lost memory, kept prefixes, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino_genai as ov_genai
import pytest
from covering import covering, rarely
from eviction_runs import (
    EXACT,
    READ_ONCE,
    READ_TWICE,
    VARIANTS,
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
    state_of,
    tokens,
)

from ov_kvcrush import CrushError
from ov_kvcrush.core.cache_params import CacheParams
from ov_kvcrush.engine.engine import Engine
from ov_kvcrush.policies.base import Policy
from ov_kvcrush.policies.registry import build

EVERY_POLICY = pytest.mark.parametrize("variant", VARIANTS, ids=json.dumps)
EVERY_ONE_THAT_READS_ONCE = pytest.mark.parametrize("variant", READ_ONCE, ids=json.dumps)
EVERY_ONE_THAT_READS_TWICE = pytest.mark.parametrize("variant", READ_TWICE, ids=json.dumps)
GREEDY_TWICE = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}


@pytest.fixture(scope="module")
def shared(tiny_ir: Callable[[str], Path]) -> Engine:
    return make_engine(tiny_ir("llama"))


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    """The same for all tests; each must leave it empty."""
    yield shared
    assert nbytes(shared) == shared.metrics().staging_size_in_bytes == 0
    assert shared.cache.store.num_sequences == 0  # type: ignore[attr-defined]
    assert not shared.has_unfinished()


@pytest.fixture(scope="module")
def eager(tiny_hf: Callable[[str], Path]) -> Eager:
    return eager_model(tiny_hf("llama"))


def alone(engine: Engine, ids: np.ndarray, policy: Policy | None = None, **options: Any) -> list[list[int]]:
    handle = add(engine, 1000, ids, policy, **options)
    run(engine)
    return tokens(handle)


# -- together ----------------------------------------------------------------------------------------------------------


def test_batch_of_different_policies_equals_single(engine: Engine) -> None:
    policies = [None, *(small(v) for v in VARIANTS), build("none")]
    prompts = [prompt(20 + 7 * i, seed=i) for i in range(len(policies))]
    handles = []
    for i, (ids, policy) in enumerate(zip(prompts, policies, strict=True)):
        handles.append(add(engine, i, ids, policy, new_tokens=30))
        engine.step()
    run(engine)
    for handle, ids, policy in zip(handles, prompts, policies, strict=True):
        assert tokens(handle) == alone(engine, ids, policy, new_tokens=30)


@EVERY_POLICY
def test_sequences_of_a_request_go_on_as_the_single_one(variant: dict[str, Any], engine: Engine) -> None:
    policy = small(variant)
    twins = alone(engine, prompt(60), policy, new_tokens=30, **GREEDY_TWICE)
    assert twins == 2 * alone(engine, prompt(60), policy, new_tokens=30)


def test_sequences_that_part_choose_for_themselves(engine: Engine, eager: Eager) -> None:
    options = {"do_sample": True, "num_return_sequences": 3, "rng_seed": 4, "temperature": 2.0}
    handle = add(engine, 0, prompt(60), small({"name": "kvcrush"}), new_tokens=40, **options)
    tracer = Tracer(engine, 100)
    tracer.run()
    assert len({tuple(t) for t in tokens(handle)}) == 3
    left = {np.stack(trace.sees)[:, :, 98].tobytes() for trace in tracer.of(handle)}
    assert len(left) == 3, "what the last row sees"
    assert_logits_equal(tracer.of(handle), eager)


def test_request_that_loses_its_memory_goes_on_within_its_budget(tiny_ir: Callable[[str], Path], eager: Eager) -> None:
    probe: Any = make_engine(tiny_ir("llama")).cache
    engine = make_engine(tiny_ir("llama"), {**EXACT, "max_bytes": probe.store.bytes_for(330)})
    policies = [small({"name": name}) for name in ("kvcrush", "h2o", "adakv", "rkv")]
    hungry = add(engine, 9, prompt(30), new_tokens=180)
    handles = [add(engine, i, prompt(60 + i, seed=i), p, new_tokens=150) for i, p in enumerate(policies)]
    tracer = Tracer(engine, 300)
    tracer.run()
    assert engine.metrics().num_preemptions > 0
    assert engine.metrics().max_cache_usage <= 100
    assert nbytes(engine) == 0
    again = [trace for handle in handles for trace in tracer.of(handle) if trace.first]
    assert again, "one with a policy was preempted"
    assert [len(tokens(handle)[0]) for handle in (*handles, hungry)] == [150] * 4 + [180]
    assert_logits_equal([trace for handle in (*handles, hungry) for trace in tracer.of(handle)], eager)


@pytest.mark.parametrize(("steps", "ending"), covering([1, 3, 20], ["cancel", "stop"]))
def test_request_that_is_ended_early_gives_all_back(steps: int, ending: str, engine: Engine) -> None:
    """While the prompt is read (100 tokens in chunks of 64), after its choice, after choices of the answer."""
    other = add(engine, 1, prompt(40), small({"name": "kvcrush"}), new_tokens=30)
    handle = add(engine, 0, prompt(100), small({"name": "h2o"}), new_tokens=100)
    for _ in range(steps):
        engine.step()
    getattr(handle, ending)()
    run(engine)
    assert tokens(other) == alone(engine, prompt(40), small({"name": "kvcrush"}), new_tokens=30)


@pytest.mark.parametrize("seed", [*range(4), *rarely(*range(4, 12))])
def test_random_traffic_attends_to_what_is_kept(seed: int, tiny_ir: Callable[[str], Path], eager: Eager) -> None:
    """Prompts of a common text, staged or not, forks, turns, early ends, too little memory, prefixes: all at once."""
    rng = np.random.default_rng(seed)
    probe: Any = make_engine(tiny_ir("llama")).cache
    limit = probe.store.bytes_for(int(rng.integers(200, 350)))
    settings = {**EXACT, "max_bytes": limit, "staging_bytes": int(rng.choice([1 << 16, 1 << 19]))}
    chunk = int(rng.choice([16, 48, 200]))
    engine = make_engine(tiny_ir("llama"), settings, max_num_batched_tokens=chunk, enable_prefix_caching=True)
    policies = [None, *(small(READ_ONCE[i], kept_tokens=40) for i in rng.choice(len(READ_ONCE), 3, replace=False))]
    tracer, handles, history = Tracer(engine, 400), [], prompt(120)
    with tracer.noting():
        for i in range(14):
            if rng.random() < 0.5:  # the next turn of what came to its end last, or a beginning of it
                ids = np.concatenate([history, prompt(int(rng.integers(1, 30)), seed=i)])
            else:
                ids = history[: rng.integers(40, 120)]
            policy = policies[rng.integers(len(policies))]
            options = {"num_return_sequences": 3, "do_sample": True, "rng_seed": i} if rng.random() < 0.3 else {}
            protect = [(3, 3 + int(rng.integers(1, 10)))] if rng.random() < 0.3 else []
            handles.append(add(engine, i, ids[:180], policy, int(rng.integers(1, 50)), protect, **options))
            for _ in range(rng.integers(0, 30)):
                engine.step()
                assert nbytes(engine) <= limit
            if rng.random() < 0.2:
                getattr(handles[rng.integers(len(handles))], rng.choice(["cancel", "stop"]))()
            history = next((line_of(h).ids[:] for h in handles[::-1] if line_of(h).is_finished), history)
        run(engine)
    assert_logits_equal([trace for handle in handles for trace in tracer.of(handle) if trace.logits], eager)
    engine.clear_prefixes()
    assert nbytes(engine) == engine.cache.store.num_sequences == 0  # type: ignore[attr-defined]


# -- long answers and long prompts -------------------------------------------------------------------------------------


@EVERY_ONE_THAT_READS_ONCE
def test_long_answer_stays_within_budget_and_stride(variant: dict[str, Any], engine: Engine) -> None:
    policy = small(variant)
    handle = add(engine, 0, prompt(10), policy, new_tokens=120)
    line = read_prompt(engine, handle)
    num_choices, spans = 0, []
    while engine.has_unfinished():
        positions = held(engine, line)
        sizes = counts(positions)
        assert sizes.mean() <= 24 + 8
        if state_of(engine, line).num_choices > num_choices:
            num_choices = state_of(engine, line).num_choices
            spans.append(line.num_cached)
            assert sizes.sum() == 24 * sizes.size
            always = {0, 1, *range(line.num_cached - 6, line.num_cached)}
            assert all(set(head) >= always for layer in positions for head in layer)
        engine.step()
    assert spans == list(range(24 + 8 + 1, 130, 9)), "each time that the stride is passed"


@EVERY_ONE_THAT_READS_TWICE
def test_answer_that_is_not_read_twice_stays(variant: dict[str, Any], engine: Engine) -> None:
    line = read_prompt(engine, add(engine, 0, prompt(60), small(variant), new_tokens=50))
    while engine.has_unfinished():
        positions = held(engine, line)
        assert counts(positions).mean() == 24 + line.num_cached - 60
        assert all(set(head) >= set(range(54, line.num_cached)) for layer in positions for head in layer)
        engine.step()


def test_sums_of_h2o_survive_choices(engine: Engine) -> None:
    """What a token has gathered never falls, and is remembered for exactly those tokens that stay."""
    line = read_prompt(engine, add(engine, 0, prompt(60), small({"name": "h2o", "window": 16}), new_tokens=80))
    before: list[list[dict[int, float]]] = [[{}, {}], [{}, {}]]
    num_choices = grown = 0
    while engine.has_unfinished():
        if state_of(engine, line).num_choices > num_choices:
            num_choices = state_of(engine, line).num_choices
            assert as_lists(state_of(engine, line).positions) == as_lists(held(engine, line))
            for layer in range(2):
                for head in range(2):
                    sums = dict(
                        zip(
                            state_of(engine, line).positions[layer][head].tolist(),
                            state_of(engine, line).policy_state[layer][head],
                            strict=True,
                        )
                    )
                    assert min(sums.values()) > 0
                    for place, value in before[layer][head].items():
                        assert sums.get(place, value) >= value
                        grown += sums.get(place, value) > value
                    before[layer][head] = sums
        engine.step()
    assert num_choices == 1 + 79 // 9
    assert grown > 100


@pytest.mark.parametrize("name", ["kvcrush", "adakv", "h2o", "streaming_llm", "expected_attention"])
def test_memory_of_a_long_text_does_not_grow_with_it(name: str, tiny_ir: Callable[[str], Path]) -> None:
    engine = make_engine(tiny_ir("llama"), {**EXACT, "staging_bytes": 1 << 16}, max_num_batched_tokens=64)
    peaks = {}
    for length in (300, 600, 1200):
        handle = add(engine, 0, prompt(length), small({"name": name}, kept_tokens=64), new_tokens=4)
        peaks[length] = 0
        while engine.has_unfinished():
            engine.step()
            peaks[length] = max(peaks[length], nbytes(engine))
        assert len(tokens(handle)[0]) == 4
    one_tile_more = 1.25 if name == "adakv" else 1.0
    assert max(peaks.values()) <= one_tile_more * peaks[300], peaks
    assert peaks[1200] < engine.cache.store.bytes_for(300) * 0.8  # type: ignore[attr-defined]


def test_limit_of_bytes_holds_where_the_whole_text_would_not_fit(tiny_ir: Callable[[str], Path]) -> None:
    probe: Any = make_engine(tiny_ir("llama")).cache
    limit = probe.store.bytes_for(256)
    cache = {**EXACT, "staging_bytes": 1 << 16, "max_bytes": limit}
    engine = make_engine(tiny_ir("llama"), cache, max_num_batched_tokens=32)
    with pytest.raises(CrushError, match="got 1000 tokens"):
        add(engine, 0, prompt(1000))
    handles = [add(engine, i, prompt(1000, seed=i), small({"name": "kvcrush"}), new_tokens=50) for i in range(3)]
    while engine.has_unfinished():
        engine.step()
        assert nbytes(engine) <= limit
    assert [len(tokens(handle)[0]) for handle in handles] == [50, 50, 50]


def test_protected_tokens_above_the_budget_are_not_chosen_again_at_every_step(engine: Engine) -> None:
    """A system prompt stays though the budget is smaller: then only what comes after it can go."""
    config = ov_genai.GenerationConfig(max_new_tokens=60, ignore_eos=True)
    system = (0, 70)
    handle = engine.add(0, prompt(100), config, CacheParams(policy=small({"name": "kvcrush"}), system=system))
    line = read_prompt(engine, handle)
    assert np.all(counts(held(engine, line)) == 70 + 6)
    num_choices = 0
    while engine.has_unfinished():
        assert counts(held(engine, line)).max() <= 70 + 6 + 8
        assert all(set(head) >= set(range(*system)) for layer in held(engine, line) for head in layer)
        num_choices = state_of(engine, line).num_choices
        engine.step()
    assert num_choices == 1 + 59 // 9


# -- kept prefixes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keeping(tiny_ir: Callable[[str], Path]) -> Engine:
    return make_engine(tiny_ir("llama"), enable_prefix_caching=True)


def reused(engine: Engine, ids: np.ndarray, policy: Policy | None, **options: Any) -> int:
    handle = add(engine, 0, ids, policy, new_tokens=20, **options)
    run(engine)
    return handle.get_stats().num_reused_tokens


def next_turn(engine: Engine, policy: Policy | None, **options: Any) -> np.ndarray:
    """A prompt that goes on from an answer whose KV is kept; nothing else is."""
    engine.clear_prefixes()
    answer = alone(engine, prompt(60), policy, new_tokens=20, **options)[0]
    return np.concatenate([prompt(60), np.array(answer), prompt(10, seed=7)])


def test_crushed_kv_serves_the_same_policy_and_budget_only(keeping: Engine) -> None:
    mine = small({"name": "kvcrush"})
    others = [
        None,
        build("none"),
        small({"name": "kvcrush"}, kept_tokens=25),
        small({"name": "kvcrush"}, share=0.5),
        small({"name": "kvcrush"}, stride=9),
        small({"name": "snapkv"}),
    ]
    ids = next_turn(keeping, mine)
    for policy in others:
        keeping.clear_prefixes()
        ids = next_turn(keeping, mine)
        assert reused(keeping, ids, policy) == 0
    ids = next_turn(keeping, mine)
    assert reused(keeping, ids, small({"name": "kvcrush"})) == 79


def test_crushed_kv_serves_only_from_its_end(keeping: Engine) -> None:
    """A prompt that leaves the known text earlier wants tokens which may have gone, or would have stayed."""
    ids = next_turn(keeping, small({"name": "kvcrush"}))
    ids[70] = (ids[70] + 1) % 256
    assert reused(keeping, ids, small({"name": "kvcrush"})) == 0


def test_whole_kv_serves_a_policy_as_if_it_had_read_the_prompt_itself(keeping: Engine) -> None:
    policy = small({"name": "streaming_llm"})
    ids = next_turn(keeping, None)
    handle = add(keeping, 0, ids, policy, new_tokens=20)
    line = read_prompt(keeping, handle)
    assert handle.get_stats().num_reused_tokens == 79
    expected = [0, 1, *range(len(ids) - 22, len(ids))]
    assert as_lists(held(keeping, line)) == [[expected] * 2] * 2
    run(keeping)
    keeping.clear_prefixes()
    assert tokens(handle) == alone(keeping, ids, policy, new_tokens=20)


@pytest.mark.parametrize("span", [(20, 28), (1, 15)])
def test_crushed_kv_does_not_serve_where_a_protected_span_has_gone(span: tuple[int, int], keeping: Engine) -> None:
    policy = small({"name": "streaming_llm"}, kept_tokens=40, recent_tokens=20)
    ids = next_turn(keeping, policy)
    assert reused(keeping, ids, policy, protect=[span]) == 0
    line = line_of(handle := add(keeping, 0, ids, policy, protect=[span]))
    read_prompt(keeping, handle)
    assert all(set(head) >= set(range(*span)) for layer in held(keeping, line) for head in layer)
    run(keeping)
    ids = next_turn(keeping, policy, protect=[span])
    assert reused(keeping, ids, policy, protect=[span]) == 79


@EVERY_ONE_THAT_READS_ONCE
def test_turns_on_a_crushed_history_keep_to_the_budget(variant: dict[str, Any], keeping: Engine) -> None:
    policy = small(variant)
    ids = next_turn(keeping, policy)
    handle = add(keeping, 0, ids, policy, new_tokens=20)
    line = read_prompt(keeping, handle)
    assert handle.get_stats().num_reused_tokens == 79
    assert counts(held(keeping, line)).mean() == 24
    while keeping.has_unfinished():
        assert counts(held(keeping, line)).mean() <= 24 + 8
        keeping.step()
    keeping.clear_prefixes()
    assert nbytes(keeping) == 0


@EVERY_ONE_THAT_READS_TWICE
def test_turns_that_are_not_read_twice_stay(variant: dict[str, Any], keeping: Engine) -> None:
    policy = small(variant)
    ids = next_turn(keeping, policy)
    handle = add(keeping, 0, ids, policy, new_tokens=20)
    line = read_prompt(keeping, handle)
    assert handle.get_stats().num_reused_tokens == 79
    assert counts(held(keeping, line)).mean() == 24 + len(ids) - 60
    run(keeping)
    keeping.clear_prefixes()


@EVERY_ONE_THAT_READS_TWICE
def test_whole_kv_does_not_keep_a_prompt_from_being_read_twice(variant: dict[str, Any], keeping: Engine) -> None:
    policy, ids = small(variant), next_turn(keeping, None)
    handle = add(keeping, 0, ids, policy, new_tokens=20)
    line = read_prompt(keeping, handle)
    assert counts(held(keeping, line)).mean() == 24
    run(keeping)
    keeping.clear_prefixes()
    assert tokens(handle) == alone(keeping, ids, policy, new_tokens=20)
    keeping.clear_prefixes()


def test_sums_of_h2o_survive_turns(keeping: Engine) -> None:
    policy = small({"name": "h2o", "window": 16})
    ids = next_turn(keeping, policy)
    memory: Any = keeping.cache
    before = memory.prefixes.kept()[0].state
    line = read_prompt(keeping, add(keeping, 0, ids, policy))
    compared = 0
    for layer, head in np.ndindex(2, 2):
        old = dict(zip(before.positions[layer][head].tolist(), before.policy_state[layer][head], strict=True))
        new = dict(
            zip(
                state_of(keeping, line).positions[layer][head].tolist(),
                state_of(keeping, line).policy_state[layer][head],
                strict=True,
            )
        )
        assert all(new[place] >= old[place] for place in old.keys() & new.keys())
        compared += len(old.keys() & new.keys())
    assert compared > 40
    assert state_of(keeping, line).num_choices == before.num_choices + 1
    run(keeping)


@EVERY_POLICY
def test_request_asked_again_gives_the_same_answer_with_prefix_caching(
    variant: dict[str, Any], keeping: Engine
) -> None:
    policy = small(variant)
    answers = [alone(keeping, prompt(60), policy, new_tokens=40) for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
