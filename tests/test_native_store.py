"""The compressed store: it holds what the reference store holds, to the byte, and bad input changes nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from native_stores import DEFAULTS, PRECISIONS, Array, Cache, gaussian, keys_values, layer, require_native

from ov_kvcrush import native
from ov_kvcrush.native import reference
from ov_kvcrush.native.reference_store import ReferenceStore

MAX_SEQUENCES = 5
FLOATS = ["f32", "bf16", "f16"]


@pytest.fixture(autouse=True)
def _native() -> None:
    require_native()


def flat(kept: list[Array]) -> tuple[Array, Array]:
    """A selection as the native store takes it: offsets of the heads and indices."""
    return np.cumsum([0, *map(len, kept)]).astype(np.int64), np.concatenate(kept).astype(np.int32)


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or the kind of its refusal."""
    try:
        return call()
    except MemoryError:
        return "full"
    except ValueError:
        return "refused"


# -- the same operations on both stores --------------------------------------------------------------------------------


@dataclass
class Twin:
    """A sequence in both stores."""

    mine: int
    theirs: int


class Stores(RuleBasedStateMachine):
    """Random operations on the native store and the reference: whoever reads them can not tell them apart."""

    @initialize(
        precisions=st.tuples(*[st.sampled_from(PRECISIONS)] * 2, st.sampled_from(FLOATS)),
        recent_tokens=st.sampled_from([0, 1, 32, 40, 64]),
        max_bytes=st.sampled_from([0, 0, 150_000, 300_000]),
        n=st.sampled_from([1, 100, 200]),
        seed=st.integers(0, 2**32 - 1),
    )
    def begin(self, precisions: tuple[str, str, str], recent_tokens: int, max_bytes: int, n: int, seed: int) -> None:
        key, value, recent = precisions
        options = {"key": key, "value": value, "recent": recent, "recent_tokens": recent_tokens, "max_bytes": max_bytes}
        shapes = [layer(4, 2, 32), layer(2, 1, 48)]
        self.cache = Cache(*shapes, **options)
        self.mine = self.cache.store
        self.theirs = ReferenceStore(layers=shapes, **{**DEFAULTS, **options})
        self.max_bytes = max_bytes
        self.rng = np.random.default_rng(seed)
        self.twins: list[Twin] = []
        self.create(n, settle=True)

    def pick(self, which: int) -> Twin:
        return self.twins[which % len(self.twins)]

    def num_tokens(self, twin: Twin) -> list[int]:
        return [
            len(self.theirs.tokens(twin.theirs, index, head)[2])
            for index, shape in enumerate(self.theirs.layers)
            for head in range(shape.num_kv_heads)
        ]

    def some(self, num_tokens: int, density: float) -> Array:
        """Indices to keep: whole tiles and single ones."""
        runs = np.repeat(self.rng.random(num_tokens // 32 + 1) < density, 32)[:num_tokens]
        return np.flatnonzero(runs ^ (self.rng.random(num_tokens) < 0.01))

    @precondition(lambda self: len(self.twins) < MAX_SEQUENCES)
    @rule(n=st.integers(0, 120), settle=st.booleans())
    def create(self, n: int, settle: bool) -> None:
        self.twins.append(Twin(self.mine.create(), self.theirs.create()))
        if n:
            self.append(len(self.twins) - 1, n, gap=0, settle=settle)

    @precondition(lambda self: self.twins)
    @rule(which=st.integers(0, 99))
    def release(self, which: int) -> None:
        twin = self.pick(which)
        self.mine.release(twin.mine)
        self.theirs.release(twin.theirs)
        self.twins.remove(twin)

    @precondition(lambda self: self.twins)
    @rule(which=st.integers(0, 99), n=st.integers(0, 80), keep_free=st.sampled_from([0, 0, 10_000, 10**9]))
    def reserve(self, which: int, n: int, keep_free: int) -> None:
        twin = self.pick(which)
        done = self.mine.reserve(twin.mine, n, keep_free)
        assert done == self.theirs.reserve(twin.theirs, n, keep_free)
        if done and n:
            assert self.mine.free_slots(twin.mine) >= n

    @precondition(lambda self: self.twins)
    @rule(which=st.integers(0, 99), n=st.integers(1, 120), gap=st.sampled_from([0, 0, 0, 7]), settle=st.booleans())
    def append(self, which: int, n: int, gap: int, settle: bool) -> None:
        """To all layers where there is room, else to none."""
        twin = self.pick(which)
        if not self.mine.reserve(twin.mine, n):
            assert not self.theirs.reserve(twin.theirs, n)
            return
        assert self.theirs.reserve(twin.theirs, n)
        position = self.theirs.next_position(twin.theirs) + gap
        for index, shape in enumerate(self.theirs.layers):
            k, v = keys_values(self.rng, n, shape.num_kv_heads * shape.head_size)
            mine = outcome(lambda: self.mine.append(twin.mine, index, k, v, position))  # noqa: B023
            assert mine == outcome(lambda: self.theirs.append(twin.theirs, index, k, v, position))  # noqa: B023
            if mine == "full":  # a gap needs bytes that were not reserved
                return
        if settle:
            self.settle(which)

    @precondition(lambda self: self.twins)
    @rule(which=st.integers(0, 99))
    def settle(self, which: int) -> None:
        """Which tiles wait when not all fit is left to the store: from there on the two would go separate ways."""
        twin = self.pick(which)
        self.mine.settle(twin.mine)
        if not self.theirs.settle(twin.theirs):
            assert self.mine.nbytes <= self.max_bytes
            self.release(which)

    @precondition(lambda self: self.twins and len(self.twins) < MAX_SEQUENCES)
    @rule(which=st.integers(0, 99), part=st.none() | st.floats(0, 1.1))
    def fork(self, which: int, part: float | None) -> None:
        twin = self.pick(which)
        cut = None if part is None else round(part * min(self.num_tokens(twin)))
        made = Twin(
            outcome(lambda: self.mine.fork(twin.mine, cut)), outcome(lambda: self.theirs.fork(twin.theirs, cut))
        )
        if isinstance(made.mine, str) or isinstance(made.theirs, str):
            assert made.mine == made.theirs
        else:
            self.twins.append(made)

    @precondition(lambda self: len(self.twins) < MAX_SEQUENCES)
    @rule(
        n=st.integers(1, 150),
        staged_as=st.sampled_from(FLOATS),
        density=st.none() | st.floats(0, 1),
        keep_free=st.sampled_from([0, 0, 10_000]),
        reserved=st.booleans(),
    )
    def adopt(self, n: int, staged_as: str, density: float | None, keep_free: int, reserved: bool) -> None:
        twin = Twin(self.mine.create(), self.theirs.create())
        self.twins.append(twin)
        prompt = [keys_values(self.rng, n, s.num_kv_heads * s.head_size) for s in self.theirs.layers]
        if reserved:
            assert self.mine.reserve(twin.mine, 10) == self.theirs.reserve(twin.theirs, 10)
        self.cache.stage(twin.mine, prompt, staged_as)
        rounded = [tuple(reference.to_float(x, staged_as) for x in tokens) for tokens in prompt]
        self.theirs.stage(twin.theirs, rounded)  # type: ignore[arg-type]
        kept = None if density is None else [self.some(n, density) for _ in self.num_tokens(twin)]
        selection = () if kept is None else flat(kept)
        mine = outcome(lambda: self.mine.adopt(twin.mine, *selection, keep_free=keep_free))
        assert mine == outcome(lambda: self.theirs.adopt(twin.theirs, kept, keep_free))
        if mine == "full":  # still staged: it can only be left
            self.release(len(self.twins) - 1)

    @precondition(lambda self: self.twins)
    @rule(which=st.integers(0, 99), density=st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]))
    def compact(self, which: int, density: float) -> None:
        twin = self.pick(which)
        kept = [self.some(n, density) if density < 1 else np.arange(n) for n in self.num_tokens(twin)]
        mine = outcome(lambda: self.mine.compact(twin.mine, *flat(kept)))
        np.testing.assert_array_equal(mine, outcome(lambda: self.theirs.compact(twin.theirs, kept)))

    @invariant()
    def both_hold_the_same(self) -> None:
        if not hasattr(self, "mine"):
            return
        assert self.mine.nbytes == self.theirs.nbytes
        assert self.mine.nbytes <= (self.max_bytes or self.mine.nbytes)
        assert self.mine.num_sequences == self.theirs.num_sequences
        for twin in self.twins:
            assert self.mine.nbytes_of(twin.mine) == self.theirs.nbytes_of(twin.theirs)
            assert self.mine.free_slots(twin.mine) == self.theirs.free_slots(twin.theirs)
            for index, shape in enumerate(self.theirs.layers):
                for head in range(shape.num_kv_heads):
                    k, v, positions = self.theirs.tokens(twin.theirs, index, head)
                    assert self.mine.num_tokens(twin.mine, index, head) == len(positions)
                    mine = self.cache.tokens(twin.mine, index, head)
                    for got, expected in zip(mine, (k, v, positions), strict=True):
                        np.testing.assert_array_equal(got, expected)

    def teardown(self) -> None:
        if hasattr(self, "mine"):
            while self.twins:
                self.release(0)
            assert self.mine.nbytes == 0
            assert self.mine.num_sequences == 0


