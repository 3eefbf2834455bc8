"""A context's file: what was saved comes back, anything else is refused, and no crash leaves half of one."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from context_files import signed
from native_stores import Cache, layer
from safetensors.numpy import load_file

from ov_kvcrush.contexts.file import LAYOUT_VERSION, ContextRecord, load_context, save_context
from ov_kvcrush.errors import ContextFileError, ModelError
from ov_kvcrush.model.fingerprints import (
    FINGERPRINT_FIELDS,
    NOT_SHARED,
    model_fingerprint,
    token_ids_fingerprint,
    tokenizer_fingerprint,
)
from ov_kvcrush.policies import registry

ARRAYS = ("ids", "heads", "tiles")
HEADS_PER_LAYER = (2, 1)


def fingerprint(ids: np.ndarray, **changes: str) -> dict[str, str]:
    values = {
        **dict.fromkeys(FINGERPRINT_FIELDS, "x"),
        "layout_version": str(LAYOUT_VERSION),
        "token_ids": token_ids_fingerprint(ids),
    }
    return {**values, **changes}


def record(seed: int = 0, num_bytes: int = 1000, **changes: Any) -> ContextRecord:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 1000, 50)

    def per_head(dtype: type) -> Any:
        sizes = iter(rng.integers(0, 9, sum(HEADS_PER_LAYER)))
        return tuple(tuple(rng.normal(size=next(sizes)).astype(dtype) for _ in range(k)) for k in HEADS_PER_LAYER)

    values = {
        "ids": ids,
        "heads": rng.integers(0, 100, (3, 4)),
        "tiles": rng.integers(0, 256, num_bytes, np.uint8),
        "fingerprint": fingerprint(ids),
        "policy": registry.settings_of(registry.build("snapkv", kept=0.3)),
        "num_evicted": 12,
        "num_choices": 3,
        "carried": per_head(np.float32),
        "representatives": per_head(np.int32),
        "extra": {"name": "Büro", "turns": [1, 2.5, None, True], "nested": {"a": []}},
    }
    return ContextRecord(**{**values, **changes})


def assert_equal(got: ContextRecord, expected: ContextRecord) -> None:
    for field in dataclasses.fields(ContextRecord):
        mine, theirs = getattr(got, field.name), getattr(expected, field.name)
        if field.name in ARRAYS:
            np.testing.assert_array_equal(mine, theirs, strict=True)
        elif field.name in ("carried", "representatives") and theirs is not None:
            assert list(map(len, mine)) == list(map(len, theirs))
            for a, b in zip([x for y in mine for x in y], [x for y in theirs for x in y], strict=True):
                np.testing.assert_array_equal(a, b, strict=True)
        else:
            assert mine == theirs


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "context.kvc"


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"carried": None},
        {"representatives": None},
        {"carried": None, "representatives": None, "extra": {}, "policy": {}},
        {"tiles": np.empty(0, np.uint8), "heads": np.zeros((0, 4), np.int64), "carried": (), "representatives": None},
        {"ids": np.empty(0, np.int64), "num_evicted": 0, "fingerprint": fingerprint(np.empty(0))},
    ],
    ids=lambda changes: "+".join(changes) or "all",
)
def test_what_was_saved_is_loaded(path: Path, changes: dict[str, Any]) -> None:
    saved = record(**changes)
    save_context(path, saved)
    assert_equal(load_context(path, {}), saved)
    assert_equal(load_context(path, saved.fingerprint), saved)
    assert os.listdir(path.parent) == [path.name]


def test_arrays_are_views_of_the_file(path: Path) -> None:
    save_context(path, record())
    loaded = load_context(path, {})
    assert loaded.carried is not None
    for array in (loaded.ids, loaded.heads, loaded.tiles, loaded.carried[0][0]):
        assert not array.flags.owndata
        assert not array.flags.writeable
        assert array.flags.aligned
    save_context(path, record(seed=1))  # a loaded record outlives its file
    assert_equal(loaded, record())


def test_same_record_gives_same_bytes_and_anyone_can_read_them(path: Path) -> None:
    save_context(path, record())
    first = path.read_bytes()
    save_context(path, record())
    assert path.read_bytes() == first
    arrays = load_file(path)
    for name in ARRAYS:
        np.testing.assert_array_equal(arrays[name], getattr(record(), name))


def test_names_in_the_file_are_those_of_this_layout_version(path: Path) -> None:
    """Files that were written before are read, whatever the code calls things now."""
    save_context(path, record())
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    texts = header.pop("__metadata__")
    assert (texts["format"], texts["layout_version"], texts["spans"]) == ("ov_kvcrush.context", "2", "[]")
    assert set(texts) == {
        "format", "layout_version", "sha256", "fingerprint", "policy", "spans", "kept", "heads_per_layer", "extra",
    }  # fmt: skip
    assert list(header) == [
        "ids", "heads", "carried_offsets", "representatives_offsets", "carried", "representatives", "tiles",
    ]  # fmt: skip


def test_a_link_is_followed(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.kvc"
    link.symlink_to(path)
    save_context(link, record())
    assert link.is_symlink()
    assert_equal(load_context(path, {}), record())


def test_a_sequence_goes_through_a_file(path: Path) -> None:
    """Tiles of a store, of about the size that they have there."""
    cache = Cache(layer(4, 2, 64), layer(4, 1, 64))
    seq = cache.new(np.random.default_rng(0), 2000)
    heads, tiles = cache.store.dump(seq)
    save_context(path, record(heads=heads, tiles=tiles))
    loaded = load_context(path, {})
    twin = cache.store.load(loaded.heads, loaded.tiles)
    for got, expected in zip(cache.store.dump(twin), (heads, tiles), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert path.stat().st_size <= 1.02 * cache.store.nbytes_of(seq)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_every_corruption_is_refused(path: Path) -> None:
    save_context(path, record(seed=1))
    other = path.read_bytes()
    save_context(path, record())
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    header, other_header = (8 + int.from_bytes(x[:8], "little") for x in (good, other))
    damage: list[Callable[[], bytes]] = [
        lambda: flipped(good, rng.integers(len(good)), rng),
        lambda: flipped(good, rng.integers(header), rng),
        lambda: flipped(good, rng.integers(8), rng),
        lambda: good[: rng.integers(len(good))],
        lambda: good + rng.bytes(1 + int(rng.integers(20))),
        lambda: other[:other_header] + good[header:],
        lambda: good[:8] + other[8:other_header] + good[header:],
        lambda: other[:200] + good[200:],
        lambda: good[: (a := int(rng.integers(len(good) - 9)))] + good[a + 8 :] + good[a : a + 8],
        lambda: good[: (a := int(rng.integers(len(good))))] + bytes(64) + good[a + 64 :],
        lambda: rng.bytes(len(good)),
    ]
    refused = 0
    while refused < 1000:
        bad = damage[int(rng.integers(len(damage)))]()
        if bad == good:
            continue
        path.write_bytes(bad)
        with pytest.raises(ContextFileError):
            load_context(path, {})
        refused += 1


def flipped(data: bytes, at: int, rng: np.random.Generator) -> bytes:
    return data[:at] + bytes([data[at] ^ int(rng.integers(1, 256))]) + data[at + 1 :]


def test_every_byte_counts(path: Path) -> None:
    save_context(path, record(num_bytes=10, extra={}, policy={}))
    good = path.read_bytes()
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x20]) + good[at + 1 :])  # A to a, too
        with pytest.raises(ContextFileError):
            load_context(path, {})
        path.write_bytes(good[:at])
        with pytest.raises(ContextFileError):
            load_context(path, {})


def test_a_right_digest_is_not_believed(path: Path) -> None:
    """Headers that say something else, signed anew: refused, or a record that is whole."""
    save_context(path, record())
    good = path.read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")
    header, rest = good[8:end], good[end:]
    path.write_bytes(signed(header, rest))
    assert_equal(load_context(path, {}), record())
    rng = np.random.default_rng(0)
    numbers = [*re.finditer(rb"(?<![0-9a-f])\d+", header)]
    words = [b"-1", b"null", b"99999999999999999999", b"1.5", b'"x"', b"[]", b"{}", b"0", b"1e400", b"[" * 2000]
    for _ in range(600):
        at = numbers[rng.integers(1, len(numbers))]
        begin, stop = at.span() if rng.integers(2) else (a := int(rng.integers(150, len(header))), a + 1)
        bad = header[:begin] + words[rng.integers(len(words))] + header[stop:]
        path.write_bytes(signed(bad, rest[: rng.integers(len(rest))] if rng.integers(4) == 0 else rest))
        try:
            loaded = load_context(path, {})
        except ContextFileError:
            continue
        assert loaded.tiles.nbytes <= len(rest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["ids"].update(dtype="F64"), "ids must follow what is before it, with its dtype"),
        (lambda h: h["ids"].update(shape=[51]), "ids must end at 408"),
        (lambda h: h["tiles"].update(shape=[2**62]), "tiles must end at"),
        (lambda h: h["tiles"]["data_offsets"].__setitem__(0, 0), "tiles must follow what is before it"),
        (lambda h: h.pop("heads"), "heads must follow|carried_offsets must follow"),
        (lambda h: h.update(more=h["tiles"]), "arrays must be of"),
        (lambda h: h["__metadata__"].pop("policy"), "a damaged header"),
        (lambda h: h["__metadata__"].update(heads_per_layer="[1]"), "heads_per_layer must be"),
        (lambda h: h["__metadata__"].update(fingerprint="{}"), "fingerprint must have the fields"),
    ],
)
def test_wrong_headers_are_named(path: Path, change: Callable[[Any], Any], message: str) -> None:
    save_context(path, record())
    good = path.read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")
    header = json.loads(good[8:end])
    change(header)
    path.write_bytes(signed(json.dumps(header, separators=(",", ":")).encode(), good[end:]))
    with pytest.raises(ContextFileError, match=message):
        load_context(path, {})


def test_a_file_from_before_layers_were_shared_says_that_none_is(path: Path) -> None:
    save_context(path, record())
    good = path.read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")
    header = json.loads(good[8:end])
    made_with = json.loads(header["__metadata__"]["fingerprint"])
    del made_with["shared_layers"]
    header["__metadata__"]["fingerprint"] = json.dumps(made_with)
    path.write_bytes(signed(json.dumps(header, separators=(",", ":")).encode(), good[end:]))
    assert load_context(path, {"shared_layers": NOT_SHARED}).fingerprint["shared_layers"] == NOT_SHARED
    with pytest.raises(ContextFileError, match="shared_layers must be 1: 0, got none"):
        load_context(path, {"shared_layers": "1: 0"})


@pytest.mark.parametrize(("version", "age"), [(7, "a newer"), (1, "an older")])
def test_another_layout_version_is_refused(path: Path, version: int, age: str) -> None:
    save_context(path, record())
    good = path.read_bytes()
    path.write_bytes(good.replace(b'"layout_version":"2"', b'"layout_version":"%d"' % version, 1))
    message = f"layout_version must be 2, got {version}: written by {age} ov_kvcrush"
    with pytest.raises(ContextFileError, match=message):
        load_context(path, {})


@pytest.mark.parametrize("name", FINGERPRINT_FIELDS)
def test_each_field_that_differs_is_named(path: Path, name: str) -> None:
    saved = record()
    save_context(path, saved)
    with pytest.raises(ContextFileError, match=f"{name} must be other, got {saved.fingerprint[name]}$"):
        load_context(path, {**saved.fingerprint, name: "other"})


def test_all_fields_that_differ_are_named(path: Path) -> None:
    save_context(path, record())
    with pytest.raises(ContextFileError, match="model must be a, got x; policy must be b, got x"):
        load_context(path, {"policy": "b", "model": "a"})
    with pytest.raises(ContextFileError, match=r"got 'polcy' \(did you mean 'policy'\?\)"):
        load_context(path, {"polcy": "b"})


@pytest.mark.parametrize("content", [b"", b"1234567", b"12345678", b"GGUF" * 100, b"\xff" * 5000], ids=len)
def test_other_files_are_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ContextFileError, match="must be a context that ov_kvcrush saved"):
        load_context(path, {})


def test_paths_that_are_no_files_are_refused(path: Path, tmp_path: Path) -> None:
    for wrong in (path, tmp_path):
        with pytest.raises(ContextFileError, match="path must be a file"):
            load_context(wrong, {})
    for wrong in (tmp_path, tmp_path / "none" / "x.kvc", tmp_path / ("x" * 300)):
        with pytest.raises(ContextFileError, match="path must be a file to be written"):
            save_context(wrong, record())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": np.zeros(50, np.int32)}, "ids must be an array of int64 with 1 axes, got int32 with 1"),
        ({"ids": -np.ones(50, np.int64)}, "ids must be at least 0, got -1"),
        ({"heads": np.zeros(3, np.int64)}, "heads must be an array of int64 with 2 axes"),
        ({"heads": np.zeros((3, 1), np.int64)}, "heads must have at least 2 columns, got 1"),
        ({"tiles": b"abc"}, "tiles must be an array of uint8 with 1 axes, got bytes"),
        ({"num_evicted": 51}, r"num_evicted must be in 0\.\.50, got 51"),
        ({"num_choices": -1}, "num_choices must be in"),
        ({"carried": ((np.zeros(1, np.float32),),)}, "carried must have an array for each of the 3 heads, got 1"),
        ({"carried": ((np.zeros(1),) * 3,)}, "carried must be an array of float32"),
        ({"representatives": ((np.zeros(1, np.int32),) * 3,)}, "representatives must have the layers that carried has"),
        ({"fingerprint": {"model": "x"}}, "fingerprint must have the fields layout_version, model"),
        ({"fingerprint": fingerprint(np.zeros(3))}, "token_ids must be"),
        ({"fingerprint": fingerprint(np.zeros(3), layout_version="1")}, "layout_version must be 2, got 1"),
    ],
)
def test_what_no_file_can_hold_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ContextFileError, match=message):
        record(**changes)


def test_values_that_json_does_not_have_are_refused(path: Path) -> None:
    for extra in ({"x": object()}, {"x": float("nan")}, {"x": b"bytes"}):
        with pytest.raises(ContextFileError, match="policy and extra must be values that JSON has"):
            save_context(path, record(extra=extra))
    assert not path.exists()


# -- crashes and full disks --------------------------------------------------------------------------------------------


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Writing beyond fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 1000, 100_000])
def test_a_full_disk_keeps_the_old_file(path: Path, limit: int) -> None:
    big = record(seed=1, num_bytes=200_000)
    for there in (None, record()):
        if there is not None:
            save_context(path, there)
        with largest_file(limit), pytest.raises(ContextFileError, match=r"with room for 20\d{4} bytes, got .*"):
            save_context(path, big)
        assert os.listdir(path.parent) == ([path.name] if there else [])
        if there is not None:
            assert_equal(load_context(path, {}), there)


# Forks: each child saves again and again until it is killed.
KILLED = """
import os, random, signal, sys, time
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/../helpers", sys.argv[1] + "/.."]
from test_context_file import load_context, record, save_context
path, rounds = sys.argv[2], int(sys.argv[3])
records = [record(seed, num_bytes=10_000_000 + seed) for seed in (1, 2)]
for round in range(rounds):
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(told, b"x")
        while True:
            for each in records:
                save_context(path, each)
    os.read(ready, 1)
    time.sleep(random.Random(round).random() * 0.12 * (round > 0))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        print(load_context(path, {}).tiles.size)
    except FileNotFoundError:
        print("none")
    except ValueError as error:
        print("none" if not os.path.exists(path) else error)
