"""The prompts that a profile is measured on: texts that ship with the package, or a caller's own files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from ov_kvcrush.errors import CrushError
from ov_kvcrush.utils.checks import check_string

QUESTION = "Summarize the text above."


@dataclass(frozen=True)
class CalibrationPrompt:
    """A long text and what is asked about it; the question follows the text.

    `name` tells it from the others of a profile; `kind` is what it is ("report", "code", ...), "file" for a caller's.
    Raises CrushError for a field that is empty, and for a text or a question of white space only.
    """

    name: str
    kind: str
    text: str
    question: str

    def __post_init__(self) -> None:
        check_string("name", self.name)
        check_string("kind", self.kind)
        for field, value in (("text", self.text), ("question", self.question)):
            check_string(field, value)
            if not value.strip():
                raise CrushError(f"{field} must be more than white space, got {value[:20]!r}")


def calibration_prompts() -> tuple[CalibrationPrompt, ...]:
    """The prompts that ship with the package: twelve, each of about 2,000 tokens.

    In an order in which any first few are of as many kinds as possible, so that a shorter profile takes the first.
    """
    folder = files("ov_kvcrush.eval.calibrate") / "texts"
    rows = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    return tuple(
        CalibrationPrompt(row["name"], row["kind"], (folder / row["file"]).read_text("utf-8"), row["question"])
        for row in rows
    )


def prompts_from_files(paths: Iterable[str | Path], question: str = QUESTION) -> tuple[CalibrationPrompt, ...]:
    """A prompt for each text file (UTF-8, with or without a byte order mark), named by its path, in the given order.

    Raises CrushError for no file at all, and naming the file for one that cannot be read, is not UTF-8, holds nothing
    but white space, or is given twice.
    """
    prompts: dict[str, CalibrationPrompt] = {}
    for path in map(Path, paths):
        if str(path) in prompts:
            raise CrushError(f"paths must be different files, got {str(path)!r} twice")
        prompts[str(path)] = CalibrationPrompt(str(path), "file", text_of_file(path), question)
    if not prompts:
        raise CrushError("paths must be at least one text file, got none")
    return tuple(prompts.values())


def text_of_file(path: Path) -> str:
    """A text file's text (UTF-8, with or without a byte order mark). Raises CrushError naming the file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CrushError(f"text file must be readable, got {str(path)!r}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise CrushError(f"text file must be UTF-8, got {str(path)!r}: {error}") from None
    if not text.strip():
        raise CrushError(f"text file must hold text, got {str(path)!r}, which is empty")
    return text
