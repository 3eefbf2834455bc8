"""The operation alone, in a model of nothing else: what it computes, and that it believes no plan, shape or handle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset15 as ops
import pytest
from openvino.utils.node_factory import NodeFactory

from ov_kvcrush import native
from ov_kvcrush.kvcache.attention_plan import STORED, PlanEntry, write_plan
from ov_kvcrush.model.plugin import open_core
from ov_kvcrush.native import Store

pytestmark = pytest.mark.numerics

MEAN_OF_ROWS = 1  # a reduction, native/src/kernels/kernels.hpp
HEADS, KV_HEADS, SIZE = 4, 2, 32
SHAPE = (HEADS, KV_HEADS, SIZE, 0, SIZE**-0.5)
Run = Callable[..., tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def run() -> Run:
    return runner_of({"layer": 0})


@pytest.fixture(scope="module")
def run_reader() -> Run:
    """A layer that reads what another has appended."""
    return runner_of({"layer": 0, "appends": False})


def runner_of(attributes: dict[str, Any]) -> Run:
    core = open_core()
    core.add_extension(native.info()["path"])
    factory = NodeFactory("opset1")
    factory.add_extension(native.info()["path"])
    floats = [ops.parameter(ov.PartialShape([-1, -1]), ov.Type.f32) for _ in range(4)]
    integers = [ops.parameter(ov.PartialShape([-1]), ov.Type.i32) for _ in range(2)]
    inputs = [*floats, *integers]
    crush = factory.create("CrushAttention", [p.output(0) for p in inputs], attributes)
    scores = factory.create("CrushScores", [crush.output(0), *(p.output(0) for p in integers)], {"layers": 1})
    model = ov.Model([crush.output(0), scores.output(0)], inputs, "one layer")
    request = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()

    def infer(store_id: int, plan: Any, q: Any, k: Any, v: Any, paged: Any = None) -> tuple[Any, Any]:
        paged = np.zeros_like(q) if paged is None else paged
        values = [q, k, v, paged, np.array([store_id], np.int32), np.asarray(plan, np.int32)]
        for index, value in enumerate(values):
            request.set_input_tensor(index, ov.Tensor(value))
        request.infer()
        return request.get_output_tensor(0).data.copy(), request.get_output_tensor(1).data.copy()

    return infer


@pytest.fixture
def store() -> Store:
    return Store(layers=[SHAPE], key="f32", value="f32", recent="f32", recent_tokens=32, group_size=32)


def rows(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((n, heads * SIZE), np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return q, k, v


def causal_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Of rows that see themselves and those before."""
    n = len(q)
    out = np.empty((n, HEADS, SIZE))
    for h in range(HEADS):
        kv = h // (HEADS // KV_HEADS)
        scores = q.reshape(n, HEADS, SIZE)[:, h] @ k.reshape(n, KV_HEADS, SIZE)[:, kv].T * SIZE**-0.5
        scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, h] = weights / weights.sum(axis=1, keepdims=True) @ v.reshape(n, KV_HEADS, SIZE)[:, kv]
    return out.reshape(n, -1)


def new_sequence(store: Store, room: int, capture: int = 0) -> int:
    sequence = store.create(capture)
    assert store.reserve(sequence, room)
    return sequence


def test_rows_in_several_steps_are_those_of_one(run: Run, store: Store) -> None:
    q, k, v = rows(70)
    expected = causal_attention(q, k, v)
    sequence, begin = new_sequence(store, 70), 0
    for count in (1, 40, 28, 1):
        part = slice(begin, begin + count)
        plan = write_plan(count, 0, [PlanEntry(sequence, 0, count, begin)])
        out, scores = run(store.id, plan, q[part], k[part], v[part])
        np.testing.assert_allclose(out, expected[part], atol=1e-5)
        assert scores.shape == (0,)
        begin += count