"""


def test_a_kill_leaves_a_whole_file_or_none(path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(path), "10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    states = done.stdout.split()
    assert len(states) == 10
    assert set(states) <= {"none", "10000001", "10000002"}
    save_context(path, record())
    assert os.listdir(path.parent) == [path.name]
    assert_equal(load_context(path, {}), record())


def test_a_file_that_is_being_saved_is_left_alone(path: Path) -> None:
    """Two at once: what the other writes is no litter."""
    script = "import test_context_file as t, sys\nfor i in range(30): t.save_context(sys.argv[1], t.record(i))"
    command = [sys.executable, "-c", script, str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    others = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for other in others:
        _, words = other.communicate()
        assert other.returncode == 0, words
    assert os.listdir(path.parent) == [path.name]
    assert_equal(load_context(path, {}), record(29))


# -- fingerprints ------------------------------------------------------------------------------------------------------

NAMES = ("openvino_model.xml", "openvino_model.bin", "config.json", "openvino_tokenizer.xml", "openvino_tokenizer.bin")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name in (*NAMES, "chat_template.jinja"):
        (tmp_path / name).write_bytes(name.encode() * 30)
    (tmp_path / "openvino_model.bin").write_bytes(np.random.default_rng(0).bytes(3 << 20))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "at", "changes_model", "changes_tokenizer"),
    [
        ("openvino_model.xml", 7, True, False),
        ("config.json", 7, True, False),
        ("openvino_model.bin", 0, True, False),
        ("openvino_model.bin", -1, True, False),
        ("openvino_model.bin", None, True, False),
        ("openvino_tokenizer.xml", 7, False, True),
        ("openvino_tokenizer.bin", 7, False, True),
        ("chat_template.jinja", 7, False, True),
        ("tokenizer_config.json", None, False, True),
        ("generation_config.json", None, False, False),
    ],
)
def test_fingerprints_tell_models_apart(
    model: Path, name: str, at: int | None, changes_model: bool, changes_tokenizer: bool
) -> None:
    before = model_fingerprint(model), tokenizer_fingerprint(model)
    assert before == (model_fingerprint(str(model)), tokenizer_fingerprint(str(model)))
    content = bytearray((model / name).read_bytes() if (model / name).exists() else b"")
    if at is None:
        content += b"x"
    else:
        content[at] ^= 1
    (model / name).write_bytes(content)
    assert (model_fingerprint(model) != before[0]) == changes_model
    assert (tokenizer_fingerprint(model) != before[1]) == changes_tokenizer


def test_further_training_is_seen(model: Path) -> None:
    """Where most of the bytes change a little."""
    before = model_fingerprint(model)
    weights = np.fromfile(model / "openvino_model.bin", np.uint8)
    weights[np.random.default_rng(1).random(len(weights)) < 0.01] ^= 1
    weights.tofile(model / "openvino_model.bin")
    assert model_fingerprint(model) != before


def test_a_gguf_file_has_fingerprints(tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    seen = set()
    for content in (b"a" * 100, b"a" * 101, b"b" * 100, b"a" * (3 << 20)):
        gguf.write_bytes(content)
        seen |= {model_fingerprint(gguf), tokenizer_fingerprint(gguf)}
        moved = gguf.with_name("other.gguf")
        moved.write_bytes(content)
        assert model_fingerprint(moved) == model_fingerprint(gguf)
    assert len(seen) == 8


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(model: Path, name: str) -> None:
    (model / name).unlink()
    find = tokenizer_fingerprint if "tokenizer" in name else model_fingerprint
    with pytest.raises(ModelError, match=f"model must have the file {name}"):
        find(model)


def test_token_ids_are_told_apart() -> None:
    ids = np.arange(10)
    assert token_ids_fingerprint(ids) == token_ids_fingerprint(ids.astype(np.int32))
    others = [ids[:-1], ids[::-1], np.append(ids, 0), ids.reshape(2, 5) + 1]
    assert len({token_ids_fingerprint(x) for x in [ids, *others]}) == 5
