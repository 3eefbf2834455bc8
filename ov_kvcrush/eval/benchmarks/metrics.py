"""Scores of an answer, 0 to 1: those of LongBench, RULER and SCBench, with their numbers and their quirks; and lines.

Each takes the prediction and its question. Where the original scores one reference, the best of all counts, which is
LongBench's rule.
"""

from __future__ import annotations

import importlib
import re
import string
from collections import Counter
from difflib import SequenceMatcher
from typing import Any

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.benchmarks.items import Question

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CONTROL = re.compile(r"[\x00-\x1f]")
_NUMBER = re.compile(r"\d+\.\d+|\d+")


def qa_f1(prediction: str, question: Question) -> float:
    """F1 over words without case, punctuation and articles (LongBench qa_f1_score, which is SQuAD's)."""
    return max(_f1(_plain_words(prediction), _plain_words(answer)) for answer in question.answers)


def exact_match(prediction: str, question: Question) -> float:
    """1 if the words are a reference's, without case, punctuation and articles (SQuAD's exact match)."""
    words = _plain_words(prediction)
    return float(any(words == _plain_words(answer) for answer in question.answers))


def rouge_l(prediction: str, question: Question) -> float:
    """ROUGE-L F1 of the package rouge 1.0.1 (LongBench rouge_score).

    It cuts at white space and counts each word once; the packages that follow rouge-score cut otherwise and give other
    numbers. Nothing to compare scores 0, and so does a sentence of about a thousand words, too deep for its recursion.
    """
    scorer = _rouge()
    return max(_rouge_l(scorer, prediction, answer) for answer in question.answers)


def class_match(prediction: str, question: Question) -> float:
    """1 / number of class names in the prediction if the reference is among them (LongBench classification_score).

    The list of names is changed while it is walked through, as there: of two neighbours that are part of the
    reference's name, the second one stays and counts.
    """
    return max(_class_match(prediction, answer, question.classes) for answer in question.answers)


def retrieval(prediction: str, question: Question) -> float:
    """Share of the numbers in the prediction that are the N of "Paragraph N" (LongBench retrieval_score)."""
    return max(_share_of_numbers(prediction, _paragraph(answer)) for answer in question.answers)


def counting(prediction: str, question: Question) -> float:
    """Share of the numbers in the prediction that are the reference (LongBench count_score)."""
    return max(_share_of_numbers(prediction, answer) for answer in question.answers)


def edit_similarity(prediction: str, question: Question) -> float:
    """Likeness in hundredths of the first line without `, # or // (LongBench code_sim_score).

    It is fuzzywuzzy's ratio as LongBench's requirements install it, without python-Levenshtein: difflib's. With that
    package, or with rapidfuzz, it is another measure (github.com/THUDM/LongBench/issues/96).
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return max(_likeness(line, answer) for answer in question.answers)


def string_match_all(prediction: str, question: Question) -> float:
    """Share of the references that are in the prediction, whatever the case (RULER string_match_all)."""
    text = _printable(prediction).lower()
    return sum(answer.lower() in text for answer in question.answers) / len(question.answers)


def string_match_any(prediction: str, question: Question) -> float:
    """1 if a reference is in the prediction, whatever the case (RULER string_match_part)."""
    text = _printable(prediction).lower()
    return float(any(answer.lower() in text for answer in question.answers))


def substring(prediction: str, question: Question) -> float:
    """1 if a reference is in the prediction as it is (SCBench kv and prefix_suffix)."""
    return float(any(answer in prediction for answer in question.answers))


def choice_letter(prediction: str, question: Question) -> float:
    """1 if the letter A to D that the prediction settles on is the reference (SCBench choice_eng)."""
    text = prediction.strip()
    if not text:
        return 0.0
    if text[0] in "ABCD":
        return float(text[0] in question.answers)
    if text in question.answers:
        return 1.0
    text = re.sub(" {2,}", " ", re.sub("[\n\"'.,?!{}]", " ", text))
    for opening in ("answer is:", "answer:", "answer is", "option is"):
        if (at := text.find(opening)) >= 0:
            return float(text[at + len(opening) + 1 :].startswith(question.answers))
    letter = next((word for word in text.split() if word in "ABCD"), None)
    return float(letter in question.answers)


def first_number(prediction: str, question: Question) -> float:
    """1 if the first number of the prediction is the reference (SCBench mf, and passkey where no key begins with 0).

    Of a whole reference only the whole part of the prediction has to be equal.
    """
    found = _NUMBER.search(prediction)
    if found is None:
        return 0.0
    number = float(found.group())
    return float(any(_equals(number, answer) for answer in question.answers))


def variable_fraction(prediction: str, question: Question) -> float:
    """Share of the references in the prediction, whatever the case, in hundredths (SCBench vt)."""
    text = prediction.lower()
    return round(sum(answer.lower() in text for answer in question.answers) / len(question.answers), 2)


def lines_in_order(prediction: str, question: Question) -> float:
    """Share of the references that are lines of the prediction, in their order: the longest common subsequence.

    Blank lines, and space around a line, do not count.
    """
    lines = [line.strip() for line in prediction.splitlines() if line.strip()]
    lengths = [0] * (len(lines) + 1)  # of the longest one with the first lines, for the references so far
    for answer in question.answers:
        before = 0
        for place, line in enumerate(lines, 1):
            before, lengths[place] = (
                lengths[place],
                before + 1 if line == answer.strip() else max(lengths[place], lengths[place - 1]),
            )
    return lengths[-1] / len(question.answers)


def _plain_words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def _f1(prediction: list[str], answer: list[str]) -> float:
    common = (Counter(prediction) & Counter(answer)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)


def _rouge() -> Any:
    try:
        return importlib.import_module("rouge").Rouge(metrics=["rouge-l"])
    except ImportError:
        raise CrushError("rouge must be installed to score summaries: run `pip install rouge==1.0.1`") from None


def _rouge_l(scorer: Any, prediction: str, answer: str) -> float:
    try:
        return float(scorer.get_scores([prediction], [answer], avg=True)["rouge-l"]["f"])
    except (ValueError, RecursionError):
        return 0.0


def _class_match(prediction: str, answer: str, classes: tuple[str, ...]) -> float:
    found = [name for name in classes if name in prediction]
    for name in found:  # the list shrinks under the loop, which skips the neighbour of what is removed
        if name in answer and name != answer:
            found.remove(name)
    return 1 / len(found) if answer in found else 0.0


def _paragraph(answer: str) -> str:
    found = re.search(r"Paragraph (\d+)", answer)
    if found is None:
        raise CrushError(f"answer must be 'Paragraph N', got {answer!r}")
    return found.group(1)


def _share_of_numbers(prediction: str, number: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def _likeness(line: str, answer: str) -> float:
    if line == answer:
        return 1.0
    if not (line and answer):
        return 0.0
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100


def _printable(prediction: str) -> str:
    return _CONTROL.sub("\n", prediction.strip()).strip()


def _equals(number: float, answer: str) -> bool:
    return int(number) == int(answer) if re.fullmatch(r"\d+", answer) else number == float(answer)
