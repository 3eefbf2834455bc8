"""Calibration prompts: those of the package are whole and diverse, a caller's are what the files hold."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.calibrate.prompts import (
    QUESTION,
    CalibrationPrompt,
    calibration_prompts,
    prompts_from_files,
)

PROMPTS = calibration_prompts()
TEXTS = files("ov_kvcrush.eval.calibrate") / "texts"


def test_every_text_is_in_the_list_once() -> None:
    listed = [row["file"] for row in json.loads((TEXTS / "prompts.json").read_text("utf-8"))]
    assert sorted(listed) == sorted(entry.name for entry in TEXTS.iterdir() if entry.name != "prompts.json")


def test_names_texts_and_questions_differ() -> None:
    for field in ("name", "text", "question"):
        assert len({getattr(prompt, field) for prompt in PROMPTS}) == len(PROMPTS) == 12


@pytest.mark.parametrize("first", [4, 8])
def test_the_first_prompts_are_all_of_different_kinds(first: int) -> None:
    assert len({prompt.kind for prompt in PROMPTS[:first]}) == first


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt.name)
class TestText:
    def test_is_long_and_of_plain_lines(self, prompt: CalibrationPrompt) -> None:
        """Words and signs: code and tables have fewer words than prose, and more signs."""
        assert len(re.findall(r"\w+|[^\w\s]", prompt.text)) >= 1500
        assert max(map(len, prompt.text.splitlines())) < 200
        assert "\r" not in prompt.text
        assert "\ufeff" not in prompt.text

    def test_repeats_no_paragraph(self, prompt: CalibrationPrompt) -> None:
        """A text that repeats itself would be easier to compress than what users send."""
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", prompt.text) if len(p) > 200]
        assert len(set(paragraphs)) == len(paragraphs)

    def test_question_asks_for_sentences(self, prompt: CalibrationPrompt) -> None:
        assert len(prompt.question.split()) >= 15
        assert prompt.question not in prompt.text


def test_python_is_valid_up_to_where_it_is_to_be_continued() -> None:
    text = next(prompt.text for prompt in PROMPTS if prompt.name == "python")
    whole, _, begun = text.rpartition("\ndef ")
    names = {node.name for node in ast.parse(whole).body if isinstance(node, ast.ClassDef)}
    assert {"Lot", "Bank"} <= names
    with pytest.raises(SyntaxError):
        ast.parse("def " + begun)


def test_tables_have_their_rows_and_columns() -> None:
    text = next(prompt.text for prompt in PROMPTS if prompt.name == "tables")
    stock = [line.split(",") for line in text.splitlines() if re.match(r"\d{4},", line)]
    assert len(stock) >= 40
    assert {len(row) for row in stock} == {4}
    for title in ("Table 2", "Table 3"):
        section = text[text.index(title + ".") :].split("\n\n")[1]
        rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
        assert len(rows) >= 42
        assert len({len(row) for row in rows}) == 1


class TestFiles:
    @given(
        st.lists(
            st.text(st.characters(codec="utf-8", exclude_characters="\r\ufeff")).filter(str.strip),
            min_size=1,
            max_size=4,
        )
    )
    def test_are_read_as_they_are(self, tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
        folder = tmp_path_factory.mktemp("texts")
        paths = [folder / f"{i}.txt" for i in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_bytes(text.encode())
        read = prompts_from_files(paths)
        assert [prompt.text for prompt in read] == texts
        assert [prompt.name for prompt in read] == [str(path) for path in paths]
        assert {prompt.question for prompt in read} == {QUESTION}

    def test_take_a_question_and_paths_as_strings(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes(b"\xef\xbb\xbfWith a byte order mark.")
        [prompt] = prompts_from_files([str(path)], "Who wrote it?")
        assert prompt == CalibrationPrompt(str(path), "file", "With a byte order mark.", "Who wrote it?")

    @pytest.mark.parametrize(
        ("content", "rule"),
        [(None, "readable"), (b"", "hold text"), (b" \n\t\n", "hold text"), (b"caf\xe9", "UTF-8")],
        ids=["missing", "empty", "blank", "latin-1"],
    )
    def test_that_cannot_be_used_are_named(self, tmp_path: Path, content: bytes | None, rule: str) -> None:
        good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
        good.write_text("Text.")
        if content is not None:
            bad.write_bytes(content)
        with pytest.raises(CrushError, match=f"must be {rule}|must {rule}") as caught:
            prompts_from_files([good, bad])
        assert str(bad) in str(caught.value)
        assert str(good) not in str(caught.value)

    def test_a_folder_is_not_a_text(self, tmp_path: Path) -> None:
        with pytest.raises(CrushError, match="must be readable"):
            prompts_from_files([tmp_path])

    def test_none_or_one_twice_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("Text.")
        with pytest.raises(CrushError, match="at least one text file"):
            prompts_from_files([])
        with pytest.raises(CrushError, match="twice"):
            prompts_from_files([path, path])


@pytest.mark.parametrize("field", ["name", "kind", "text", "question"])
def test_an_empty_field_is_named(field: str) -> None:
    with pytest.raises(CrushError, match=f"^{field} must"):
        replace(PROMPTS[0], **{field: ""})


def test_a_blank_question_is_refused() -> None:
    with pytest.raises(CrushError, match=r"^question must be more than white space"):
        replace(PROMPTS[0], question=" \n")
