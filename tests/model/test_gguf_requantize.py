"""Weights of types that openvino_genai does not know mean the same, or the nearest, in the type they are given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from covering import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gguf import RANDOM_SCALES, random_blocks

from ov_kvcrush.errors import ModelError
from ov_kvcrush.model.gguf.reader import TENSOR_TYPES, read_gguf_header
from ov_kvcrush.model.gguf.requantize import TARGETS, requantize, requantized_bytes, requantized_rows

EXACT = ("Q5_0", "IQ4_NL", "Q3_K")
SCALE_ROUNDS = ("IQ4_XS",)  # the product of two scales is one float16
FIVE_BITS = {"Q5_0": (0,), "Q5_1": (0, 2)}  # where scale and minimum are


def blocks_of(type_name: str, num_blocks: int, rng: np.random.Generator) -> np.ndarray:
    if type_name in RANDOM_SCALES:
        return random_blocks(type_name, num_blocks, rng)
    size = next(size for name, _, size in TENSOR_TYPES.values() if name == type_name)
    blocks = rng.integers(0, 256, (num_blocks, size), np.uint8)
    for at in FIVE_BITS[type_name]:
        blocks[:, at : at + 2] = rng.normal(size=(num_blocks, 1)).astype(np.float16).view(np.uint8)
    return blocks


def weights(rows: np.ndarray, type_name: str) -> np.ndarray:
    import gguf

    return np.asarray(gguf.dequantize(rows, gguf.GGMLQuantizationType[type_name]))


@pytest.mark.parametrize("type_name", list(TARGETS))
@settings(max_examples=examples(60), deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_blocks=st.integers(1, 3), num_rows=st.integers(1, 5))
def test_weights_are_those_of_the_file_or_the_nearest(
    type_name: str, seed: int, num_blocks: int, num_rows: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = blocks_of(type_name, num_rows * num_blocks, rng).reshape(num_rows, -1)
    expected = weights(rows, type_name)
    got = weights(requantized_rows(type_name, rows), TARGETS[type_name])
    assert got.shape == expected.shape
    if type_name in EXACT:
        np.testing.assert_array_equal(got, expected)
        return
    largest = np.abs(expected.reshape(-1, 32)).max(axis=1, keepdims=True)
    bound = 2**-11 if type_name in SCALE_ROUNDS else 1 / 254 * (1 + 2**-8)
    # Scales below the smallest normal float16 lose more.
    assert (np.abs(got - expected).reshape(-1, 32) <= largest * bound + 2**-24 * 127).all()


@pytest.mark.parametrize("type_name", list(TARGETS))
def test_a_scale_that_is_no_number_is_refused(type_name: str) -> None:
    rows = blocks_of(type_name, 1, np.random.default_rng(0))
    at = next(iter(RANDOM_SCALES.get(type_name, FIVE_BITS.get(type_name, ()))))
    rows[:, at : at + 2] = np.array([np.nan], np.float16).view(np.uint8)
    with pytest.raises(FloatingPointError):
        requantized_rows(type_name, rows)


def mixed_file(path: Path, damaged: bool = False) -> dict[str, np.ndarray]:
    """A file of tensors of all types and two that stay; returns what each means."""
    import gguf

    rng, expected = np.random.default_rng(1), {}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    for type_name in (*TARGETS, "Q8_0", "F32"):
        kind = gguf.GGMLQuantizationType[type_name]
        if type_name in TARGETS:
            rows = blocks_of(type_name, 256 // gguf.GGML_QUANT_SIZES[kind][0] * 3, rng).reshape(3, -1)
        else:
            rows = gguf.quantize(rng.normal(size=(3, 256)).astype(np.float32), kind)
        if damaged and type_name == "Q3_K":
            rows[1, 108:110] = 0x7F, 0x7F
        expected[type_name] = weights(rows, type_name)
        writer.add_tensor(f"blk.{type_name}", rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def test_a_file_is_rewritten_with_all_it_says(tmp_path: Path) -> None:
    import gguf

    expected = mixed_file(tmp_path / "in.gguf")
    header = read_gguf_header(tmp_path / "in.gguf")
    new = requantize(header, tmp_path / "in.gguf", tmp_path / "out.gguf")
    assert new.metadata == header.metadata
    assert list(new.tensors) == list(header.tensors)
    assert sum(tensor.num_bytes for tensor in new.tensors.values()) == requantized_bytes(header)
    for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors:
        before = tensor.name.removeprefix("blk.")
        assert tensor.tensor_type.name == TARGETS.get(before, before)
        got = weights(tensor.data, tensor.tensor_type.name)
        np.testing.assert_allclose(got, expected[before], atol=np.abs(expected[before]).max() / 250)
    assert requantized_bytes(new) == 0


def test_a_damaged_tensor_is_named(tmp_path: Path) -> None:
    mixed_file(tmp_path / "in.gguf", damaged=True)
    with pytest.raises(ModelError, match=r"blk.Q3_K.* must have finite scales"):
        requantize(read_gguf_header(tmp_path / "in.gguf"), tmp_path / "in.gguf", tmp_path / "out.gguf")
