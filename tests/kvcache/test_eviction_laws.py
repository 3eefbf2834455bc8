"""A policy in the engine: the store holds what it chose, costs what that costs, and attends to nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eviction_runs import (
    EXACT,
    READ_ONCE,
    SMALL,
    TOLERANCE,
    VARIANTS,
    Eager,
    Tracer,
    add,
    as_lists,
    assert_logits_equal,
    counts,
    eager_model,
    held,
    kv_of,
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
from tiny_models import HEAD_SIZE
from watch import AttentionScores, Watch

from ov_kvcrush import native
from ov_kvcrush.core.request import Request
from ov_kvcrush.engine.engine import Engine
from ov_kvcrush.engine.handle import GenerationHandle
from ov_kvcrush.policies.base import CacheState, HeadState, Inputs
from ov_kvcrush.policies.registry import build
from reference.codec import must_list

EVERY_POLICY = pytest.mark.parametrize("variant", VARIANTS, ids=json.dumps)
EVERY_ONE_THAT_READS_ONCE = pytest.mark.parametrize("variant", READ_ONCE, ids=json.dumps)


@pytest.fixture(scope="module")
def engine_of(tiny_ir: Callable[[str], Path]) -> Callable[[str], Engine]:
    return cache(lambda kind: make_engine(tiny_ir(kind)))


@pytest.fixture(scope="module")
def eager_of(tiny_hf: Callable[[str], Path]) -> Callable[[str], Eager]:
    return cache(lambda kind: eager_model(tiny_hf(kind)))


@pytest.fixture(scope="module")
def quantised(tiny_ir: Callable[[str], Path]) -> Engine:
    return make_engine(tiny_ir("llama"), {"key_precision": "u8", "value_precision": "u4", "recent_tokens": 16})


def assert_attends_to_what_is_kept(tracer: Tracer, handle: GenerationHandle, eager: Eager) -> None:
    """The logits are those of eager attention without what was evicted, and not those of all tokens."""
    assert_logits_equal(tracer.of(handle), eager)
    for trace in tracer.of(handle):
        whole = eager(trace.line.ids[: trace.end], None)[trace.rows]
        assert np.abs(whole - np.stack(trace.logits)).max() > 100 * TOLERANCE, "nothing was evicted that matters"


# -- attention ---------------------------------------------------------------------------------------------------------


@EVERY_POLICY
def test_logits_equal_eager_attention_without_what_was_evicted(
    variant: dict[str, Any], engine_of: Callable[[str], Engine], eager_of: Callable[[str], Eager]
) -> None:
    engine = engine_of("llama")
    handle = add(engine, 0, prompt(70), small(variant), new_tokens=30)
    tracer = Tracer(engine, 100)
    tracer.run()
    assert line_of(handle).num_cached == 99
    assert_attends_to_what_is_kept(tracer, handle, eager_of("llama"))


@pytest.mark.parametrize("name", ["kvcrush", "streaming_llm", "adakv"])
def test_logits_where_tiles_change_places(
    name: str, engine_of: Callable[[str], Engine], eager_of: Callable[[str], Eager]
) -> None:
    """A tile of which all stays is moved, not written again: the store's order is no longer that of the text."""
    engine = engine_of("llama")
    store, orders = engine.cache.store, []  # type: ignore[attr-defined]
    handle = add(engine, 0, prompt(160), small({"name": name}, kept_tokens=130), new_tokens=60)
    tracer = Tracer(engine, 220)
    with tracer.noting():
        line = read_prompt(engine, handle)
        while engine.has_unfinished():
            orders += [
                store.positions(kv_of(engine, line).store_id, layer, head) for layer in range(2) for head in range(2)
            ]
            engine.step()
    assert any(np.any(np.diff(order) < 0) for order in orders)
    assert_attends_to_what_is_kept(tracer, handle, eager_of("llama"))


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "gpt_neox"])
def test_logits_of_other_architectures(
    kind: str, engine_of: Callable[[str], Engine], eager_of: Callable[[str], Eager]
) -> None:
    """Norms before RoPE; sliding windows, besides which the mask of what is kept holds; a KV head per query head."""
    engine = engine_of(kind)
    handle = add(engine, 0, prompt(70), small({"name": "kvcrush", "split": "ada"}), new_tokens=30)
    tracer = Tracer(engine, 100)
    tracer.run()
    assert_attends_to_what_is_kept(tracer, handle, eager_of(kind))