def test_a_layer_that_appends_nothing_attends_to_what_is_there(run: Run, run_reader: Run, store: Store) -> None:
    """Its own keys and values are not read, and neither tokens nor queries of it stay."""
    q, k, v = rows(70)
    other_q, other_k, other_v = rows(70, seed=1)
    expected = causal_attention(other_q, k, v)
    sequence, begin = new_sequence(store, 70, capture=4), 0
    for count in (1, 40, 28, 1):
        part = slice(begin, begin + count)
        plan = write_plan(count, 0, [PlanEntry(sequence, 0, count, begin)])
        run(store.id, plan, q[part], k[part], v[part])
        out, _ = run_reader(store.id, plan, other_q[part], other_k[part], other_v[part])
        np.testing.assert_allclose(out, expected[part], atol=1e-5)
        begin += count
        np.testing.assert_array_equal(store.positions(sequence, 0, 0), np.arange(begin))
    captured, places = store.captured(sequence, 0)
    np.testing.assert_array_equal(captured, q[-4:])
    np.testing.assert_array_equal(places, np.arange(66, 70))


def test_captured_queries_of_rows_that_are_taken_back_do_not_count(run: Run, store: Store) -> None:
    """Of a window of 4 and 3 rows that may be wrong in a step, the last 4 right ones are always there."""
    q, k, v = rows(90)
    wrong_q, wrong_k, wrong_v = rows(90, seed=1)
    sequence, begin = new_sequence(store, 0, capture=4 + 3), 0
    for count, num_wrong in ((1, 0), (5, 3), (1, 3), (1, 3), (1, 3), (30, 0), (1, 2), (2, 1), (3, 0), (1, 3)):
        part = slice(begin, begin + count)
        mixed = [
            np.concatenate([right[part], wrong[:num_wrong]])
            for right, wrong in ((q, wrong_q), (k, wrong_k), (v, wrong_v))
        ]
        assert store.reserve(sequence, count + num_wrong)
        plan = write_plan(count + num_wrong, 0, [PlanEntry(sequence, 0, count + num_wrong, begin)])
        out, _ = run(store.id, plan, *mixed)
        begin += count
        np.testing.assert_allclose(out[:count], causal_attention(q[:begin], k[:begin], v[:begin])[-count:], atol=1e-5)
        store.crop(sequence, begin)
        captured, places = store.captured(sequence, 0)
        num_there = min(begin, 4)
        assert len(places) >= num_there
        np.testing.assert_array_equal(places[-num_there:], np.arange(begin - num_there, begin))
        np.testing.assert_array_equal(captured[-num_there:], q[begin - num_there : begin])


def test_prompt_rows_pass_through_and_the_others_follow(run: Run, store: Store) -> None:
    q, k, v = rows(9)
    paged = np.random.default_rng(1).standard_normal((9, HEADS * SIZE), np.float32)
    a, b = new_sequence(store, 3), new_sequence(store, 2)
    plan = write_plan(9, 4, [PlanEntry(a, 4, 3, 0), PlanEntry(b, 7, 2, 0)])
    out, _ = run(store.id, plan, q, k, v, paged)
    np.testing.assert_array_equal(out[:4], paged[:4])
    np.testing.assert_allclose(out[4:7], causal_attention(q[4:7], k[4:7], v[4:7]), atol=1e-5)
    np.testing.assert_allclose(out[7:], causal_attention(q[7:], k[7:], v[7:]), atol=1e-5)


def test_scores_come_only_where_asked(run: Run, store: Store) -> None:
    q, k, v = rows(6)
    asking, other = new_sequence(store, 3, capture=2), new_sequence(store, 3, capture=2)
    plan = write_plan(6, 0, [PlanEntry(asking, 0, 3, 0, STORED, MEAN_OF_ROWS), PlanEntry(other, 3, 3, 0)])
    _, scores = run(store.id, plan, q, k, v)
    assert scores.shape == (HEADS * 3,)
    np.testing.assert_allclose(scores.reshape(HEADS, 3).sum(axis=1), 1, atol=1e-5)


