"""The GGUF reader believes no length, and a converted GGUF computes what its weights say."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gguf import MERGED, ROPE_THETA, tiny_gguf
from tiny_models import CONTEXT_LENGTH, HEAD_SIZE, HIDDEN_SIZE, NUM_HEADS, NUM_KV_HEADS, VOCAB_SIZE, tiny_model

from ov_kvcrush.core.sampling_params import model_end_tokens
from ov_kvcrush.errors import ModelError
from ov_kvcrush.model.gguf import convert as gguf_model
from ov_kvcrush.model.gguf.convert import check_convertible, convert_gguf, gguf_model_info
from ov_kvcrush.model.gguf.reader import TENSOR_TYPES, read_gguf_header
from ov_kvcrush.model.info import ModelInfo
from ov_kvcrush.model.plugin import capped_properties, open_core
from ov_kvcrush.pipelines.loading import load_generation_config, load_tokenizer


@pytest.fixture(scope="module")
def q8_gguf(tiny_hf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    tiny_gguf(path, tiny_hf("llama"), "Q8_0")
    return path


def ir_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Logits float32 (T, vocabulary) of one prompt, everything in float32."""
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    request = open_core().compile_model(folder / "openvino_model.xml", "CPU", exact).create_infer_request()
    length = len(ids)
    feed = {
        "input_ids": ids[None],
        "attention_mask": np.ones((1, length), np.int64),
        "position_ids": np.arange(length)[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    logits: np.ndarray = request.infer(feed)["logits"][0]
    return logits


def test_block_sizes_are_those_of_the_format() -> None:
    import gguf

    for number, (name, per_block, block_bytes) in TENSOR_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (per_block, block_bytes))


def test_reader_agrees_with_the_reference(q8_gguf: Path) -> None:
    import gguf

    header, reference = read_gguf_header(q8_gguf), gguf.GGUFReader(q8_gguf)
    expected = {field.name: field.contents() for field in reference.fields.values() if "GGUF." not in field.name}
    assert dict(header.metadata) == expected
    assert {t.name: (t.tensor_type.name, tuple(t.shape), t.data_offset, t.n_bytes) for t in reference.tensors} == {
        t.name: (t.type_name, t.dims, t.start, t.num_bytes) for t in header.tensors.values()
    }


def test_truncated_file_is_refused_with_both_numbers(q8_gguf: Path, tmp_path: Path) -> None:
    whole = q8_gguf.read_bytes()
    tensors = read_gguf_header(q8_gguf).tensors.values()
    end = max(tensor.start + tensor.num_bytes for tensor in tensors)
    start = min(tensor.start for tensor in tensors)
    points = [*range(0, 200), *range(200, start, 997), *range(start, end, 4999), end - 1]
    short = tmp_path / "short.gguf"
    for length in points:
        short.write_bytes(whole[:length])
        with pytest.raises(ModelError) as caught:
            read_gguf_header(short)
        assert str(length) in str(caught.value)
        if length >= start:
            assert str(end) in str(caught.value)
    short.write_bytes(whole[:end])
    assert read_gguf_header(short).tensors


def test_truncated_file_is_not_converted(q8_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(q8_gguf.read_bytes()[:-50])

    def fail(*_: object) -> None:
        raise AssertionError("the converter was started")

    monkeypatch.setattr(gguf_model, "run_genai_converter", fail)
    with pytest.raises(ModelError, match="truncated"):
        convert_gguf(short, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["short.gguf"]


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_corrupted_header_never_crashes(q8_gguf: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Whatever bytes of the header change: ModelError, or a header whose tensors lie within the file."""
    content = bytearray(q8_gguf.read_bytes())
    start = min(tensor.start for tensor in read_gguf_header(q8_gguf).tensors.values())
    # Lengths and counts sit all over the header: corrupt runs of bytes with the values that hurt most.
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, start - 8))
        size = data.draw(st.sampled_from([1, 4, 8]))
        content[at : at + size] = data.draw(
            st.one_of(st.binary(min_size=size, max_size=size), st.sampled_from([b"\xff" * size, b"\0" * size]))
        )
    path = tmp_path_factory.getbasetemp() / "corrupt.gguf"
    path.write_bytes(content)
    try:
        header = read_gguf_header(path)
        for tensor in header.tensors.values():
            assert 0 < tensor.start <= tensor.start + tensor.num_bytes <= len(content)
        check_convertible(header, path)
        gguf_model_info(header)
    except ModelError:
        pass


@settings(max_examples=200, deadline=None)
@given(tail=st.binary(max_size=300), counts=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)))
def test_random_bytes_never_crash(
    tmp_path_factory: pytest.TempPathFactory, tail: bytes, counts: tuple[int, int]
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + tail)
    with suppress(ModelError):
        assert len(read_gguf_header(path).tensors) == counts[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "at least 24 bytes"),
        (b"PK\x03\x04" + bytes(40), "not a GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + bytes(40), "version"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(40), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + bytes(40), "tensors"),
    ],
    ids=["empty", "zip", "version-1", "big-endian", "absurd-count"],
)
def test_what_is_no_gguf_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=words):
        read_gguf_header(path)


def header_bytes(num_tensors: int, num_keys: int, rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_keys) + rest


KEY = struct.pack("<Q", 1) + b"k"
HOSTILE = {
    "tensors": header_bytes(2**60, 0, bytes(999)),
    "key-values": header_bytes(0, 2**60, bytes(999)),
    "string": header_bytes(0, 1, KEY + struct.pack("<IQ", 8, 2**60) + bytes(999)),
    "key": header_bytes(0, 1, struct.pack("<Q", 2**60) + bytes(999)),
    "numbers": header_bytes(0, 1, KEY + struct.pack("<IIQ", 9, 0, 2**40) + bytes(999)),
    "strings": header_bytes(0, 1, KEY + struct.pack("<IIQ", 9, 8, 2**40) + bytes(999)),
    "arrays": header_bytes(0, 1, KEY + struct.pack("<IIQ", 9, 9, 2**40) + bytes(999)),
    "name": header_bytes(1, 0, struct.pack("<Q", 2**60) + bytes(999)),
    "rank": header_bytes(1, 0, KEY + struct.pack("<I", 2**31) + bytes(999)),
    "dims": header_bytes(1, 0, KEY + struct.pack("<I4QIQ", 4, *[2**63] * 4, 0, 0) + bytes(999)),
    "offset": header_bytes(1, 0, KEY + struct.pack("<IQIQ", 1, 8, 0, 2**63) + bytes(999)),
}


@pytest.mark.parametrize("where", HOSTILE)
def test_a_count_beyond_the_file_is_refused_before_memory_is_taken(where: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[where])
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=r"x\.gguf"):
            read_gguf_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def array(name: bytes, item: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<IIQ", 9, item, count) + data


SPARSE = {
    "numbers": header_bytes(0, 1, array(b"k", 0, 2**29)),
    "strings": header_bytes(0, 1, array(b"k", 8, 2**26)),
    "one string": header_bytes(0, 1, KEY + struct.pack("<IQ", 8, 2**29)),
    "a name": header_bytes(1, 0, struct.pack("<Q", 2**29)),
    "many tensors": header_bytes(2**24, 0, b""),
    "many keys": header_bytes(0, 2**25, b""),
    "numbers together": header_bytes(0, 9, b"".join(array(b"k%d" % i, 0, 2**20, bytes(2**20)) for i in range(9))),
}


@pytest.mark.parametrize("where", SPARSE)
def test_a_sparse_file_is_refused_with_little_memory(where: str, tmp_path: Path) -> None:
    """1 GiB that takes no room on the disk: every count fits into the file."""
    path = tmp_path / "x.gguf"
    path.write_bytes(SPARSE[where])
    with path.open("r+b") as file:
        file.truncate(1 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=r"x\.gguf"):
            read_gguf_header(path)
        assert tracemalloc.get_traced_memory()[1] < (1 << 27 if where == "numbers together" else 1 << 20)
    finally:
        tracemalloc.stop()


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="readable"):
        read_gguf_header(tmp_path / "none.gguf")


def test_info_from_metadata(q8_gguf: Path) -> None:
    info = gguf_model_info(read_gguf_header(q8_gguf))
    assert (info.architecture, info.model_type, info.num_layers) == ("LlamaForCausalLM", "llama", 2)
    assert (info.num_heads, info.num_kv_heads, info.k_head_size) == (NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE)
    assert (info.hidden_size, info.vocab_size, info.context_length) == (HIDDEN_SIZE, VOCAB_SIZE, CONTEXT_LENGTH)
    assert info.rope["theta"] == ROPE_THETA
    assert info.weight_format == "gguf-Q8_0"


# Q4_1 and Q4_K get float16 zero points (whole ones would differ by 7), F16 weights are multiplied in less than float32,
# Types that are requantised are compared with what they become (test_gguf_requantize.py has what that loses); the
# converter's products of Q6_K's scales are float16.
@pytest.mark.parametrize(
    ("kind", "weight_type", "tolerance"),
    [
        ("llama", "Q8_0", 1e-3),
        ("llama", "Q4_0", 1e-3),
        ("llama", "Q4_1", 0.5),
        ("llama", "F16", 0.5),
        ("qwen2", "Q8_0", 1e-3),
        ("qwen3", "Q4_0", 1e-3),
        ("llama", "Q4_K", 1.0),
        ("llama", "Q3_K", 0.5),
        ("llama", "Q5_K", 1e-3),
        *(
            pytest.param("llama", weight_type, tolerance, marks=pytest.mark.exhaustive)
            for weight_type, tolerance in (
                ("Q5_0", 1e-3),
                ("Q5_1", 1e-3),
                ("Q2_K", 1e-3),
                ("IQ4_NL", 1e-3),
                ("IQ4_XS", 1e-3),
            )
        ),
    ],
)
def test_converted_model_computes_what_the_file_says(
    tiny_hf: Callable[[str], Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    weight_type: str,
    tolerance: float,
) -> None:
    import torch

    path, out = tmp_path / "m.gguf", tmp_path / "out"
    source = tiny_hf(kind)
    if weight_type.endswith(("_K", "XS")):  # their blocks need rows of 256
        sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8}
        source = tiny_model(kind, tmp_path_factory.mktemp("wide"), **sizes)
    model = tiny_gguf(path, source, weight_type)
    model.config.rope_parameters["rope_theta"] = ROPE_THETA
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    stages: list[str] = []
    info = convert_gguf(path, out, stage=stages.append)
    assert ModelInfo.read(out) == info
    assert "building the OpenVINO model" in stages
    assert not list(out.glob("*.gguf"))
    assert {file.name for file in tmp_path.iterdir()} == {"m.gguf", "out"}
    ids = np.arange(40, 90)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids[None])).logits[0].numpy()
    assert np.abs(ir_logits(out, ids) - expected).max() <= tolerance


def test_converted_folder_chats_in_stock_genai(q8_gguf: Path, tmp_path: Path) -> None:
    import openvino_genai

    out = tmp_path / "out"
    convert_gguf(q8_gguf, out)
    pipeline = openvino_genai.LLMPipeline(out, "CPU", **capped_properties())
    tokenizer = pipeline.get_tokenizer()
    assert tokenizer.get_eos_token_id() == 257
    assert tokenizer.encode(MERGED).input_ids.data.tolist() == [[260]]
    assert "<|start|>user\nhello<|end|>" in tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], True)
    result = pipeline.generate(["hello"], max_new_tokens=4, ignore_eos=True)
    assert result.perf_metrics.get_num_generated_tokens() == 4
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 257


@pytest.fixture(scope="module")
def marked_folder(tiny_hf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted GGUF with a USER_DEFINED token (258) and ends of turns and messages (259, 261)."""
    folder = tmp_path_factory.mktemp("marked")
    kinds = [1] * 256 + [3, 3, 4, 3, 1] + [3] * (VOCAB_SIZE - 261)
    ends = {"tokenizer__ggml__eot_token_id": 259, "tokenizer__ggml__eom_token_id": 261}
    tiny_gguf(folder / "m.gguf", tiny_hf("llama"), "Q8_0", tokenizer__ggml__token_type=kinds, **ends)
    convert_gguf(folder / "m.gguf", folder / "out")
    return folder / "out"


def test_user_defined_tokens_stay_in_decoded_answers(marked_folder: Path) -> None:
    import openvino_genai

    tokenizer = openvino_genai.Tokenizer(str(marked_folder), {})
    ids = tokenizer.encode("a<|start|>b<|end|>").input_ids.data[0].tolist()
    assert 258 in ids
    assert tokenizer.decode(ids) == "a<|start|>b"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|start|>b<|end|>"
    assert "<|start|>" in tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], True)


def test_ends_of_turns_are_end_tokens(marked_folder: Path) -> None:
    tokenizer = load_tokenizer(marked_folder, {})
    config = load_generation_config(marked_folder, tokenizer)
    assert model_end_tokens(config) == {257, 259, 261}
    assert config.eos_token_id == 257


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"general__architecture": "gemma2"}, "general.architecture"),
    "experts": ({"llama__expert_count": 8}, "expert_count"),
    "scaled rope": ({"llama__rope__scaling__type": "yarn"}, "RoPE"),
    "partial rope": ({"llama__rope__dimension_count": 16}, "dimension_count"),
    "split": ({"split__count": 2}, "split.count"),
    "tokenizer model": ({"tokenizer__ggml__model": "llama"}, "tokenizer.ggml.model"),
    "pre-tokenizer": ({"tokenizer__ggml__pre": "unheard-of"}, "tokenizer.ggml.pre"),
    "no tokens": ({"tokenizer__ggml__tokens": None}, "tokenizer.ggml.tokens"),
    "eos outside": ({"tokenizer__ggml__eos_token_id": 5000}, "eos_token_id"),
    "end of turn outside": ({"tokenizer__ggml__eot_token_id": 5000}, "eot_token_id"),
    "layers without tensors": ({"llama__block_count": 2**30}, "block_count must be at most"),
    "no layers": ({"llama__block_count": None}, "num_hidden_layers"),
    "no heads": ({"llama__attention__head_count": None}, "num_attention_heads"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_converter_cannot_do_is_refused(tiny_hf: Callable[[str], Path], tmp_path: Path, case: str) -> None:
    changes, words = REFUSED[case]
    path = tmp_path / "m.gguf"
    tiny_gguf(path, tiny_hf("llama"), "F16", **changes)
    with pytest.raises(ModelError, match=words):
        convert_gguf(path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_weight_type_of_no_use_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8}
    tiny_gguf(path, tiny_model("llama", tmp_path / "wide", **sizes), "IQ3_S")
    with pytest.raises(ModelError, match=r"must be of type .*, got IQ3_S"):
        convert_gguf(path, tmp_path / "out")


def test_converter_failure_is_told_and_leaves_nothing(
    q8_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_model, "_CONVERT", "import os, sys; print('it broke', file=sys.stderr); os.abort()")
    with pytest.raises(ModelError, match="it broke"):
        convert_gguf(q8_gguf, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_target_that_is_not_empty_is_kept(q8_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ModelError, match="empty"):
        convert_gguf(q8_gguf, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert len(list(tmp_path.iterdir())) == 1