@pytest.mark.parametrize("name", ["kvcrush", "h2o", "streaming_llm"])
def test_logits_of_a_prompt_that_is_read_chunk_by_chunk(
    name: str, tiny_ir: Callable[[str], Path], eager_of: Callable[[str], Eager]
) -> None:
    """Every chunk sees what earlier choices left; what it brings is in the next choice; the last one is at the end."""
    engine = make_engine(tiny_ir("llama"), {**EXACT, "staging_bytes": 1 << 16}, max_num_batched_tokens=24)
    handle = add(engine, 0, prompt(150), small({"name": name}), new_tokens=20)
    tracer = Tracer(engine, 170)
    tracer.run()
    sizes = dict(tracer.sizes)
    assert max(size.mean() for size in sizes.values()) <= 24 + 8
    assert sizes[150].mean() == 24, "the prompt leaves its budget, as one that is staged does"
    assert_attends_to_what_is_kept(tracer, handle, eager_of("llama"))


@pytest.mark.parametrize("name", ["kvcrush", "rkv"])
def test_logits_of_a_later_turn_on_a_crushed_history(
    name: str, tiny_ir: Callable[[str], Path], eager_of: Callable[[str], Eager]
) -> None:
    engine = make_engine(tiny_ir("llama"), enable_prefix_caching=True)
    tracer = Tracer(engine, 200)
    handle, history = None, prompt(60)
    for turn in range(3):
        handle = add(engine, turn, history, small({"name": name}), new_tokens=20)
        tracer.run()
        reused = handle.get_stats().num_reused_tokens
        assert reused == (0 if turn == 0 else len(history) - 25 - 1)
        assert_attends_to_what_is_kept(tracer, handle, eager_of("llama"))
        history = np.concatenate([history, np.array(tokens(handle)[0]), prompt(25, seed=turn + 1)])


# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "none"},
        {"name": "kvcrush", "kept": 1.0},
        {"name": "kvcrush", "kept_tokens": 120},
        {"name": "h2o", "kept": 0.1, "min_tokens": 120},
        {"name": "streaming_llm", "kept_tokens": 99, "min_tokens": 120},
    ],
    ids=json.dumps,
)
def test_policy_with_room_for_all_changes_nothing(settings: dict[str, Any], engine_of: Callable[[str], Engine]) -> None:
    engine = engine_of("llama")
    plain = add(engine, 0, prompt(90), new_tokens=30)
    run(engine)
    handle = add(engine, 0, prompt(90), build(**settings), new_tokens=30)
    line = read_prompt(engine, handle)
    while engine.has_unfinished():
        assert np.all(counts(held(engine, line)) == line.num_cached)
        engine.step()
    assert tokens(handle) == tokens(plain)


@EVERY_POLICY
def test_budget_is_met_and_every_byte_is_told(variant: dict[str, Any], quantised: Engine) -> None:
    span = (41, 46)
    handle = add(quantised, 0, prompt(130), small(variant, kept_tokens=60), protect=[span])
    line = read_prompt(quantised, handle)
    positions = held(quantised, line)
    heads = [head for layer in positions for head in layer]
    assert counts(positions).sum() == 60 * len(heads)
    for head in heads:
        assert len(set(head)) == len(head)
        assert set(head) >= {0, 1, *range(*span), *range(124, 130)}
        assert head.max() == 129
    assert quantised.metrics().staging_size_in_bytes == 0
    assert nbytes(quantised) == sum(bytes_of(head) for head in heads) + captured_bytes(quantised, line)
    run(quantised)
    assert nbytes(quantised) == quantised.metrics().staging_size_in_bytes == 0
    assert quantised.cache.store.num_sequences == 0  # type: ignore[attr-defined]


def captured_bytes(engine: Engine, line: Any) -> int:
    """Of the last query rows of its prompt of 130 tokens."""
    store: native.Store = engine.cache.store  # type: ignore[attr-defined]
    return store.capture_bytes(min(line.request.captured_rows, 130))


