"""Stop strings over a token stream equal a search in the whole text, wherever tokens are cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ov_kvcrush.core.stop_strings import StopStringTracker


class ByteTokenizer:
    """One token per piece of UTF-8 bytes: pieces may cut characters, as byte-level tokenizers do."""

    def __init__(self, text: str, cuts: list[int], errors: str = "ignore") -> None:
        self.errors = errors
        data = text.encode()
        borders = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
        self.pieces = [data[a:b] for a, b in itertools.pairwise(borders)]

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.pieces[i] for i in ids).decode(errors=self.errors)


TEXT = st.text(alphabet="abé€😀 ", max_size=30)


@pytest.mark.parametrize("errors", ["ignore", "replace"])
@given(
    TEXT,
    st.lists(st.integers(0, 200)),
    st.lists(st.text(alphabet="abé€😀 ", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_match_equals_search_in_the_text(errors: str, text: str, cuts: list[int], stops: list[str]) -> None:
    tokenizer = ByteTokenizer(text, cuts, errors)
    tracker = StopStringTracker(stops, tokenizer.decode)
    shown = 0
    for token in range(len(tokenizer.pieces)):
        matched = tracker.add(token)
        # What was safe to show stays right.
        assert tracker.safe_length >= shown
        shown = tracker.safe_length
        assert tracker.text[:shown] == text[:shown]
        assert not any(stop in tracker.text[:shown] for stop in stops)
        if matched:
            break
    prefix = tracker.text
    if any(stop in text for stop in stops):
        assert tracker.match is not None
        begin, end = tracker.match
        assert prefix[begin:end] in stops
        assert begin == min(prefix.find(s) for s in stops if s in prefix)
    else:
        assert tracker.match is None
        assert prefix == text


class RawTokenizer:
    """Tokens of any bytes, also such as are no UTF-8; it counts the tokens it decodes."""

    def __init__(self, pieces: list[bytes], errors: str) -> None:
        self.pieces, self.errors, self.num_decoded = pieces, errors, 0

    def decode(self, ids: list[int]) -> str:
        self.num_decoded += len(ids)
        return b"".join(self.pieces[i] for i in ids).decode(errors=self.errors)


PIECES = [b"\xf0", b"\x9f", b"\x98\x80", b"\x9f\xf0", b"\x80", b"a", "é".encode(), b"st", b"op", b"", b"\xe2\x82"]
RUN = st.lists(
    st.sampled_from([b"\x80", b"\xf0", b"\x9f\xf0", b"\xf0\x9f", b"\xe2\x82", b"\xff"]), min_size=1, max_size=3
)


@pytest.mark.parametrize("errors", ["ignore", "replace"])
@given(st.lists(st.sampled_from(PIECES), max_size=8), RUN, st.integers(1, 90), st.lists(st.sampled_from(PIECES)))
def test_long_runs_without_a_character_match_as_the_whole(
    errors: str, before: list[bytes], run: list[bytes], repeats: int, after: list[bytes]
) -> None:
    pieces = [*before, *run * repeats, *after, b"stop", b"!"]
    tokenizer = RawTokenizer(pieces, errors)
    tracker = StopStringTracker(["stop", "\ufffdst", "a\ufffd"], tokenizer.decode)
    for token in range(len(pieces)):
        matched = tracker.add(token)
        whole = tokenizer.decode(list(range(token + 1)))
        assert whole.startswith(tracker.text)
        # What ends with half a character waits for its end.
        is_whole = errors == "ignore" or not whole.endswith("\ufffd")
        found = is_whole and any(stop in whole for stop in ("stop", "\ufffdst", "a\ufffd"))
        assert matched or not found
        if matched:
            assert tracker.match is not None
            assert tracker.match[0] == min(i for s in ("stop", "\ufffdst", "a\ufffd") if (i := whole.find(s)) >= 0)
            return
    raise AssertionError("the last stop string was not found")


@pytest.mark.parametrize("piece", [b"\x80", b"\xf0\x9f", b"\x9f\xf0", b""])
@pytest.mark.parametrize("errors", ["ignore", "replace"])
def test_the_cost_of_a_token_does_not_grow_with_a_run_without_a_character(errors: str, piece: bytes) -> None:
    tokenizer = RawTokenizer([piece] * 2000, errors)
    tracker = StopStringTracker(["stop"], tokenizer.decode)
    for token in range(2000):
        tracker.add(token)
    assert tokenizer.num_decoded <= 2000 * 64


def test_tokens_within_a_length() -> None:
    tokenizer = ByteTokenizer("one two stop", [3, 7, 9])
    tracker = StopStringTracker(["stop"], tokenizer.decode)
    assert [tracker.add(i) for i in range(4)] == [False, False, False, True]
    assert tracker.match == (8, 12)
    assert tracker.text[:8] == "one two "
    assert tracker.num_tokens_within(8) == 3, "the third token, ' s', begins within the answer"
    assert tracker.num_tokens_within(0) == 0
