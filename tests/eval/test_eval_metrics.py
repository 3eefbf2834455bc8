"""Scores equal those of the benchmarks they come from.

The numbers of LongBench are recorded from its metrics.py with rouge 1.0.1 and fuzzywuzzy 0.18.0 as its requirements
install them; those of RULER and SCBench follow from reading scripts/eval/synthetic/constants.py and compute_scores.py.
"""

from __future__ import annotations

import string
import sys
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.benchmarks.items import Metric, Question
from ov_kvcrush.eval.benchmarks.metrics import (
    choice_letter,
    class_match,
    counting,
    edit_similarity,
    first_number,
    lines_in_order,
    qa_f1,
    retrieval,
    rouge_l,
    string_match_all,
    string_match_any,
    substring,
    variable_fraction,
)

CLASSES = (
    "Other location", "Other entity", "Other", "Date", "Individual", "Definition of something",
    "Invention, book and other creative piece",
)  # fmt: skip
# Names that are part of one another, in the order in which the loop that removes them skips one.
NESTED = ("Other", "Other loc", "Other location")

HARBOUR = "The committee will fund a new harbour. The old pier closes in May. Work starts then."

METRICS = {
    metric.__name__: metric
    for metric in (
        qa_f1, rouge_l, class_match, retrieval, counting, edit_similarity, string_match_all, string_match_any,
        substring, choice_letter, first_number, variable_fraction, lines_in_order,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What a metric gives for a prediction."""

    prediction: str
    answer: str
    expected: float


def question(*answers: str, classes: tuple[str, ...] = ()) -> Question:
    return Question("?", answers, 8, classes=classes)


def table(*rows: tuple[str, str, float]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "case", [Case(*row) for row in rows], ids=lambda case: case.prediction[:30] or "empty"
    )


class TestLongBench:
    @table(
        ("The answer is: University of Toronto.", "University of Toronto", 0.7499999999999999),
        ("An apple, a day; the doctor's away!", "apple day doctors", 0.8571428571428571),
        ("5 percent points", "5 percent points.", 1.0),
        ("the the a an", "no", 0.0),
        ("", "no", 0.0),
    )
    def test_qa_f1(self, case: Case) -> None:
        assert qa_f1(case.prediction, question(case.answer)) == case.expected

    @table(
        (
            "The committee agreed to fund the new harbour. Work starts in May, and the old pier will be closed.",
            HARBOUR,
            0.6060606011019284,
        ),
        # Of 5 different words on each side 4 are in the longest common subsequence: f = 0.8, but for the 1e-8.
        ("the cat sat on the mat", "the cat lay on the mat", 1.28 / (1.6 + 1e-8)),
        # Sentences may come in any order, and a word counts once.
        ("c d. a b", "a b. c d", 2 / (2 + 1e-8)),
        ("one two one two one two", "one two", 2 / (2 + 1e-8)),
        ("no overlap here", "something else", 0.0),
        ("", HARBOUR, 0.0),
        ("...", HARBOUR, 0.0),
        (" ", HARBOUR, 0.0),
    )
    def test_rouge_l(self, case: Case) -> None:
        assert rouge_l(case.prediction, question(case.answer)) == pytest.approx(case.expected, abs=1e-15)

    @table(
        ("Individual", "Individual", 1.0),
        ("Definition of something, or Date", "Date", 0.5),
        # "Other" is part of the reference, so it is no second guess.
        ("Other location", "Other location", 1.0),
        ("Other location", "Other", 0.5),
        ("an individual", "Individual", 0.0),
        ("", "Individual", 0.0),
    )
    def test_class_match(self, case: Case) -> None:
        assert class_match(case.prediction, question(case.answer, classes=CLASSES)) == case.expected

    def test_class_match_skips_the_neighbour_of_a_removed_name(self) -> None:
        assert class_match("Other location", question("Other location", classes=NESTED)) == 0.5

    @table(
        ("Paragraph 19", "Paragraph 19", 1.0),
        ("Paragraph 19, not paragraph 2 or 190", "Paragraph 19", 1 / 3),
        ("none", "Paragraph 19", 0.0),
    )
    def test_retrieval(self, case: Case) -> None:
        assert retrieval(case.prediction, question(case.answer)) == case.expected

    def test_retrieval_needs_a_paragraph_to_look_for(self) -> None:
        with pytest.raises(CrushError, match="answer must be 'Paragraph N', got '19'"):
            retrieval("19", question("19"))

    @table(
        ("There are 46 of 50 paragraphs, so 46", "46", 2 / 3),
        ("046", "46", 0.0),
        ("many", "46", 0.0),
    )
    def test_counting(self, case: Case) -> None:
        assert counting(case.prediction, question(case.answer)) == case.expected

    @table(
        (
            "```python\n# a comment\n            if e.text == lang:\n                return",
            "            if e.text == language:",
            0.94,
        ),
        ("\n\nreturn x\n", "return y", 0.88),
        # Where difflib and an edit distance part: with python-Levenshtein or rapidfuzz it is 0.33.
        ("x = foo(bar)", "bar(foo) = x", 0.25),
        ("return y", "return y", 1.0),
        ("# only a comment", "x", 0.0),
        ("", "return y", 0.0),
    )
    def test_edit_similarity(self, case: Case) -> None:
        assert edit_similarity(case.prediction, question(case.answer)) == case.expected

    @pytest.mark.parametrize("metric", [qa_f1, rouge_l, counting, edit_similarity])
    def test_best_reference_counts(self, metric: Metric) -> None:
        alone = metric("46", question("46"))
        assert metric("46", question("none", "46")) == metric("46", question("46", "none")) == alone
        assert alone > metric("46", question("none"))


class TestRuler:
    @table(
        ("They are 12345 and ABC.", "12345", 1.0),
        ("they are abc", "ABC", 1.0),
        ("they are ab\tc", "abc", 0.0),
        ("", "ABC", 0.0),
    )
    def test_one_reference(self, case: Case) -> None:
        for metric in (string_match_all, string_match_any):
            assert metric(case.prediction, question(case.answer)) == case.expected

    def test_all_is_a_share_and_any_is_not(self) -> None:
        wanted = question("one", "two", "three", "four")
        assert string_match_all("Two, then FOUR and three", wanted) == 0.75
        assert string_match_any("Two, then FOUR and three", wanted) == 1.0


class TestSCBench:
    @table(
        ('The value is "a1-b2".', "a1-b2", 1.0),
        ("A1-B2", "a1-b2", 0.0),
        ("a1-b", "a1-b2", 0.0),
    )
    def test_substring(self, case: Case) -> None:
        assert substring(case.prediction, question(case.answer)) == case.expected

    @table(
        (" B", "B", 1.0),
        ("Blue is the answer", "B", 1.0),
        ("A or B", "B", 0.0),
        ("The correct answer is: C.", "C", 1.0),
        ("The correct answer is", "C", 0.0),
        ("I think the option is  D!", "D", 1.0),
        ("it must be (x), so C", "C", 1.0),
        ("none of them", "C", 0.0),
        ("", "C", 0.0),
    )
    def test_choice_letter(self, case: Case) -> None:
        assert choice_letter(case.prediction, question(case.answer)) == case.expected

    @table(
        ("The number is 88.", "88", 1.0),
        ("88.7 or so", "88", 1.0),
        ("7, then 88", "88", 0.0),
        ("1.5", "1.5", 1.0),
        ("1.25", "1.5", 0.0),
        ("none", "88", 0.0),
    )
    def test_first_number(self, case: Case) -> None:
        assert first_number(case.prediction, question(case.answer)) == case.expected

    def test_variable_fraction_is_in_hundredths(self) -> None:
        assert variable_fraction("abc, DEF", question("ABC", "DEF", "GHI")) == 0.67


SPACED = st.text(alphabet=string.ascii_letters + " .", max_size=40)


@given(SPACED, st.sampled_from(sorted(METRICS.keys() - {"retrieval", "first_number"})))
def test_scores_lie_between_0_and_1(prediction: str, name: str) -> None:
    assert 0 <= METRICS[name](prediction, question("A", "Date of a day", classes=CLASSES)) <= 1


@given(st.integers(0, 10**6))
def test_a_reference_scores_full(number: int) -> None:
    for name in METRICS.keys() - {"class_match", "choice_letter", "retrieval"}:
        assert METRICS[name](str(number), question(str(number))) == pytest.approx(1, abs=1e-8)
    assert retrieval(str(number), question(f"Paragraph {number}")) == 1


def test_missing_rouge_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge", None)
    with pytest.raises(CrushError, match=r"rouge must be installed .* `pip install rouge==1\.0\.1`"):
        rouge_l("a", question("b"))
