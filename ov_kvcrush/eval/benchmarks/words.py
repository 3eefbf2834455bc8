"""English words from the package wonderwords, drawn with a generator of our own so that a seed gives the same words."""

from __future__ import annotations

import importlib
import random
import re
from dataclasses import dataclass

from ov_kvcrush.errors import CrushError

# Neither phrases ("contact lens") nor capitals ("ATM"): a word must be one word in a list and in an answer.
_PLAIN = re.compile(r"[a-z]+(-[a-z]+)*")


@dataclass(frozen=True)
class Words:
    """Plain lower-case words, each tuple sorted and without repeats."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]

    def key(self, rng: random.Random) -> str:
        """A random "adjective-noun"."""
        return f"{rng.choice(self.adjectives)}-{rng.choice(self.nouns)}"

    def every(self) -> list[str]:
        """All words, sorted, without repeats."""
        return sorted({*self.adjectives, *self.nouns, *self.verbs})


def load_words() -> Words:
    """Read the lists of the package wonderwords. Raises CrushError if it is not installed."""
    try:
        wonderwords = importlib.import_module("wonderwords")
    except ImportError:
        raise CrushError("wonderwords must be installed for tasks with words: run `pip install wonderwords`") from None
    source = wonderwords.RandomWord(enhanced_prefixes=False)  # without its index of beginnings, which takes 0.1 s
    lists = (source.filter(include_categories=[category]) for category in ("adjective", "noun", "verb"))
    return Words(*(tuple(sorted({word for word in words if _PLAIN.fullmatch(word)})) for words in lists))
