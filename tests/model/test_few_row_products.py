"""MLPs and LM head by products of our own in steps of few rows: found in graphs, and what models compute with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import openvino.opset15 as ops
import pytest
from chunked_logits import CHUNKS, F32, logits_at_chunk_ends
from compressed_weights import half_bits, in_graph, packed, random_weights
from native_stores import gaussian, require_native

from ov_kvcrush import native
from ov_kvcrush.config import CacheConfig
from ov_kvcrush.errors import CrushError
from ov_kvcrush.model.graph import products as products_of_graphs
from ov_kvcrush.model.graph.attention import attention_ops
from ov_kvcrush.model.graph.compressed import read_linear
from ov_kvcrush.model.graph.products import FEW_ROWS, use_few_row_products
from ov_kvcrush.model.graph.rewrite import SAMPLED_ROWS, gather_sampled_rows, use_paged_attention
from ov_kvcrush.model.load import load_model
from ov_kvcrush.model.plugin import open_core
from reference import product as reference
from reference.product import Weights

HIDDEN, WIDTH, VOCABULARY = 96, 192, 64
ALL = 1 << 40  # bytes
Rows = np.ndarray


def weights_of_a_model(seed: int = 0) -> list[Weights]:
    """Gate, up, down and head, of several kinds."""
    rng = np.random.default_rng(seed)
    return [
        random_weights(rng, 4, WIDTH, HIDDEN, 32), random_weights(rng, 4, WIDTH, HIDDEN, 96),
        random_weights(rng, 8, HIDDEN, WIDTH, 16), random_weights(rng, 8, VOCABULARY, HIDDEN, HIDDEN),
    ]  # fmt: skip


def product(x: ov.Node, weights: ov.Node) -> ov.Node:
    return ops.matmul(x, weights, False, True)


def small_model(weights: list[Weights], mlp: Callable[[ov.Node, list[ov.Node]], ov.Node] | None = None) -> ov.Model:
    """Hidden states x + mlp(x), of which sampled rows go to the head. Inputs as those of a model that is loaded."""
    ids = named(ops.parameter(ov.PartialShape([-1]), ov.Type.i64), "input_ids")
    x = named(ops.parameter(ov.PartialShape([-1, 1, HIDDEN]), ov.Type.f32), "x")
    sampled = named(ops.parameter(ov.PartialShape([-1]), ov.Type.i64), "sampled_rows")
    nodes = [in_graph(w) for w in weights]
    hidden = ops.add(x, (mlp or gated)(x, nodes))
    logits = named(product(ops.gather(hidden, sampled, ops.constant(np.int64(0))), nodes[3]), "logits")
    # The ids are of use for their number only.
    counted = ops.multiply(ops.convert(ops.reduce_sum(ids, ops.constant(np.int64(0)), False), "f32"), np.float32(0))
    return ov.Model([logits, hidden, counted], [ids, x, sampled])


def named(node: ov.Node, name: str) -> ov.Node:
    node.set_friendly_name(name)
    node.output(0).get_tensor().set_names({name})
    return node


def gated(x: ov.Node, weights: list[ov.Node]) -> ov.Node:
    gate, up, down = weights[:3]
    return product(ops.multiply(ops.swish(product(x, gate)), product(x, up)), down)


def infer(model: ov.Model) -> Callable[[Rows, list[int]], tuple[Rows, Rows]]:
    """A function to logits and hidden states."""
    core = open_core()
    core.add_extension(native.info()["path"])
    request = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()

    def run(x: Rows, sampled: list[int]) -> tuple[Rows, Rows]:
        ids = np.zeros(len(x), np.int64)
        request.infer({"input_ids": ids, "x": x[:, None], "sampled_rows": np.array(sampled, np.int64)})
        logits, hidden = (request.get_output_tensor(i).data[:, 0].copy() for i in (0, 1))
        return logits, hidden

    return run


def rewritten(model: ov.Model, max_bytes: int = ALL) -> tuple[native.Product, ...]:
    require_native()
    return use_few_row_products(model, native.info()["path"], max_bytes)


def test_steps_of_few_rows_are_ours_and_others_the_plugins() -> None:
    """In any order, with as many rows that sample as there are; those of the last part count for themselves."""
    weights, rng = weights_of_a_model(), np.random.default_rng(1)
    model = small_model(weights)
    plugins = infer(small_model(weights))
    products = rewritten(model)
    assert [p.num_outputs for p in products] == [HIDDEN, VOCABULARY]
    run = infer(model)
    for rows in (1, FEW_ROWS, FEW_ROWS + 1, 3, 40, 1, FEW_ROWS + 1):
        x = gaussian(rng, rows, HIDDEN)
        for sampled in ([rows - 1], [], list(range(rows))):
            logits, hidden = run(x, sampled)
            plugins_logits, plugins_hidden = plugins(x, sampled)
            expected = plugins_hidden if rows > FEW_ROWS else x + products[0].run(x)
            assert np.array_equal(hidden, expected)
            few = len(sampled) <= FEW_ROWS
            assert np.array_equal(logits, products[1].run(hidden[sampled]) if few else plugins_logits)


def test_other_products_of_4_bits_are_ours_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the same rows, which share the sums that their zero points need; one of 8 bits is left as it is."""
    monkeypatch.setattr(products_of_graphs, "_LEAST_BYTES", 0)
    rng = np.random.default_rng(5)
    rests = [rng.uniform(-0.01, 0.01, (WIDTH, HIDDEN // 32)).astype(np.float32) for _ in range(2)]
    weights = [random_weights(rng, 4, WIDTH, HIDDEN, 32) for _ in range(2)] + weights_of_a_model()[2:]

    def of_shared_sums(x: ov.Node, nodes: list[ov.Node]) -> ov.Node:
        grouped = ops.reshape(x, ops.constant(np.array([0, 0, HIDDEN // 32, 32], np.int64)), True)
        sums = ops.reduce_sum(grouped, ops.constant(np.array([3], np.int64)), False)
        query, key = (
            ops.add(product(x, node), product(sums, ops.constant(rest)))
            for node, rest in zip(nodes[:2], rests, strict=True)
        )
        return product(ops.multiply(query, key), nodes[2])

    model = small_model(weights, of_shared_sums)
    plugins = infer(small_model(weights, of_shared_sums))
    products = rewritten(model)
    assert [p.num_outputs for p in products] == [VOCABULARY, WIDTH, WIDTH]
    run = infer(model)
    for rows in (1, FEW_ROWS, FEW_ROWS + 1, 2):
        x = gaussian(rng, rows, HIDDEN)
        hidden, expected = run(x, [0])[1], plugins(x, [0])[1]
        if rows > FEW_ROWS:
            assert np.array_equal(hidden, expected)
        else:  # inputs of both are rounded to 8 bits, but not alike
            assert not np.array_equal(hidden, expected)
            assert np.abs(hidden - expected).max() < 0.05 * np.abs(expected - x).max()


def test_what_reads_something_of_an_mlp_leaves_it_as_it_is() -> None:
    def spied(x: ov.Node, weights: list[ov.Node]) -> ov.Node:
        gate = product(x, weights[0])
        hidden = ops.multiply(ops.swish(gate), product(x, weights[1]))
        seen = ops.reduce_sum(gate, ops.constant(np.int64(2)), True)
        return ops.add(product(hidden, weights[2]), seen)

    def biased(x: ov.Node, weights: list[ov.Node]) -> ov.Node:
        gate = ops.add(product(x, weights[0]), np.ones((1, 1, WIDTH), np.float32))
        return product(ops.multiply(ops.swish(gate), product(x, weights[1])), weights[2])

    def of_two(x: ov.Node, weights: list[ov.Node]) -> ov.Node:
        up = product(ops.relu(x), weights[1])
        return product(ops.multiply(ops.swish(product(x, weights[0])), up), weights[2])

    for mlp in (spied, biased, of_two):
        assert [p.num_outputs for p in rewritten(small_model(weights_of_a_model(), mlp))] == [VOCABULARY]


def test_weights_of_other_kinds_are_left_to_the_plugin() -> None:
    floats = ops.constant(np.ones((64, 32), np.float32))
    rows = ops.parameter(ov.PartialShape([-1, 1, 32]), ov.Type.f32)
    codes = ops.convert(ops.constant(np.ones((64, 32), np.uint8)), "f32")
    fine = ops.multiply(codes, ops.constant(np.full((64, 1), 1 / 3, np.float32)))
    uneven = ops.multiply(codes, ops.constant(np.ones((64, 4), np.float16).repeat(8, axis=1).astype(np.float32)))
    for weights in (floats, fine, uneven):
        assert read_linear(product(rows, weights)) is None
    half = ops.multiply(codes, ops.constant(np.full((64, 1), 1 / 4, np.float32)))
    assert read_linear(product(rows, half)) is not None
    assert read_linear(ops.matmul(half, rows, False, True)) is None


@pytest.mark.parametrize("kind", ["i8", "i4"])
def test_signed_weights_have_a_zero_point_of_their_own(kind: str) -> None:
    rng = np.random.default_rng(2)
    bits = int(kind[1:])
    signed = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (32, 64)).astype(np.int8)
    stored = packed(signed.view(np.uint8) & (2**bits - 1), bits)
    tensor = ov.Tensor(np.ascontiguousarray(stored), [32, 64], ov.Type.i8 if bits == 8 else ov.Type.i4)
    scales = rng.uniform(1, 2, (32, 1)).astype(np.float16)
    weights = ops.multiply(ops.convert(ops.constant(tensor), "f16"), ops.constant(scales))
    rows = ops.parameter(ov.PartialShape([-1, 1, 64]), ov.Type.f32)
    linear = read_linear(product(rows, ops.convert(weights, "f32")))
    assert linear is not None
    found = reference.decompressed(linear.weights)
    assert np.array_equal(found, signed.astype(np.float64) * scales.astype(np.float64))


def test_what_zero_points_leave_out_is_put_into_them() -> None:
    """As models from GGUF have it: whole zero points, and the rest of each times the sum of its group."""
    rng = np.random.default_rng(3)
    bits, codes, scales, exact = random_weights(rng, 4, 48, HIDDEN, 32)
    zeros = exact.view(np.float16)
    whole = np.rint(zeros)
    rest = ((whole - zeros) * scales.view(np.float16)).astype(np.float32)
    rows = ops.parameter(ov.PartialShape([-1, 1, HIDDEN]), ov.Type.f32)
    grouped = ops.reshape(rows, ops.constant(np.array([0, 0, HIDDEN // 32, 32], np.int64)), True)
    sums = ops.reduce_sum(grouped, ops.constant(np.array([3], np.int64)), False)
    main = product(rows, in_graph((bits, codes, scales, half_bits(whole))))
    linear = read_linear(ops.add(main, product(sums, ops.constant(rest))))
    assert linear is not None
    assert linear.x.get_node().get_friendly_name() == rows.get_friendly_name()
    found, expected = (reference.decompressed((bits, codes, scales, z)) for z in (linear.weights.zeros, exact))
    assert np.abs(found - expected).max() <= 2**-8 * scales.view(np.float16).max()
    others = ops.reduce_sum(grouped, ops.constant(np.array([2], np.int64)), False)
    assert read_linear(ops.add(main, product(others, ops.constant(np.ones((48, 32), np.float32))))) is None


def test_the_last_mlp_of_a_model_with_corrections_is_one_operation(shallow: Path) -> None:
    """Sums of groups are of the sampled rows, too: those of the attention's output, and those inside the MLP."""
    model = ov.Core().read_model(shallow / "openvino_model.xml")
    use_paged_attention(model)
    layers = len(attention_ops(model))
    gather_sampled_rows(model)
    rows = next(p for p in model.get_parameters() if p.get_friendly_name() == SAMPLED_ROWS)
    readers = [target.get_node() for target in rows.output(0).get_target_inputs()]
    assert len(readers) == 2, "the residual stream and the attention"
    fed = {target.get_node().get_type_name() for node in readers for target in node.output(0).get_target_inputs()}
    assert fed == {"Add", "MatMul", "Reshape"}
    mlps = [part for part in products_of_graphs._mlps(model) if len(part.linears) == 3]
    assert len(mlps) == layers


def test_sums_of_sampled_rows_are_those_of_all_rows(shallow: Path) -> None:
    """The logits of a model with corrections, step by step, as the model gives them that nobody rewrote."""
    properties = {**F32, "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    ids = np.random.default_rng(6).integers(0, 49152, sum(CHUNKS))
    ours = logits_at_chunk_ends(shallow, ids, CacheConfig("f32", "f32", attention="crush"), properties)
    request = open_core().compile_model(shallow / "openvino_model.xml", "CPU", properties).create_infer_request()
    inputs = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64)}
    inputs |= {"position_ids": np.arange(len(ids))[None], "beam_idx": np.zeros(1, np.int32)}
    request.infer(inputs)
    expected = request.get_tensor("logits").data[0][np.cumsum(CHUNKS) - 1]
    np.testing.assert_allclose(ours, expected, atol=1e-3 * np.abs(expected).max(), rtol=0)


def test_no_more_bytes_than_are_allowed() -> None:
    weights = weights_of_a_model()
    nbytes = sum(array.nbytes for w in weights for array in w[1:])
    assert rewritten(small_model(weights), nbytes - 1) == ()
    products = rewritten(small_model(weights), nbytes)
    assert sum(p.nbytes for p in products) == nbytes


def test_a_product_that_is_gone_is_an_error() -> None:
    model = small_model(weights_of_a_model())
    products = list(rewritten(model))
    run = infer(model)
    run(np.zeros((1, HIDDEN), np.float32), [0])
    products.clear()
    with pytest.raises(RuntimeError, match="product must be the id of one that is there"):
        run(np.zeros((1, HIDDEN), np.float32), [0])


def test_settings_say_who_multiplies(shallow: Path) -> None:
    assert load_model(shallow, "CPU", {}, "crush").products == ()
    exact = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    assert load_model(shallow, "CPU", exact, "crush", weights="auto").packed_bytes == 0
    packed_model = load_model(shallow, "CPU", {}, "crush", weights="auto")
    is_scalar = native.info()["isa"] == "scalar"
    assert (packed_model.packed_bytes == 0) == is_scalar
    assert packed_model.packed_bytes == sum(p.nbytes for p in packed_model.products)
    with pytest.raises(CrushError, match="weights must be one of auto, packed, plugin"):
        CacheConfig(weights="ours")
    with pytest.raises(CrushError, match="weights must be 'auto' or 'plugin' with attention='paged'"):
        CacheConfig(weights="packed", attention="paged")