def bytes_of(positions: np.ndarray, recent_tokens: int = 16, group_size: int = 32) -> int:
    """Of a head of the engine `quantised`: tiles of 32 tokens, in bf16 from the recent window on."""
    num_target = max(0, len(positions) - recent_tokens) // 32
    total = 0
    for tile in range(-(-len(positions) // 32)):
        places = positions[32 * tile : 32 * tile + 32]
        precisions = ("u8", "u4") if tile < num_target else ("bf16", "bf16")
        total += native.tile_bytes(*precisions, HEAD_SIZE, group_size, must_list(places))
    return total


@pytest.mark.parametrize(("kept", "expected"), [(0.3, 31), (0.01, 16), (0.999, 101)])
def test_fraction_is_of_the_prompt_and_has_a_floor(
    kept: float, expected: int, engine_of: Callable[[str], Engine]
) -> None:
    engine = engine_of("llama")
    line = read_prompt(engine, add(engine, 0, prompt(101), build("snapkv", kept=kept, **SMALL)))
    assert np.all(counts(held(engine, line)) == expected)
    run(engine)


@pytest.mark.parametrize("split", ["ada", "global", "kv_compress", "pyramid"])
def test_uneven_splits_hold_and_cost_what_each_head_has(split: str, quantised: Engine) -> None:
    policy = small({"name": "snapkv", "split": split}, kept_tokens=60)
    line = read_prompt(quantised, add(quantised, 0, prompt(130), policy))
    positions = held(quantised, line)
    sizes = counts(positions)
    assert sizes.sum() == 60 * sizes.size
    assert len(np.unique(sizes)) > 1
    if split == "pyramid":
        assert sizes[0].min() > sizes[-1].max()
    else:
        assert np.any(sizes[:, 0] != sizes[:, 1]), "heads of one layer differ"
    if split == "ada":
        assert np.all(sizes.sum(axis=1) == 120), "layers do not"
    tiles = sum(bytes_of(head) for layer in positions for head in layer)
    assert nbytes(quantised) == tiles + captured_bytes(quantised, line)
    run(quantised)


def test_streaming_llm_holds_sinks_and_the_newest(engine_of: Callable[[str], Engine]) -> None:
    """At the end of the prompt, and after every choice of the answer."""
    engine = engine_of("llama")
    line = read_prompt(engine, add(engine, 0, prompt(90), small({"name": "streaming_llm"}), new_tokens=60))
    num_choices = 0
    while engine.has_unfinished():
        if state_of(engine, line).num_choices > num_choices:
            num_choices = state_of(engine, line).num_choices
            expected = [0, 1, *range(line.num_cached - 22, line.num_cached)]
            assert as_lists(held(engine, line)) == [[expected] * 2] * 2
        engine.step()
    assert num_choices == 1 + 59 // 9


def scores_of(engine: Engine, ids: np.ndarray, watch: Watch) -> AttentionScores:
    """The attention of the last rows of a prompt, as a policy is shown it."""
    add(engine, 99, ids, watch, new_tokens=1)
    run(engine)
    return watch.scores


def snapkv_scores(attention: np.ndarray) -> np.ndarray:
    """float (S,) of (G, S): mean over the query heads, then over 5 neighbours, with zeros outside."""
    mean = np.pad(attention.mean(axis=0), 2)
    return np.array([mean[i : i + 5].sum() / 5 for i in range(attention.shape[1])])


def test_snapkv_holds_what_the_exported_attention_says(engine_of: Callable[[str], Engine]) -> None:
    engine = engine_of("llama")
    handle = add(engine, 0, prompt(100), small({"name": "snapkv", "window": 12, "kernel": 5}))
    positions = held(engine, read_prompt(engine, handle))
    run(engine)
    shown = scores_of(engine, prompt(100), Watch(window=12))
    free = range(2, 94)
    for heads, scores in zip(positions, shown, strict=True):
        for head, attention in zip(heads, scores, strict=True):
            values = snapkv_scores(attention)
            best = sorted(free, key=lambda p, values=values: -values[p])[: 24 - 8]
            assert head.tolist() == sorted([0, 1, *range(94, 100), *best])


@pytest.mark.parametrize("name", ["snapkv", "keydiff"])
def test_choices_of_an_answer_are_made_of_what_is_cached_then(
    name: str, engine_of: Callable[[str], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the store's order is not that of the text, and more queries are captured than the policy wants."""
    engine = engine_of("llama")
    memory: Any = engine.cache
    store, expected, disordered = memory.store, [], []

    def numpy_choice(line: int, layer: int, head: int) -> list[int]:
        keys, positions = store.read(line, layer, head)[0], store.positions(line, layer, head)
        order = np.argsort(positions)
        disordered.append(np.any(np.diff(order) < 0))
        keys, positions = keys[order], positions[order]
        queries, rows = store.captured(line, layer)
        logits = np.einsum("wgd,sd->gws", queries.reshape(len(rows), 2, -1, HEAD_SIZE)[-12:, head], keys)
        logits[:, positions > rows[-12:, None]] = -np.inf
        weights = np.exp(logits / np.sqrt(HEAD_SIZE))
        attention = (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=1)
        unit = keys / np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), 1e-12)
        scores = snapkv_scores(attention) if name == "snapkv" else -unit @ unit.mean(axis=0)
        best = [i for i in np.argsort(-scores) if 2 <= positions[i] <= rows[-1] - 6][: 130 - 8]
        return sorted([0, 1, *positions[best], *range(rows[-1] - 5, rows[-1] + 1)])

    def choose(*args: Any, then: Any = memory._view.choose) -> Any:
        if args[4] is None:  # not a staged prompt
            expected.append([[numpy_choice(args[1], layer, head) for head in range(2)] for layer in range(2)])
        return then(*args)

    monkeypatch.setattr(memory._view, "choose", choose)
    monkeypatch.setattr(Request, "captured_rows", property(lambda self: 40))
    policy = build(name, **SMALL, kept_tokens=130, **({"window": 12, "kernel": 5} if name == "snapkv" else {}))
    handle = add(engine, 0, prompt(160), policy, new_tokens=60)
    line = read_prompt(engine, handle)
    num_choices = 1
    while engine.has_unfinished():
        if state_of(engine, line).num_choices > num_choices:
            num_choices = state_of(engine, line).num_choices
            assert as_lists(state_of(engine, line).positions) == as_lists(held(engine, line)) == expected[-1]
        engine.step()
    assert len(expected) == num_choices - 1 == 59 // 9
    assert any(disordered)


def test_global_split_has_one_threshold(engine_of: Callable[[str], Engine]) -> None:
    engine = engine_of("llama")
    policy = small({"name": "snapkv", "window": 12, "kernel": 5, "split": "global"})
    handle = add(engine, 0, prompt(100), policy)
    positions = held(engine, read_prompt(engine, handle))
    run(engine)
    shown = scores_of(engine, prompt(100), Watch(window=12))
    rivals = [
        (-snapkv_scores(attention)[place], layer, head, place)
        for layer, heads in enumerate(shown)
        for head, attention in enumerate(heads)
        for place in range(2, 94)
    ]
    best = sorted(rivals)[: 4 * (24 - 8)]
    for layer, heads in enumerate(positions):
        for head, places in enumerate(heads):
            mine = [place for _, of_layer, of_head, place in best if (of_layer, of_head) == (layer, head)]
            assert places.tolist() == sorted([0, 1, *range(94, 100), *mine])


@EVERY_ONE_THAT_READS_ONCE
def test_policy_sees_what_is_cached(variant: dict[str, Any], engine_of: Callable[[str], Engine]) -> None:
    """Asked about what another request without a policy has cached and exported, it makes the same choice."""
    engine, policy = engine_of("llama"), small(variant)
    choice = add(engine, 0, prompt(100), policy)
    chosen = held(engine, read_prompt(engine, choice))
    vectors = vectors_of(engine, choice)
    run(engine)
    watch = Watch(window=policy.inputs.window or 1, reduce=policy.inputs.reduce)
    whole = add(engine, 0, prompt(100), watch)
    read_prompt(engine, whole)
    state = shown_to(engine, whole, watch.scores, policy.inputs, policy.protected(100))
    selection = policy.select(state, 24)
    assert as_lists(chosen) == as_lists(selection.kept)
    for kept_heads, mine, all_of_it in zip(selection.kept, vectors, vectors_of(engine, whole), strict=True):
        for kept, (keys, values), (all_keys, all_values) in zip(kept_heads, mine, all_of_it, strict=True):
            np.testing.assert_array_equal(keys, all_keys[kept])
            np.testing.assert_array_equal(values, all_values[kept])
    run(engine)


def vectors_of(engine: Engine, handle: GenerationHandle) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """[layer][KV head] keys and values (S, D)"""
    store, line = engine.cache.store, line_of(handle)  # type: ignore[attr-defined]
    return [[store.read(kv_of(engine, line).store_id, layer, head) for head in range(2)] for layer in range(2)]


def shown_to(
    engine: Engine, handle: GenerationHandle, scores: AttentionScores, inputs: Inputs, protected: np.ndarray
) -> CacheState:
    store, line = engine.cache.store, line_of(handle)  # type: ignore[attr-defined]
    layers = []
    for layer, (heads, vectors) in enumerate(zip(scores, vectors_of(engine, handle), strict=True)):
        rows, _ = store.captured(kv_of(engine, line).store_id, layer)
        queries = rows.reshape(len(rows), 2, -1, HEAD_SIZE)
        layers.append(
            tuple(
                HeadState(
                    positions=np.arange(len(protected), dtype=np.int32),
                    attention=attention if inputs.window else None,
                    keys=keys if inputs.keys else None,
                    values=values if inputs.values else None,
                    queries=queries[:, head] if inputs.queries else None,
                )
                for head, (attention, (keys, values)) in enumerate(zip(heads, vectors, strict=True))
            )
        )
    return CacheState(tuple(layers), len(protected), protected)
