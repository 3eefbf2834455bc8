"""Positions of kept tokens: they come back whatever lies between them, and cost bytes only where that is much."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
from covering import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from native_stores import ISAS, Array, Cache, flat, gaussian, layer, require_native

from ov_kvcrush import native
from reference.codec import MAX_GAP, TILE, num_target_tiles

RECENT = 32  # tokens
LENGTH = 12_000  # tokens of a prompt of which some are kept
GAPS = st.sampled_from([*[1] * 12, 2, 17, 254, 255, 256, 257, MAX_GAP - 1, MAX_GAP, MAX_GAP + 1, 3 * MAX_GAP])
TARGET, NEWEST = ("f32", "u4"), ("f32", "f32")


@pytest.fixture(autouse=True)
def _native() -> None:
    require_native()


class Text(Cache):
    """A store of one head with a prompt in its staging blocks. The key of a token is its position."""

    def __init__(self, isa: str = "") -> None:
        codecs = {"key": "f32", "value": "u4", "recent": "f32"}
        super().__init__(layer(1, 1, 16, window=5000), **codecs, recent_tokens=RECENT, group_size=16, isa=isa)
        self.rng = np.random.default_rng(0)
        keys, values = (x.view(np.uint8).reshape(-1) for x in self.rows(np.arange(LENGTH)))
        self.store.set_staging(0, keys, values, LENGTH // TILE, "f32")

    def rows(self, places: Array) -> tuple[Array, Array]:
        """Keys and values (n, 16) of tokens at these places."""
        return np.repeat(places.astype(np.float32)[:, None], 16, axis=1), gaussian(self.rng, len(places), 16)

    def commit_prefill(self, places: Array) -> Line:
        seq = self.store.create()
        self.store.attach_prefill(seq, np.arange(LENGTH // TILE, dtype=np.int32), LENGTH)
        self.store.commit_prefill(seq, *flat([places]))
        return Line(self, seq, places, num_target_tiles(len(places), RECENT))


class Line:
    """A sequence, with what it must hold: positions in the order of its tiles, `num_target` of them settled."""

    def __init__(self, text: Text, seq: int, places: Array, num_target: int) -> None:
        self.text, self.store, self.seq = text, text.store, seq
        self.places, self.num_target = places, num_target
        self.next_position = LENGTH

    def fork(self) -> Line:
        twin = Line(self.text, self.store.fork(self.seq), self.places, self.num_target)
        twin.next_position = self.next_position
        return twin

    def append(self, gaps: list[int]) -> None:
        """Tokens one by one; a gap is counted from the last position that the sequence ever held."""
        for gap in gaps:
            place = self.next_position + gap - 1
            before = self.store.nbytes
            is_near = len(self.places) > 0 and 0 < place - self.places[-1] <= MAX_GAP
            has_room = self.store.free_slots(self.seq) > 0
            assert self.store.reserve(self.seq, 1)
            self.store.append(self.seq, 0, *self.text.rows(np.array([place])), place)
            assert self.store.nbytes == before or not (is_near and has_room)
            self.places = np.append(self.places, place)
            self.next_position = place + 1
        self.store.quantize_aged(self.seq)
        self.num_target = max(self.num_target, num_target_tiles(len(self.places), RECENT))

    def compact(self, kept: Array) -> None:
        whole = sum(np.isin(np.arange(TILE * i, TILE * (i + 1)), kept).all() for i in range(self.num_target))
        if len(kept) < len(self.places):
            self.num_target = max(whole, num_target_tiles(len(kept), RECENT))
        order = self.store.compact(self.seq, *flat([kept]))
        np.testing.assert_array_equal(np.sort(order), kept)
        self.places = self.places[order]

    def num_bytes(self) -> int:
        """What these positions take: 128 more for a tile in which they do not ascend, or are far apart twice."""
        total = 0
        for begin in range(0, len(self.places), TILE):
            gaps = np.diff(self.places[begin : begin + TILE])
            codecs = TARGET if begin // TILE < self.num_target else NEWEST
            total += native.tile_bytes(*codecs, 16, 16) + 128 * bool((gaps < 1).any() or (gaps > 1023).sum() > 1)
        return total

    def check(self) -> None:
        keys, _, places = self.text.tokens(self.seq, 0, 0)
        np.testing.assert_array_equal(places, self.places)
        np.testing.assert_array_equal(keys[:, 0], self.places)
        assert self.store.nbytes_of(self.seq) == self.num_bytes()
        if not len(self.places):
            return
        q = gaussian(self.text.rng, 3, 16) / 1000
        spans = [(self.seq, 0, 3, int(self.places[len(self.places) // 2]))]
        seen = self.store.attend(0, spans, q)
        np.testing.assert_allclose(seen, self.text.attention(0, spans, q), rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module", params=ISAS)
def text(request: pytest.FixtureRequest) -> Text:
    return Text(request.param)


@settings(max_examples=examples(100), deadline=None)
@given(
    gaps=st.lists(GAPS, min_size=1, max_size=200),
    more=st.lists(GAPS, max_size=80),
    share=st.sampled_from([0.3, 0.6, 0.95]),
    runs=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_positions_come_back_and_cost_what_they_must(
    text: Text, gaps: list[int], more: list[int], share: float, runs: bool, seed: int
) -> None:
    """Adopted, forked, appended to, thinned out twice and appended to again; the twin of each stays as it was."""
    rng = np.random.default_rng(seed)

    def some(num_tokens: int) -> Array:
        length = TILE if runs else 1
        return np.flatnonzero(np.repeat(rng.random(num_tokens // length + 1) < share, length)[:num_tokens])

    places = np.array([p - 1 for p in accumulate(gaps) if p <= LENGTH], np.int32)
    lines = [text.commit_prefill(places)]
    for step in range(4):
        lines.append(lines[-1].fork())
        if step % 3 == 0:
            lines[-1].append(more)
        else:
            lines[-1].compact(some(len(lines[-1].places)))
        for line in lines:
            line.check()
    for line in lines:
        line.store.release(line.seq)
    assert text.store.nbytes == 0


def test_most_kept_sets_cost_what_as_many_tokens_cost() -> None:
    text = Text()
    sinks_and_newest = np.concatenate([np.arange(4), np.arange(LENGTH - 100, LENGTH)])
    for places in (sinks_and_newest, *(np.arange(0, LENGTH, step)[:300] for step in (1, 2, 37, MAX_GAP))):
        line = text.commit_prefill(places)
        line.check()
        assert line.store.nbytes_of(line.seq) == line.store.bytes_for(len(places))
        line.store.release(line.seq)