TestStores = Stores.TestCase
TestStores.settings = settings(max_examples=120, stateful_step_count=25, deadline=None)


# -- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recent_tokens", [0, 1, 32, 100])
def test_bytes_for_a_number_of_tokens_are_what_it_takes(recent_tokens: int) -> None:
    options = {"key": "u4", "value": "u2", "recent_tokens": recent_tokens, "group_size": 64}
    shapes = [layer(4, 2, 64), layer(3, 3, 96)]
    cache = Cache(*shapes, **options)
    theirs = ReferenceStore(layers=shapes, **{**DEFAULTS, **options})
    for n in [0, 1, 31, 32, 33, 63, 64, 65, 100, 132, 133, 500]:
        before = cache.store.nbytes
        cache.new(np.random.default_rng(0), n)
        assert cache.store.nbytes - before == cache.store.bytes_for(n) == theirs.bytes_for(n)


def test_a_store_that_is_full_says_both_numbers_and_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    cache = Cache(layer(), max_bytes=30_000)
    store = cache.store
    seq = cache.new(rng, 64)
    free = 30_000 - store.nbytes
    before = [*cache.tokens(seq, 0, 0), store.nbytes, store.free_slots(seq)]
    assert not store.reserve(seq, 500)
    assert not store.reserve(seq, 1, keep_free=free)
    late = store.create()
    cache.stage(late, [keys_values(rng, 500, 64)])
    with pytest.raises(native.StoreFull, match="30000") as error:
        store.adopt(late)
    assert str(store.bytes_for(500)) in str(error.value)
    assert store.num_tokens(late, 0, 0) == 0
    for was, now in zip(before, [*cache.tokens(seq, 0, 0), store.nbytes, store.free_slots(seq)], strict=True):
        np.testing.assert_array_equal(was, now)
    # What was staged is still there: a part of it fits.
    store.adopt(late, *flat([np.arange(0, 500, 20)] * 2))
    assert store.num_tokens(late, 0, 1) == 25
    with pytest.raises(MemoryError):
        raise native.StoreFull("a kind of MemoryError")


