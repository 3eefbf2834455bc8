"""Bad input to the native store: a ValueError that names the field, and nothing has changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from native_stores import DEFAULTS, Array, Cache, keys_values, layer, require_native

from ov_kvcrush import native


@pytest.fixture(autouse=True)
def _native() -> None:
    require_native()


@dataclass
class Scene:
    """A store with a sequence of 40 tokens, an empty one, a staged one, and one that was released."""

    cache: Cache
    full: int
    empty: int
    staged: int
    gone: int

    @property
    def store(self) -> Any:
        return self.cache.store

    def state(self) -> list[Any]:
        s = self.store
        tokens = [x for head in range(2) for x in self.cache.tokens(self.full, 0, head)]
        numbers = [s.nbytes, s.num_sequences, *(s.num_tokens(seq, 0, 0) for seq in (self.empty, self.staged))]
        return [*tokens, *numbers, s.attend(0, [(self.full, 0, 1, 39)], np.ones((1, 128), np.float32))]


@pytest.fixture
def scene() -> Scene:
    rng = np.random.default_rng(0)
    cache = Cache(layer(4, 2, 32))
    full, empty, staged, gone = cache.new(rng, 40), cache.store.create(), cache.store.create(), cache.store.create()
    cache.attach_prefill(staged, [keys_values(rng, 20, 64)])
    cache.store.release(gone)
    assert cache.store.reserve(full, 8)
    return Scene(cache, full, empty, staged, gone)


def f32(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


def i32(*numbers: int) -> Array:
    return np.array(numbers, np.int32)


def i64(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


Call = Callable[[Scene], Any]

RELEASED: dict[str, Call] = {
    "release": lambda s: s.store.release(s.gone),
    "fork": lambda s: s.store.fork(s.gone),
    "reserve": lambda s: s.store.reserve(s.gone, 1),
    "free_slots": lambda s: s.store.free_slots(s.gone),
    "settle": lambda s: s.store.quantize_aged(s.gone),
    "set_precisions": lambda s: s.store.set_precisions(s.gone, np.zeros((2, 2), np.uint8)),
    "precisions": lambda s: s.store.precisions(s.gone),
    "stage": lambda s: s.store.attach_prefill(s.gone, i32(0), 1),
    "adopt": lambda s: s.store.commit_prefill(s.gone),
    "compact": lambda s: s.store.compact(s.gone, i64(0, 0, 0), i32()),
    "append": lambda s: s.store.append(s.gone, 0, f32(1, 64), f32(1, 64), 0),
    "attend": lambda s: s.store.attend(0, [(s.full, 0, 1, 39), (s.gone, 1, 1, 0)], f32(2, 128)),
    "scores": lambda s: s.store.scores(s.gone, 0, f32(1, 128), i32(0), "mean"),
    "captured": lambda s: s.store.captured(s.gone, 0),
    "crop": lambda s: s.store.crop(s.gone, 0),
    "num_tokens": lambda s: s.store.num_tokens(s.gone, 0, 0),
    "positions": lambda s: s.store.positions(s.gone, 0, 0),
    "read": lambda s: s.store.read(s.gone, 0, 0),
    "nbytes_of": lambda s: s.store.nbytes_of(s.gone),
}

# (what is wrong, field that the error names, call)
BAD: list[tuple[str, str, Call]] = [
    ("negative capture", "capture_rows", lambda s: s.store.create(-1)),
    ("negative tokens", "num_tokens", lambda s: s.store.reserve(s.full, -1)),
    ("too many tokens", "num_tokens", lambda s: s.store.reserve(s.full, 2**62)),
    ("negative promised", "promised", lambda s: s.store.reserve(s.full, 1, -1)),
    ("negative crop", "num_tokens", lambda s: s.store.crop(s.full, -1)),
    ("crop of a staged one", "sequence", lambda s: s.store.crop(s.staged, 0)),
    ("negative cut", "num_tokens", lambda s: s.store.fork(s.full, -1)),
    ("cut behind the end", "num_tokens", lambda s: s.store.fork(s.full, 41)),
    ("fork of a staged one", "seq", lambda s: s.store.fork(s.staged)),
    ("negative bytes_for", "num_tokens", lambda s: s.store.bytes_for(-1)),
    ("negative bytes_for of a head", "num_tokens", lambda s: s.store.bytes_for(i64(3, -1))),
    ("bytes_for of too many heads", "num_tokens", lambda s: s.store.bytes_for(i64(3, 3, 3))),
    ("bytes_for of int32", "num_tokens", lambda s: s.store.bytes_for(i32(3, 3))),
    (
        "layer of staging",
        "layer",
        lambda s: s.store.set_staging(1, np.zeros(8192, np.uint8), np.zeros(8192, np.uint8), 1, "f32"),
    ),
    (
        "negative layer of staging",
        "layer",
        lambda s: s.store.set_staging(-1, np.zeros(8192, np.uint8), np.zeros(8192, np.uint8), 1, "f32"),
    ),
    (
        "staging too small",
        "keys",
        lambda s: s.store.set_staging(0, np.zeros(8191, np.uint8), np.zeros(8192, np.uint8), 1, "f32"),
    ),
    (
        "staged values too small",
        "values",
        lambda s: s.store.set_staging(0, np.zeros(8192, np.uint8), np.zeros(0, np.uint8), 1, "f32"),
    ),
    (
        "staging of a wrong type",
        "keys",
        lambda s: s.store.set_staging(0, f32(2048), np.zeros(8192, np.uint8), 1, "f32"),
    ),
    (
        "negative blocks",
        "num_blocks",
        lambda s: s.store.set_staging(0, np.zeros(8192, np.uint8), np.zeros(8192, np.uint8), -1, "f32"),
    ),
    (
        "quantised staging",
        "precision",
        lambda s: s.store.set_staging(0, np.zeros(8192, np.uint8), np.zeros(8192, np.uint8), 1, "u8"),
    ),
    (
        "unknown staging",
        "precision",
        lambda s: s.store.set_staging(0, np.zeros(8192, np.uint8), np.zeros(8192, np.uint8), 1, "f64"),
    ),
    ("block that is not there", "blocks", lambda s: s.store.attach_prefill(s.empty, i32(3), 1)),
    ("negative block", "blocks", lambda s: s.store.attach_prefill(s.empty, i32(-1), 1)),
    ("more tokens than blocks", "num_tokens", lambda s: s.store.attach_prefill(s.empty, i32(0), 33)),
    ("negative staged tokens", "num_tokens", lambda s: s.store.attach_prefill(s.empty, i32(0), -1)),
    ("blocks of int64", "blocks", lambda s: s.store.attach_prefill(s.empty, i64(0), 1)),
    ("blocks in two dimensions", "blocks", lambda s: s.store.attach_prefill(s.empty, i32(0).reshape(1, 1), 1)),
    ("staging of a full one", "seq", lambda s: s.store.attach_prefill(s.full, i32(0), 1)),
    ("adopt without a prompt", "seq", lambda s: s.store.commit_prefill(s.empty)),
    ("adopt into tokens", "seq", lambda s: s.store.commit_prefill(s.full)),
    ("offsets without indices", "offsets", lambda s: s.store.commit_prefill(s.staged, i64(0, 1, 2))),
    ("indices without offsets", "offsets", lambda s: s.store.commit_prefill(s.staged, None, i32(0, 1))),
    ("negative promised of adopt", "promised", lambda s: s.store.commit_prefill(s.staged, promised=-1)),
    ("keys too narrow", "k", lambda s: s.store.append(s.full, 0, f32(1, 63), f32(1, 64), 40)),
    ("values too narrow", "v", lambda s: s.store.append(s.full, 0, f32(1, 64), f32(1, 32), 40)),
    ("fewer values than keys", "v", lambda s: s.store.append(s.full, 0, f32(2, 64), f32(1, 64), 40)),
    ("keys of float64", "k", lambda s: s.store.append(s.full, 0, np.zeros((1, 64)), f32(1, 64), 40)),
    ("keys in one dimension", "k", lambda s: s.store.append(s.full, 0, f32(64), f32(1, 64), 40)),
    ("keys in columns", "k", lambda s: s.store.append(s.full, 0, np.asfortranarray(f32(2, 64)), f32(2, 64), 40)),
    ("values with gaps", "v", lambda s: s.store.append(s.full, 0, f32(2, 64), f32(4, 64)[::2], 40)),
    ("layer of append", "layer", lambda s: s.store.append(s.full, 1, f32(1, 64), f32(1, 64), 40)),
    ("negative layer", "layer", lambda s: s.store.append(s.full, -1, f32(1, 64), f32(1, 64), 40)),
    ("negative position", "first_position", lambda s: s.store.append(s.full, 0, f32(1, 64), f32(1, 64), -1)),
    ("position beyond int32", "first_position", lambda s: s.store.append(s.full, 0, f32(2, 64), f32(2, 64), 2**31 - 2)),
    ("layer of attend", "layer", lambda s: s.store.attend(1, [(s.full, 0, 1, 39)], f32(1, 128))),
    ("queries too narrow", "q", lambda s: s.store.attend(0, [(s.full, 0, 1, 39)], f32(1, 64))),
    ("queries of float16", "q", lambda s: s.store.attend(0, [(s.full, 0, 1, 39)], np.zeros((1, 128), np.float16))),
    ("queries with gaps", "q", lambda s: s.store.attend(0, [(s.full, 0, 1, 39)], f32(1, 256)[:, ::2])),
    ("rows behind the end", "row_begin", lambda s: s.store.attend(0, [(s.full, 1, 1, 39)], f32(1, 128))),
    ("rows before the start", "row_begin", lambda s: s.store.attend(0, [(s.full, -1, 1, 39)], f32(1, 128))),
    ("fewer than no rows", "num_rows", lambda s: s.store.attend(0, [(s.full, 0, -1, 39)], f32(1, 128))),
    ("span at a negative position", "first_position", lambda s: s.store.attend(0, [(s.full, 0, 1, -1)], f32(1, 128))),
    ("span beyond int32", "first_position", lambda s: s.store.attend(0, [(s.full, 0, 2, 2**31 - 1)], f32(2, 128))),
    (
        "spans that overlap",
        "spans",
        lambda s: s.store.attend(0, [(s.full, 0, 2, 38), (s.full, 1, 1, 39)], f32(2, 128)),
    ),
    ("unknown reduction", "reduce", lambda s: s.store.scores(s.full, 0, f32(1, 128), i32(39), "median")),
    ("scored queries too narrow", "q", lambda s: s.store.scores(s.full, 0, f32(1, 127), i32(39), "mean")),
    ("fewer positions than rows", "q", lambda s: s.store.scores(s.full, 0, f32(2, 128), i32(39), "mean")),
    ("positions of int64", "positions", lambda s: s.store.scores(s.full, 0, f32(1, 128), i64(39), "mean")),
    ("layer of scores", "layer", lambda s: s.store.scores(s.full, 7, f32(1, 128), i32(39), "mean")),
    ("layer of captured", "layer", lambda s: s.store.captured(s.full, 1)),
    ("head of num_tokens", "head", lambda s: s.store.num_tokens(s.full, 0, 2)),
    ("negative head", "head", lambda s: s.store.positions(s.full, 0, -1)),
    ("layer of read", "layer", lambda s: s.store.read(s.full, 1, 0)),
]

# Selections from 40 tokens in 2 heads
BAD_SELECTIONS: list[tuple[str, str, Array, Array]] = [
    ("one head too few", "offsets", i64(0, 1), i32(0)),
    ("one head too many", "offsets", i64(0, 1, 1, 1), i32(0)),
    ("no offsets", "offsets", i64(), i32()),
    ("no start at 0", "offsets", i64(1, 1, 2), i32(0, 1)),
    ("descending offsets", "offsets", i64(0, 2, 1), i32(0)),
    ("negative offsets", "offsets", i64(0, -1, 1), i32(0)),
    ("offsets that end early", "offsets", i64(0, 1, 1), i32(0, 1)),
    ("offsets that end late", "offsets", i64(0, 1, 3), i32(0, 1)),
    ("offsets of int32", "offsets", i32(0, 1, 2), i32(0, 1)),
    ("index behind the end", "indices", i64(0, 1, 2), i32(0, 40)),
    ("negative index", "indices", i64(0, 1, 2), i32(-1, 0)),
    ("descending indices", "indices", i64(0, 2, 2), i32(5, 4)),
    ("repeated index", "indices", i64(0, 2, 2), i32(5, 5)),
    ("indices of int64", "indices", i64(0, 1, 2), i64(0, 1)),
    ("indices with gaps", "indices", i64(0, 1, 2), i32(0, 1, 2, 3)[::2]),
    ("indices in two dimensions", "indices", i64(0, 1, 2), i32(0, 1).reshape(1, 2)),
]


BAD_PRECISIONS = {
    "a head too few": np.zeros((1, 2), np.uint8),
    "a head too many": np.zeros((3, 2), np.uint8),
    "keys only": np.zeros(2, np.uint8),
    "int64": np.zeros((2, 2), np.int64),
    "unknown codec of a key": np.array([[0, 1], [6, 1]], np.uint8),
    "unknown codec of a value": np.array([[0, 255], [2, 1]], np.uint8),
    "strides": np.zeros((2, 4), np.uint8)[:, ::2],
}


def refused(scene: Scene, field: str, call: Call) -> None:
    """A ValueError that begins with the field, and everything is as before."""
    before = scene.state()
    with pytest.raises(ValueError, match=rf"(?s)^{field}\w* must .*, got "):
        call(scene)
    for was, now in zip(before, scene.state(), strict=True):
        np.testing.assert_array_equal(was, now)


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_sequence_is_refused(scene: Scene, name: str) -> None:
    refused(scene, "seq", RELEASED[name])


@pytest.mark.parametrize(("field", "call"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_names_the_field_and_changes_nothing(scene: Scene, field: str, call: Call) -> None:
    refused(scene, field, call)


@pytest.mark.parametrize(
    ("field", "offsets", "indices"), [b[1:] for b in BAD_SELECTIONS], ids=[b[0] for b in BAD_SELECTIONS]
)
def test_bad_selections_are_refused(scene: Scene, field: str, offsets: Array, indices: Array) -> None:
    refused(scene, field, lambda s: s.store.compact(s.full, offsets, indices))
    refused(scene, field, lambda s: s.store.commit_prefill(s.staged, offsets, indices))


@pytest.mark.parametrize("precisions", BAD_PRECISIONS.values(), ids=BAD_PRECISIONS)
def test_bad_precisions_are_refused(scene: Scene, precisions: Array) -> None:
    selection = (i64(0, 1, 2), i32(0, 0))
    calls: list[Call] = [
        lambda s: s.store.create(0, precisions),
        lambda s: s.store.set_precisions(s.full, precisions),
        lambda s: s.store.commit_prefill(s.staged, *selection, precisions=precisions),
        lambda s: s.store.compact(s.full, *selection, precisions=precisions),
        lambda s: s.store.bytes_for(3, precisions),
    ]
    before = [scene.store.precisions(seq).copy() for seq in (scene.full, scene.staged)]
    for call in calls:
        refused(scene, "precisions", call)
    for was, seq in zip(before, (scene.full, scene.staged), strict=True):
        np.testing.assert_array_equal(scene.store.precisions(seq), was)


LADDER = np.array([[[3, 3], [4, 4]], [[3, 4], [3, 5]]], np.uint8)
BAD_TIERS: list[tuple[str, str, Array | None, Array]] = [
    ("no precisions", "tiers", None, np.zeros(2, np.uint8)),
    ("precisions of one tier only", "precisions", LADDER[:, 0].copy(), np.zeros(2, np.uint8)),
    ("no tier", "precisions", LADDER[:, :0], np.zeros(2, np.uint8)),
    ("a head too few", "precisions", LADDER[:1], np.zeros(2, np.uint8)),
    ("bits that grow", "precisions", LADDER[:, ::-1].copy(), np.zeros(2, np.uint8)),
    ("unknown codec", "precisions", np.full((2, 1, 2), 6, np.uint8), np.zeros(2, np.uint8)),
    ("a tier too many", "tiers", LADDER, np.array([0, 2], np.uint8)),
    ("a token too few", "tiers", LADDER, np.zeros(1, np.uint8)),
    ("tiers of int64", "tiers", LADDER, np.zeros(2, np.int64)),
]


@pytest.mark.parametrize(("field", "precisions", "tiers"), [b[1:] for b in BAD_TIERS], ids=[b[0] for b in BAD_TIERS])
def test_bad_tiers_are_refused(scene: Scene, field: str, precisions: Array | None, tiers: Array) -> None:
    selection, options = (i64(0, 1, 2), i32(0, 0)), {"precisions": precisions, "tiers": tiers}
    refused(scene, field, lambda s: s.store.commit_prefill(s.staged, *selection, **options))
    refused(scene, field, lambda s: s.store.compact(s.full, *selection, **options))
    refused(scene, "tiers", lambda s: s.store.commit_prefill(s.staged, precisions=LADDER, tiers=tiers))
    refused(scene, "precisions", lambda s: s.store.compact(s.full, *selection, LADDER))
    refused(scene, "num_tokens", lambda s: s.store.bytes_for(3, LADDER))
    refused(scene, "num_tokens", lambda s: s.store.bytes_for(i64(3, 3), LADDER))


def test_append_without_room_is_refused(scene: Scene) -> None:
    before = scene.state()
    for seq, n in ((scene.full, scene.store.free_slots(scene.full) + 1), (scene.empty, 1)):
        with pytest.raises(RuntimeError, match="reserve"):
            scene.store.append(seq, 0, f32(n, 64), f32(n, 64), 40)
    scene.store.fork(scene.full)
    with pytest.raises(RuntimeError, match="reserve"):
        scene.store.append(scene.full, 0, f32(1, 64), f32(1, 64), 40)  # the last tile is shared now
    np.testing.assert_array_equal(before[0], scene.state()[0])


def test_a_staged_sequence_takes_no_other_tokens(scene: Scene) -> None:
    """They would be lost, or lie under the prompt."""
    store = scene.store
    assert store.reserve(scene.staged, 1)
    with pytest.raises(ValueError, match=r"^seq"):
        store.append(scene.staged, 0, f32(1, 64), f32(1, 64), 0)


def test_staging_arrays_are_written_to_so_read_only_ones_are_refused(scene: Scene) -> None:
    keys, values = np.zeros((2, 8192), np.uint8)
    values.flags.writeable = False
    with pytest.raises(TypeError, match="set_staging"):
        scene.store.set_staging(0, keys, values, 1, "f32")
    scene.store.set_staging(0, keys, keys, 1, "f32")


def test_nothing_captured_is_nothing(scene: Scene) -> None:
    seq = scene.store.create(capture_rows=4)
    for owner in (seq, scene.full):
        q, positions = scene.store.captured(owner, 0)
        assert q.shape == (0, 128)
        assert positions.shape == (0,)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("layers", {"layers": []}),
        ("num_heads", {"layers": [(3, 2, 32, 0, 1.0)]}),
        ("num_heads", {"layers": [(0, 1, 32, 0, 1.0)]}),
        ("num_kv_heads", {"layers": [(4, 0, 32, 0, 1.0)]}),
        ("head_size", {"layers": [(4, 2, 40, 0, 1.0)]}),
        ("head_size", {"layers": [(4, 2, 272, 0, 1.0)]}),
        ("head_size", {"layers": [(4, 2, 0, 0, 1.0)]}),
        ("window", {"layers": [(4, 2, 32, -1, 1.0)]}),
        ("scale", {"layers": [(4, 2, 32, 0, float("nan"))]}),
        ("key", {"key": "u3"}),
        ("value", {"value": "int8"}),
        ("recent", {"recent": "u8"}),
        ("recent_tokens", {"recent_tokens": -1}),
        ("group_size", {"group_size": 0}),
        ("group_size", {"group_size": 24}),
        ("max_bytes", {"max_bytes": -1}),
    ],
)
def test_bad_configs_name_the_field(field: str, options: dict[str, Any]) -> None:
    given = {"layers": [layer()], **DEFAULTS, **options}
    with pytest.raises(ValueError, match=rf"^{field} must .*, got "):
        native.Store(**given)


@pytest.mark.parametrize(
    ("field", "args"),
    [
        ("key", ("q8", "u8", 16, f32(4, 32), f32(4, 32))),
        ("value", ("u8", "", 16, f32(4, 32), f32(4, 32))),
        ("group_size", ("u8", "u8", 24, f32(4, 32), f32(4, 32))),
        ("group_size", ("u8", "u8", 64, f32(4, 32), f32(4, 32))),
        ("k", ("u8", "u8", 16, f32(33, 32), f32(33, 32))),
        ("v", ("u8", "u8", 16, f32(4, 32), f32(3, 32))),
        ("v", ("u8", "u8", 16, f32(4, 32), f32(4, 16))),
        ("k", ("u8", "u8", 16, f32(4, 64)[:, ::2], f32(4, 32))),
        ("head_size", ("u8", "u8", 16, f32(4, 24), f32(4, 24))),
    ],
)
def test_bad_tiles_name_the_field(field: str, args: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=rf"(?s)^{field} must .*, got "):
        native.encode_decode(*args)
