"""Products of few rows with compressed weights: what is computed, with every instruction set that is there."""

from __future__ import annotations

import numpy as np
import pytest
from compressed_weights import random_weights
from native_stores import ISAS, gaussian

from ov_kvcrush.native import Product
from reference import product as reference

ROUNDING = 2e-6  # of the largest result: sums in float32
SHAPES = [(bits, group) for bits in (8, 4) for group in (16, 32, 96, 192)]


def largest_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("bits", "group"), SHAPES)
def test_a_product_is_the_reference(isa: str, bits: int, group: int) -> None:
    rng = np.random.default_rng(bits + group)
    weights = random_weights(rng, bits, 48, 192, group)
    product = Product([weights], isa=isa)
    assert (product.num_inputs, product.num_outputs) == (192, 48)
    assert product.nbytes == sum(array.nbytes for array in weights[1:])
    for rows in (1, 2, 3, 4, 5, 9):
        x = gaussian(rng, rows, 192) * rng.choice([1e-3, 1, 50], (rows, 192)).astype(np.float32)
        assert largest_error(product.run(x), reference.linear(x, weights)) < ROUNDING


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("groups", [(32, 32, 32), (96, 32, 64), (16, 16, 16)])
def test_an_mlp_is_the_reference(isa: str, activation: str, groups: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(sum(groups))
    gate, up = (random_weights(rng, bits, 192, 96, group) for bits, group in zip((4, 8), groups, strict=False))
    down = random_weights(rng, 4, 32, 192, groups[2])
    product = Product([gate, up, down], activation, isa)
    x = 2 * gaussian(rng, 7, 96)
    # A hidden channel next to the middle between two codes may be rounded to the other one.
    hidden = reference.activated(reference.linear(x, gate), activation) * reference.linear(x, up)
    step = np.abs(hidden).max() / 127 * np.abs(reference.decompressed(down)).max()
    expected = reference.mlp(x, gate, up, down, activation)
    assert np.abs(product.run(x) - expected).max() < 2 * step
    assert np.median(np.abs(product.run(x) - expected)) < ROUNDING * np.abs(expected).max()


@pytest.mark.parametrize("isa", ISAS)
def test_an_input_is_wrong_by_half_a_step(isa: str) -> None:
    """Of 254 on both sides of 0: the error against products of the floats themselves."""
    rng = np.random.default_rng(3)
    weights = random_weights(rng, 8, 32, 256, 256)
    x = gaussian(rng, 5, 256)
    largest = np.abs(x.reshape(5, -1, 32)).max(axis=-1).repeat(32, axis=-1)
    bound = largest / 254 @ np.abs(reference.decompressed(weights)).T
    exact = x.astype(np.float64) @ reference.decompressed(weights).T
    assert (np.abs(Product([weights], isa=isa).run(x) - exact) <= bound * 1.001).all()


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_gives_the_same_bits_alone_and_beside_others(isa: str) -> None:
    rng = np.random.default_rng(5)
    linear = Product([random_weights(rng, 4, 80, 128, 32)], isa=isa)
    three = [random_weights(rng, 8, 64, 128, 128), random_weights(rng, 8, 64, 128, 128)]
    mlp = Product([*three, random_weights(rng, 4, 48, 64, 16)], isa=isa)
    x = gaussian(rng, 11, 128)
    for product in (linear, mlp):
        together = product.run(x)
        for row in range(11):
            assert np.array_equal(product.run(x[row : row + 1])[0], together[row])


@pytest.mark.parametrize("isa", ISAS)
def test_rows_that_are_not_finite_are_seen_and_stay_apart(isa: str) -> None:
    product = Product([random_weights(np.random.default_rng(6), 8, 32, 64, 32)], isa=isa)
    x = np.ones((4, 64), np.float32)
    x[1, 40], x[2, 3] = np.nan, -np.inf
    found = product.run(x)
    assert np.isnan(found[1:3]).all()
    assert np.array_equal(found[0], found[3])
    assert not product.run(np.zeros((1, 64), np.float32)).any()
    assert not product.run(np.full((1, 64), 1e-38, np.float32)).any()
    assert product.run(np.zeros((0, 64), np.float32)).shape == (0, 32)


def test_wrong_weights_and_rows_are_errors() -> None:
    rng = np.random.default_rng(7)
    bits, codes, scales, zeros = random_weights(rng, 8, 32, 96, 32)
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 2"):
        Product([(2, codes, scales, zeros)])
    with pytest.raises(ValueError, match="outputs must be a multiple of 16, got 31"):
        Product([(bits, codes[:31], scales[:31], zeros[:31])])
    with pytest.raises(ValueError, match="group must be 16 or a multiple of 32, got 48"):
        Product([(bits, codes, scales[:, :2].copy(), zeros[:, :2].copy())])
    with pytest.raises(ValueError, match="zeros must have shape"):
        Product([(bits, codes, scales, zeros[:, :2].copy())])
    with pytest.raises(ValueError, match="weights must be 1, or 3 for an MLP, got 2"):
        Product([(bits, codes, scales, zeros)] * 2)
    with pytest.raises(ValueError, match="down must have an input for each output of gate, got 96"):
        Product([(bits, codes, scales, zeros)] * 3)
    with pytest.raises(ValueError, match="activation must be silu or gelu_tanh, got relu"):
        Product([(bits, codes, scales, zeros)], "relu")
    with pytest.raises(ValueError, match="isa must be one of"):
        Product([(bits, codes, scales, zeros)], isa="sse9")
    with pytest.raises(ValueError, match="x must have shape"):
        Product([(bits, codes, scales, zeros)]).run(np.zeros((1, 32), np.float32))