def test_a_settle_that_does_not_fit_waits() -> None:
    """A shared tile has to be written beside itself: without the bytes for that, a sequence goes on with what it has."""
    shared = ReferenceStore(layers=[layer()], **{**DEFAULTS, "recent_tokens": 1000}).bytes_for(96)
    limit = shared + reference.tile_bytes("u8", "u8", 32, 32)
    cache = Cache(layer(), max_bytes=limit)
    store = cache.store
    seq = cache.new(np.random.default_rng(0), 96, settle=False)
    twin = store.fork(seq)
    before = [cache.tokens(s, 0, h) for s in (twin, seq) for h in range(2)]
    store.settle(seq)
    assert store.nbytes == limit  # one of four tiles
    after = [cache.tokens(s, 0, h) for s in (twin, seq) for h in range(2)]
    for (k, v, positions), (new_k, new_v, new_positions) in zip(before, after, strict=True):
        np.testing.assert_array_equal(positions, new_positions)
        np.testing.assert_allclose(new_k, k, atol=0.05)
        np.testing.assert_allclose(new_v, v, atol=0.05)
    for x, y in zip(before[0], after[0], strict=True):
        np.testing.assert_array_equal(x, y)
    store.release(twin)
    store.settle(seq)
    assert store.nbytes == store.bytes_for(96)


