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


def test_tokens_within_a_length() -> None:
    tokenizer = ByteTokenizer("one two stop", [3, 7, 9])
    tracker = StopStringTracker(["stop"], tokenizer.decode)
    assert [tracker.add(i) for i in range(4)] == [False, False, False, True]
    assert tracker.match == (8, 12)
    assert tracker.text[:8] == "one two "
    assert tracker.num_tokens_within(8) == 3, "the third token, ' s', begins within the answer"
    assert tracker.num_tokens_within(0) == 0
