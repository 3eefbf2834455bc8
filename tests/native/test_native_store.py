"""The compressed store: it holds what the reference store holds, to the byte, whatever is done with it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from covering import covering, examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from native_stores import (
    DEFAULTS,
    PRECISIONS,
    Array,
    Cache,
    flat,
    gaussian,
    keys_values,
    layer,
    names_of,
    require_native,
    some_ladders,
    some_precisions,
)

from ov_kvcrush import native
from reference import codec as reference
from reference.codec import MAX_GAP
from reference.store import ReferenceStore, Tiers

MAX_SEQUENCES = 5
FLOATS = ["f32", "bf16", "f16"]


@pytest.fixture(autouse=True)
def _native() -> None:
    require_native()


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
        recall=st.sampled_from([0, 0, 64, 0.1]),
        seed=st.integers(0, 2**32 - 1),
    )
    def begin(
        self, precisions: tuple[str, str, str], recent_tokens: int, max_bytes: int, n: int, recall: float, seed: int
    ) -> None:
        key, value, recent = precisions
        options = {
            "key": key,
            "value": value,
            "recent": recent,
            "recent_tokens": recent_tokens,
            "max_bytes": max_bytes,
            "recall_tokens": recall,
        }
        shapes = [layer(4, 2, 32), layer(2, 1, 48), *([layer(1, 1, 16, window=50)] if recall else [])]
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

    def some_precisions(self, given: bool) -> tuple[Array, Any] | tuple[None, None]:
        """Precisions for both stores, or none."""
        if not given:
            return None, None
        precisions = some_precisions(self.rng, self.cache.num_heads)
        return precisions, names_of(precisions)

    def some_wanted(self, own: str, kept: list[Array] | None) -> tuple[dict[str, Any], Any, Tiers | None]:
        """What the native store is to be given, and the precisions and the tiers for the reference."""
        if own == "tiers" and kept is not None:
            mine, tiers = self.some_tiers(kept)
            return mine, None, tiers
        pairs, names = self.some_precisions(own == "precisions")
        return {"precisions": pairs}, names, None

    def some_tiers(self, kept: list[Array]) -> tuple[dict[str, Any], Tiers]:
        """Tiers of these tokens, as each store takes them."""
        num_tiers = int(self.rng.integers(1, 5))
        ladders = some_ladders(self.rng, self.cache.num_heads, num_tiers)
        runs = [np.repeat(self.rng.integers(0, num_tiers, len(x) // 32 + 1), 32)[: len(x)] for x in kept]
        of = [np.where(self.rng.random(len(x)) < 0.1, 0, x).astype(np.uint8) for x in runs]
        tiers = Tiers([names_of(ladder) for ladder in ladders], of)
        return {"precisions": ladders, "tiers": np.concatenate(of)}, tiers

    @precondition(lambda self: len(self.twins) < MAX_SEQUENCES)
    @rule(n=st.integers(0, 120), settle=st.booleans(), own=st.booleans())
    def create(self, n: int, settle: bool, own: bool = False) -> None:
        mine, theirs = self.some_precisions(own)
        self.twins.append(Twin(self.mine.create(precisions=mine), self.theirs.create(theirs)))
        if n:
            self.append(len(self.twins) - 1, n, gap=0, settle=settle)

    @precondition(lambda self: self.twins)
    @rule(which=st.integers(0, 99))
    def set_precisions(self, which: int) -> None:
        mine, theirs = self.some_precisions(True)
        self.mine.set_precisions(self.pick(which).mine, mine)
        self.theirs.set_precisions(self.pick(which).theirs, theirs)  # type: ignore[arg-type]

    @precondition(lambda self: self.twins)
    @rule(which=st.integers(0, 99))
    def release(self, which: int) -> None:
        twin = self.pick(which)
        self.mine.release(twin.mine)
        self.theirs.release(twin.theirs)
        self.twins.remove(twin)

    @precondition(lambda self: self.twins)
    @rule(which=st.integers(0, 99), n=st.integers(0, 80), promised=st.sampled_from([0, 0, 10_000, 10**9]))
    def reserve(self, which: int, n: int, promised: int) -> None:
        twin = self.pick(which)
        done = self.mine.reserve(twin.mine, n, promised)
        assert done == self.theirs.reserve(twin.theirs, n, promised)
        if done and n:
            assert self.mine.free_slots(twin.mine) >= n

    @precondition(lambda self: self.twins)
    @rule(
        which=st.integers(0, 99),
        n=st.integers(1, 120),
        gap=st.sampled_from([0, 0, 0, 7, MAX_GAP - 1, MAX_GAP, -3]),
        settle=st.booleans(),
    )
    def append(self, which: int, n: int, gap: int, settle: bool) -> None:
        """To all layers where there is room, else to none. gap: positions left out; negative: taken a second time."""
        twin = self.pick(which)
        if not self.mine.reserve(twin.mine, n):
            assert not self.theirs.reserve(twin.theirs, n)
            return
        assert self.theirs.reserve(twin.theirs, n)
        position = max(0, self.theirs.next_position(twin.theirs) + gap)
        for index, shape in enumerate(self.theirs.layers):
            k, v = keys_values(self.rng, n, shape.num_kv_heads * shape.head_size)
            mine = outcome(lambda: self.mine.append(twin.mine, index, k, v, position))  # noqa: B023
            assert mine == outcome(lambda: self.theirs.append(twin.theirs, index, k, v, position))  # noqa: B023
            if mine == "full":  # a gap needs bytes that were not reserved
                return
        if settle:
            self.quantize_aged(which)

    @precondition(lambda self: self.twins)
    @rule(which=st.integers(0, 99), n=st.integers(0, 70))
    def crop(self, which: int, n: int) -> None:
        twin = self.pick(which)
        end = max(0, self.theirs.next_position(twin.theirs) - n)
        mine = outcome(lambda: self.mine.crop(twin.mine, end))
        assert mine == outcome(lambda: self.theirs.crop(twin.theirs, end))

    @precondition(lambda self: self.twins)
    @rule(which=st.integers(0, 99))
    def quantize_aged(self, which: int) -> None:
        """Which tiles wait when not all fit is left to the store: from there on the two would go separate ways."""
        twin = self.pick(which)
        self.mine.quantize_aged(twin.mine)
        if not self.theirs.quantize_aged(twin.theirs):
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
        n=st.integers(1, 300),
        staged_as=st.sampled_from(FLOATS),
        density=st.none() | st.floats(0, 1),
        promised=st.sampled_from([0, 0, 10_000]),
        reserved=st.booleans(),
        own=st.sampled_from(["", "precisions", "tiers"]),
    )
    def commit_prefill(
        self, n: int, staged_as: str, density: float | None, promised: int, reserved: bool, own: str
    ) -> None:
        twin = Twin(self.mine.create(), self.theirs.create())
        self.twins.append(twin)
        prompt = [keys_values(self.rng, n, s.num_kv_heads * s.head_size) for s in self.theirs.layers]
        if reserved:
            assert self.mine.reserve(twin.mine, 10) == self.theirs.reserve(twin.theirs, 10)
        self.cache.attach_prefill(twin.mine, prompt, staged_as)
        rounded = [tuple(reference.to_float(x, staged_as) for x in tokens) for tokens in prompt]
        self.theirs.attach_prefill(twin.theirs, rounded)  # type: ignore[arg-type]
        kept = None if density is None else [self.some(n, density) for _ in self.num_tokens(twin)]
        offsets, indices = (None, None) if kept is None else flat(kept)
        mine_own, names, tiers = self.some_wanted(own, kept)
        mine = outcome(lambda: self.mine.commit_prefill(twin.mine, offsets, indices, promised, **mine_own))
        assert mine == outcome(lambda: self.theirs.commit_prefill(twin.theirs, kept, promised, names, tiers))
        if mine == "full":  # still staged: it can only be left
            self.release(len(self.twins) - 1)

    @precondition(lambda self: self.twins)
    @rule(
        which=st.integers(0, 99),
        density=st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0, 1.0]),
        own=st.sampled_from(["", "precisions", "tiers"]),
    )
    def compact(self, which: int, density: float, own: str) -> None:
        twin = self.pick(which)
        kept = [self.some(n, density) if density < 1 else np.arange(n) for n in self.num_tokens(twin)]
        mine_own, names, tiers = self.some_wanted(own, kept)
        mine = outcome(lambda: self.mine.compact(twin.mine, *flat(kept), **mine_own))
        np.testing.assert_array_equal(mine, outcome(lambda: self.theirs.compact(twin.theirs, kept, names, tiers)))

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
            assert names_of(self.mine.precisions(twin.mine)) == self.theirs.precisions(twin.theirs)
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
TestStores.settings = settings(max_examples=examples(120), stateful_step_count=25, deadline=None)


# -- tokens that are taken back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", FLOATS)
@pytest.mark.parametrize("far", [0, MAX_GAP + 3])
def test_tokens_that_are_taken_back_leave_no_trace(precision: str, far: int) -> None:
    """Bytes and positions, and what is appended afterwards, are those of a store that never had them."""
    for before, wrong in ((1, 3), (29, 6), (31, 1), (32, 5), (64, 40)):
        found = []
        for is_misled in (False, True):
            rng = np.random.default_rng(before)
            cache = Cache(layer(), recent=precision, recent_tokens=200)
            store, begin = cache.store, before + far
            seq = cache.new(rng, before)
            if is_misled:
                cache.append(seq, np.random.default_rng(99), wrong, begin)
                store.crop(seq, before)
            now = [*store.dump(seq), store.positions(seq, 0, 1), np.array([store.nbytes, store.free_slots(seq)])]
            cache.append(seq, rng, 7, begin)
            found.append([*now, *store.dump(seq), store.attend(0, [(seq, 0, 1, begin + 7)], gaussian(rng, 1, 128))])
        for mine, theirs in zip(*found, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_what_has_settled_or_is_shared_is_not_taken_back() -> None:
    cache = Cache(layer())
    store = cache.store
    seq = cache.new(np.random.default_rng(0), 100)  # two tiles have settled
    before = store.dump(seq)
    for num_tokens in (0, 63, -1):
        with pytest.raises(ValueError, match="num_tokens must be"):
            store.crop(seq, num_tokens)
    twin = store.fork(seq)
    with pytest.raises(ValueError, match="shared"):
        store.crop(seq, 99)
    store.crop(seq, 100)
    for got, wanted in zip(store.dump(seq), before, strict=True):
        np.testing.assert_array_equal(got, wanted)
    store.release(twin)
    store.crop(seq, 64)
    np.testing.assert_array_equal(store.positions(seq, 0, 0), np.arange(64))


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


def test_bytes_of_sequences_together_count_what_they_share_once() -> None:
    """Random forks that grow: the union is that of the tiles, and what a release frees is what was said."""
    rng = np.random.default_rng(3)
    cache = Cache(layer(), layer(2, 1, 48))
    store = cache.store
    seqs = [cache.new(rng, 200), cache.new(rng, 77)]
    seqs += [store.fork(seqs[0]), store.fork(seqs[0], 130), store.fork(seqs[1])]
    for seq in seqs[1::2]:
        assert store.reserve(seq, 40)
    assert store.nbytes_of_all(seqs) == store.nbytes_freed_by(seqs) == store.nbytes
    assert store.nbytes_of_all([]) == store.nbytes_freed_by([]) == 0
    assert all(store.nbytes_of_all([seq, seq]) == store.nbytes_of(seq) for seq in seqs)
    assert sum(map(store.nbytes_of, seqs)) > store.nbytes
    while seqs:
        gone = [seqs.pop(int(rng.integers(len(seqs)))) for _ in range(min(2, len(seqs)))]
        before, freed = store.nbytes, store.nbytes_freed_by(gone)
        rest = store.nbytes_of_all(seqs)
        for seq in gone:
            store.release(seq)
        assert store.nbytes == before - freed == rest
    with pytest.raises(ValueError, match="sequence must be"):
        store.nbytes_of_all([gone[0]])


def test_bytes_are_told_while_a_kernel_runs() -> None:
    """It holds the store meanwhile; who asks for the bytes does not wait for it."""
    cache = Cache(layer(4, 2, 64))
    seq, rows, num_told = cache.new(np.random.default_rng(0), 2000), 1024, 0
    before = cache.store.nbytes
    while num_told < 20:
        assert rows < 1 << 17, "the bytes were not told before the kernel had ended"
        q, spans = np.zeros((rows, 4 * 64), np.float32), [(seq, i, 1, 1999) for i in range(rows)]
        kernel = threading.Thread(target=cache.store.attend, args=(0, spans, q))
        kernel.start()
        time.sleep(0.02)
        num_told = 0
        while kernel.is_alive():
            assert cache.store.nbytes == before
            num_told += 1
            time.sleep(0.002)
        rows *= 2


def adopt_all(cache: Cache) -> Callable[[], object]:
    seq = cache.store.create()
    cache.attach_prefill(seq, [keys_values(np.random.default_rng(0), 100, 64)])
    return lambda: cache.store.commit_prefill(seq)


def reserve_new(cache: Cache) -> Callable[[], object]:
    seq = cache.new(np.random.default_rng(0), 40)
    return lambda: cache.store.reserve(seq, 100)


def reserve_shared(cache: Cache) -> Callable[[], object]:
    seq = cache.new(np.random.default_rng(0), 40)
    cache.store.fork(seq)
    return lambda: cache.store.reserve(seq, 1)


def reserve_far_away(cache: Cache) -> Callable[[], object]:
    """The last tile has a far gap already."""
    seq = cache.store.create()
    cache.attach_prefill(seq, [keys_values(np.random.default_rng(0), 40 + 2 * MAX_GAP, 64)])
    cache.store.commit_prefill(seq, *flat([np.append(np.arange(39), 39 + MAX_GAP)] * 2))
    return lambda: cache.store.reserve(seq, 1)


def cut(cache: Cache) -> Callable[[], object]:
    seq = cache.new(np.random.default_rng(0), 100)
    return lambda: cache.store.fork(seq, 50)


def compact_shared(cache: Cache) -> Callable[[], object]:
    seq = cache.new(np.random.default_rng(0), 100)
    cache.store.fork(seq)
    return lambda: cache.store.compact(seq, *flat([np.arange(0, 100, 2)] * 2))


@pytest.mark.parametrize("scene", [adopt_all, reserve_new, reserve_shared, reserve_far_away, cut, compact_shared])
def test_the_limit_is_exact(scene: Callable[[Cache], Callable[[], object]]) -> None:
    """What ends with n bytes is done within n bytes, and with one byte less it is refused and nothing has changed."""
    free = Cache(layer())
    action = scene(free)
    action()
    needed = free.store.nbytes
    enough = Cache(layer(), max_bytes=needed)
    scene(enough)()
    assert enough.store.nbytes == needed
    short = Cache(layer(), max_bytes=needed - 1)
    action = scene(short)
    before = short.store.nbytes
    assert outcome(action) in ("full", False)
    assert short.store.nbytes == before < needed


def test_a_store_that_is_full_says_both_numbers_and_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    cache = Cache(layer(), max_bytes=30_000)
    store = cache.store
    seq = cache.new(rng, 64)
    free = 30_000 - store.nbytes
    before = [*cache.tokens(seq, 0, 0), store.nbytes, store.free_slots(seq)]
    assert not store.reserve(seq, 500)
    assert not store.reserve(seq, 1, promised=free)
    late = store.create()
    cache.attach_prefill(late, [keys_values(rng, 500, 64)])
    with pytest.raises(native.StoreFull, match="30000") as error:
        store.commit_prefill(late)
    assert str(store.bytes_for(500)) in str(error.value)
    assert store.num_tokens(late, 0, 0) == 0
    for was, now in zip(before, [*cache.tokens(seq, 0, 0), store.nbytes, store.free_slots(seq)], strict=True):
        np.testing.assert_array_equal(was, now)
    # What was staged is still there: a part of it fits.
    store.commit_prefill(late, *flat([np.arange(0, 500, 20)] * 2))
    assert store.num_tokens(late, 0, 1) == 25
    with pytest.raises(MemoryError):
        raise native.StoreFull("a kind of MemoryError")


def test_a_settle_that_does_not_fit_waits() -> None:
    """A shared tile is quantised beside itself: without the bytes for that, a sequence goes on with what it has."""
    shared = ReferenceStore(layers=[layer()], **{**DEFAULTS, "recent_tokens": 1000}).bytes_for(96)
    limit = shared + reference.tile_bytes("u8", "u8", 32, 32)
    cache = Cache(layer(), max_bytes=limit)
    store = cache.store
    seq = cache.new(np.random.default_rng(0), 96, settle=False)
    twin = store.fork(seq)
    before = [cache.tokens(s, 0, h) for s in (twin, seq) for h in range(2)]
    store.quantize_aged(seq)
    assert store.nbytes == limit  # one of four tiles
    after = [cache.tokens(s, 0, h) for s in (twin, seq) for h in range(2)]
    for (k, v, positions), (new_k, new_v, new_positions) in zip(before, after, strict=True):
        np.testing.assert_array_equal(positions, new_positions)
        np.testing.assert_allclose(new_k, k, atol=0.05)
        np.testing.assert_allclose(new_v, v, atol=0.05)
    for x, y in zip(before[0], after[0], strict=True):
        np.testing.assert_array_equal(x, y)
    store.release(twin)
    store.quantize_aged(seq)
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
            store.quantize_aged(seqs[-1])
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


@pytest.mark.parametrize(
    ("num_tokens", "change"), covering([1, 31, 32, 33, 64, 100], ["append", "settle", "compact", "release"])
)
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
            store.quantize_aged(changed)
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


def test_no_rows_are_no_change() -> None:
    cache = Cache(layer(4, 2, 32))
    seq = cache.new(np.random.default_rng(0), 40)
    none, before = np.zeros((0, 64), np.float32), cache.tokens(seq, 0, 0)
    cache.store.append(seq, 0, none, none, 40)
    assert cache.store.attend(0, [], np.zeros((0, 128), np.float32)).shape == (0, 128)
    for was, now in zip(before, cache.tokens(seq, 0, 0), strict=True):
        np.testing.assert_array_equal(was, now)


def test_threads_share_a_store() -> None:
    """Several threads work on sequences of their own: each finds what it would find alone."""

    def life(cache: Cache, seed: int) -> list[Array]:
        rng = np.random.default_rng(seed)
        seen: list[Array] = []
        seq = cache.new(rng, 50 + seed)
        for position in range(50 + seed, 90 + seed):
            cache.append(seq, rng, 1, position)
            cache.store.quantize_aged(seq)
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