SCRIPT = """
import numpy as np
from ov_kvcrush import native

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

store = native.Store(layers=[(8, 8, 128, 0, 0.1)], key="u8", value="u4", recent="bf16", recent_tokens=32, group_size=32)
x = np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32)

def fill(target):
    seqs = []
    while store.nbytes < target:
        seqs.append(store.create())
        for first in range(0, 8192, 1024):
            store.reserve(seqs[-1], 1024)
            store.append(seqs[-1], 0, x, x, first)
            store.settle(seqs[-1])
    return seqs

for seq in fill(1):  # whatever comes with first use: threads, their stacks
    store.release(seq)
before = resident()
seqs = fill(100_000_000)
held, grown = store.nbytes, resident() - before
assert store.reserved_bytes >= held
for seq in seqs:
    store.release(seq)
print(held, grown, store.nbytes, store.reserved_bytes, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_the_process_is_what_the_store_says_and_goes_back() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    held, grown, left, reserved, kept = map(int, done.stdout.split())
    assert held >= 100_000_000
    assert abs(grown - held) <= 0.1 * held
    assert left == 0
    assert reserved <= 8 << 20
    assert kept <= 0.1 * held


# -- forks and threads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("change", ["append", "settle", "compact", "release"])
def test_a_fork_is_a_copy(num_tokens: int, change: str) -> None:
    """Whatever becomes of one of them, the other stays as it is, bit for bit."""
    rng = np.random.default_rng(num_tokens)
    cache = Cache(layer(4, 2, 32), key="u4", value="u4")
    store = cache.store
    first = cache.new(rng, num_tokens, settle=False)
    second = store.fork(first)
    assert store.nbytes == store.nbytes_of(first) == store.nbytes_of(second)
    q = gaussian(rng, 1, 128)
    for changed, other in ((first, second), (second, store.fork(second))):
        span = [(other, 0, 1, num_tokens)]
        was = [store.attend(0, span, q), *cache.tokens(other, 0, 0), *cache.tokens(other, 0, 1)]
        if change == "append":
            cache.append(changed, rng, 40, num_tokens)
        elif change == "settle":
            store.settle(changed)
        elif change == "compact":
            store.compact(changed, *flat([np.arange(0, num_tokens, 2)] * 2))
        else:
            store.release(changed)
        now = [store.attend(0, span, q), *cache.tokens(other, 0, 0), *cache.tokens(other, 0, 1)]
        for x, y in zip(was, now, strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_cut_fork_forgets_what_came_later() -> None:
    rng = np.random.default_rng(0)
    cache = Cache(layer(4, 2, 32))
    whole = cache.new(rng, 150)
    for n in [0, 1, 31, 32, 33, 96, 149, 150]:
        part = cache.store.fork(whole, n)
        for head in range(2):
            for x, y in zip(cache.tokens(part, 0, head), cache.tokens(whole, 0, head), strict=True):
                expected = reference.to_float(y[:n], "bf16") if x.dtype == np.float32 else y[:n]
                np.testing.assert_allclose(x, expected, rtol=2**-8)
        cache.append(part, rng, 5, n)
        assert cache.store.num_tokens(part, 0, 0) == n + 5


def test_threads_share_a_store() -> None:
    """Several threads work on sequences of their own: each finds what it would find alone."""

    def life(cache: Cache, seed: int) -> list[Array]:
        rng = np.random.default_rng(seed)
        seen: list[Array] = []
        seq = cache.new(rng, 50 + seed)
        for position in range(50 + seed, 90 + seed):
            cache.append(seq, rng, 1, position)
            cache.store.settle(seq)
            seen.append(cache.store.attend(0, [(seq, 0, 1, position)], gaussian(rng, 1, 128)))
        twin = cache.store.fork(seq)
        cache.store.release(seq)
        cache.store.compact(twin, *flat([np.arange(0, 80, 3)] * 2))
        seen.append(cache.store.scores(twin, 0, gaussian(rng, 2, 128), np.array([80, 90], np.int32), "mean"))
        cache.store.release(twin)
        return seen

    shared = Cache(layer(4, 2, 32))
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(lambda seed: life(shared, seed), range(12)))
    assert shared.store.nbytes == 0
    for seed, seen in enumerate(got):
        for mine, alone in zip(seen, life(Cache(layer(4, 2, 32)), seed), strict=True):
            np.testing.assert_array_equal(mine, alone)


def test_stores_have_ids_of_their_own_and_close() -> None:
    first, second = Cache(layer()).store, Cache(layer()).store
    ids = {first.id, second.id}
    assert len(ids) == 2
    first.close()
    first.close()
    with pytest.raises(ValueError, match="store must be open"):
        first.create()
    assert Cache(layer()).store.id not in ids
    assert second.create()


# -- bad input ---------------------------------------------------------------------------------------------------------


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
    cache.stage(staged, [keys_values(rng, 20, 64)])
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
    "settle": lambda s: s.store.settle(s.gone),
    "stage": lambda s: s.store.stage(s.gone, i32(0), 1),
    "adopt": lambda s: s.store.adopt(s.gone),
    "compact": lambda s: s.store.compact(s.gone, i64(0, 0, 0), i32()),
    "append": lambda s: s.store.append(s.gone, 0, f32(1, 64), f32(1, 64), 0),
    "attend": lambda s: s.store.attend(0, [(s.full, 0, 1, 39), (s.gone, 1, 1, 0)], f32(2, 128)),
    "scores": lambda s: s.store.scores(s.gone, 0, f32(1, 128), i32(0), "mean"),
    "captured": lambda s: s.store.captured(s.gone, 0),
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
    ("negative keep_free", "keep_free", lambda s: s.store.reserve(s.full, 1, -1)),
    ("negative cut", "num_tokens", lambda s: s.store.fork(s.full, -1)),
    ("cut behind the end", "num_tokens", lambda s: s.store.fork(s.full, 41)),
    ("fork of a staged one", "seq", lambda s: s.store.fork(s.staged)),
    ("negative bytes_for", "num_tokens", lambda s: s.store.bytes_for(-1)),
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
    ("block that is not there", "blocks", lambda s: s.store.stage(s.empty, i32(3), 1)),
    ("negative block", "blocks", lambda s: s.store.stage(s.empty, i32(-1), 1)),
    ("more tokens than blocks", "num_tokens", lambda s: s.store.stage(s.empty, i32(0), 33)),
    ("negative staged tokens", "num_tokens", lambda s: s.store.stage(s.empty, i32(0), -1)),
    ("blocks of int64", "blocks", lambda s: s.store.stage(s.empty, i64(0), 1)),
    ("blocks in two dimensions", "blocks", lambda s: s.store.stage(s.empty, i32(0).reshape(1, 1), 1)),
    ("staging of a full one", "seq", lambda s: s.store.stage(s.full, i32(0), 1)),
    ("adopt without a prompt", "seq", lambda s: s.store.adopt(s.empty)),
    ("adopt into tokens", "seq", lambda s: s.store.adopt(s.full)),
    ("offsets without indices", "offsets", lambda s: s.store.adopt(s.staged, i64(0, 1, 2))),
    ("indices without offsets", "offsets", lambda s: s.store.adopt(s.staged, None, i32(0, 1))),
    ("negative keep_free of adopt", "keep_free", lambda s: s.store.adopt(s.staged, keep_free=-1)),
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
    refused(scene, field, lambda s: s.store.adopt(s.staged, offsets, indices))


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
    with pytest.raises(ValueError, match="^seq"):
        store.append(scene.staged, 0, f32(1, 64), f32(1, 64), 0)


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
    with pytest.raises(ValueError, match=re.compile(f"^{field} must .*, got ", re.DOTALL)):
        native.encode_decode(*args)