BAD_PLANS: dict[str, tuple[list[int], str]] = {
    "empty": ([], "at least 4 numbers"),
    "version": ([2, 3, 0, 1, 0, 0, 3, 0, 0, 0], "version 1"),
    "rows": ([1, 4, 0, 1, 0, 0, 4, 0, 0, 0], "as many rows as the step has, got 4"),
    "prompt rows": ([1, 3, 5, 0], "prompt rows within its rows, got 5"),
    "negative prompt rows": ([1, 3, -1, 0], "prompt rows within its rows, got -1"),
    "cut": ([1, 3, 0, 1, 0, 0, 3], "6 numbers per entry"),
    "entries": ([1, 3, 0, 1000000000, 0, 0, 3, 0, 0, 0], "6 numbers per entry"),
    "negative entries": ([1, 3, 0, -1], "6 numbers per entry"),
    "kind": ([1, 3, 0, 1, 0, 0, 3, 0, 7, 0], "kind 0..2, got 7"),
    "no rows": ([1, 3, 0, 1, 0, 0, 0, 0, 0, 0], "at least one row per entry, got 0"),
    "position": ([1, 3, 0, 1, 0, 0, 3, -5, 0, 0], "positions of at least 0, got -5"),
    "position too large": ([1, 3, 0, 1, 0, 0, 3, 2**31 - 2, 0, 0], "positions of at least 0"),
    "reduction": ([1, 3, 0, 1, 0, 0, 3, 0, 0, 9], r"reductions 0\.\.3, got 9"),
    "gap": ([1, 3, 0, 1, 0, 1, 2, 0, 0, 0], "rows in order, got 1"),
    "too many rows": ([1, 3, 0, 1, 0, 0, 30, 0, 0, 0], "rows within the step, got 30"),
    "rows of nobody": ([1, 3, 0, 1, 0, 0, 2, 0, 0, 0], "an entry for every row behind the prompt rows"),
    "unknown sequence": ([1, 3, 0, 1, 99, 0, 3, 0, 0, 0], "sequence must be .*, got 99"),
    "scores without a window": ([1, 3, 0, 1, 0, 0, 3, 0, 0, 1], "must capture queries"),
}


@pytest.mark.parametrize("name", list(BAD_PLANS))
def test_bad_plan_is_an_error_and_the_next_step_works(name: str, run: Run, store: Store) -> None:
    plan, message = BAD_PLANS[name]
    sequence = new_sequence(store, 64)
    plan = [sequence if i == 4 and value == 0 else value for i, value in enumerate(plan)]
    q, k, v = rows(3)
    with pytest.raises(RuntimeError, match=message):
        run(store.id, plan, q, k, v)
    fresh = new_sequence(store, 3)
    out, _ = run(store.id, write_plan(3, 0, [PlanEntry(fresh, 0, 3, 0)]), q, k, v)
    np.testing.assert_allclose(out, causal_attention(q, k, v), atol=1e-5)


def test_released_handles_are_errors(run: Run, store: Store) -> None:
    q, k, v = rows(2)
    sequence = new_sequence(store, 2)
    store.release(sequence)
    with pytest.raises(RuntimeError, match=f"sequence must be .*, got {sequence}"):
        run(store.id, write_plan(2, 0, [PlanEntry(sequence, 0, 2, 0)]), q, k, v)
    gone = Store(layers=[SHAPE], key="u8", value="u8", recent="f32", recent_tokens=32, group_size=32)
    number = gone.id
    gone.close()
    with pytest.raises(RuntimeError, match=f"crush_store must be .*, got {number}"):
        run(number, write_plan(2, 0, [PlanEntry(0, 0, 2, 0)]), q, k, v)


def test_wrong_shapes_are_errors(run: Run, store: Store) -> None:
    q, k, v = rows(2)
    sequence = new_sequence(store, 8)
    plan = write_plan(2, 0, [PlanEntry(sequence, 0, 2, 0)])
    cases: list[tuple[list[np.ndarray], str]] = [
        ([q[:, :-1], k, v], "q must have 128 columns, got 127"),
        ([q, k[:, :32], v], "keys and values must have 64 columns, got 32"),
        ([q, k, v[:1]], "as many rows as q, got 1"),
    ]
    for tensors, message in cases:
        with pytest.raises(RuntimeError, match=message):
            run(store.id, plan, *(np.ascontiguousarray(t) for t in tensors))
    with pytest.raises(RuntimeError, match="PagedAttention must give a row for each of 2 prompt rows, got 1"):
        run(store.id, write_plan(2, 2, []), q, k, v, q[:1].copy())


def test_rows_without_a_place_are_an_error(run: Run, store: Store) -> None:
    """The engine reserves before each step; the operation never allocates."""
    sequence = store.create()
    q, k, v = rows(2)
    with pytest.raises(RuntimeError, match="reserve"):
        run(store.id, write_plan(2, 0, [PlanEntry(sequence, 0, 2, 0)]), q, k, v)
