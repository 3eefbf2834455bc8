"""A prompt in the colours of what the cache keeps of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import openvino_genai as ov_genai
from rich.console import Console
from rich.text import Text

from ov_kvcrush.chat.output import visible
from ov_kvcrush.core.outputs import KeptTokens

_BROKEN = "\ufffd"  # what a part of a character is decoded to by some tokenizers, by others to nothing
_MAX_TOKENS = 4  # of a character: it has at most 4 bytes


@dataclass(frozen=True)
class Look:
    """How tokens of one fate are shown. marks: around them, where there are no colours."""

    meaning: str
    style: str
    marks: tuple[str, str]


# A fate is an index. Of several tokens that make one character, the highest is shown.
KEPT, KEPT_BY_FEW, STANDS, STANDS_FOR_FEW, EVICTED = range(5)
LOOKS = (
    Look("kept by at least half of the heads", "bold green", ("", "")),
    Look("kept by fewer", "dim green", ("(", ")")),
    Look("kept for others like it, by at least half", "bold yellow", ("{", "}")),
    Look("kept for others like it, by fewer", "dim yellow", ("{(", ")}")),
    Look("evicted by all", "strike bright_black", ("[-", "-]")),
)


def fates(kept: KeptTokens) -> np.ndarray:
    """uint8 (S,), of each token of the prompt: by the share of all (layer, KV head) pairs that hold it.

    It counts as kept for others if most of those that hold it do so as a representative.
    """
    length, num_heads = len(kept.ids), sum(len(layer) for layer in kept.positions)
    held = _counts(kept.positions, length)
    represents = 2 * _counts(kept.representatives or [], length) > held
    by_few = 2 * held < num_heads
    return np.where(held == 0, EVICTED, np.where(represents, STANDS, KEPT) + by_few).astype(np.uint8)


def _counts(positions: list[list[np.ndarray]], length: int) -> np.ndarray:
    """int64 (length,): heads that have each place."""
    everything = [x[x < length] for layer in positions for x in layer]
    return np.bincount(np.concatenate(everything) if everything else np.zeros(0, np.int64), minlength=length)


def pieces(ids: Sequence[int], tokenizer: ov_genai.Tokenizer) -> list[tuple[int, str]]:
    """Number of tokens and text of each piece: a token, or several that make whole characters together only."""
    found = []
    begin = 0
    while begin < len(ids):
        end, text = begin + 1, _text(ids, begin, begin + 1, tokenizer)
        while _is_part(text) and end < min(len(ids), begin + _MAX_TOKENS):
            end += 1
            text = _text(ids, begin, end, tokenizer)
        if _is_part(text):  # of no character at all
            end, text = begin + 1, _BROKEN
        found.append((end - begin, text))
        begin = end
    return found


def _is_part(text: str) -> bool:
    return not text or _BROKEN in text


def _text(ids: Sequence[int], begin: int, end: int, tokenizer: ov_genai.Tokenizer) -> str:
    """Behind the token before it: the first token of a text may lose its space."""
    before = _decode(ids[max(begin - 1, 0) : begin], tokenizer)
    text = _decode(ids[max(begin - 1, 0) : end], tokenizer)
    return text[len(before) :] if text.startswith(before) else _decode(ids[begin:end], tokenizer)


def _decode(ids: Sequence[int], tokenizer: ov_genai.Tokenizer) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False)) if len(ids) else ""


def show_kept(kept: KeptTokens, tokenizer: ov_genai.Tokenizer, console: Console) -> None:
    """Print the prompt and a legend with counts."""
    of_token = fates(kept)
    has_colours = console.color_system is not None
    shown = Text()
    begin = 0
    parts: list[tuple[int, str]] = []
    for count, text in pieces(kept.ids.tolist(), tokenizer):
        parts.append((int(of_token[begin : begin + count].max()), visible(text)))
        begin += count
    for fate, run in groupby(parts, key=lambda part: part[0]):
        shown.append_text(_shown("".join(text for _, text in run), fate, has_colours))
    console.print(shown, soft_wrap=True)
    console.print(_legend(kept, of_token, has_colours), soft_wrap=True)


def _shown(text: str, fate: int, has_colours: bool) -> Text:
    look = LOOKS[fate]
    return Text(text, look.style) if has_colours else Text(text.join(look.marks))


def _legend(kept: KeptTokens, of_token: np.ndarray, has_colours: bool) -> Text:
    heads = [len(layer) for layer in kept.positions]
    parts = (kept.positions, kept.representatives or [])
    held, stand = (_counts(part, len(of_token)).sum() / sum(heads) for part in parts)
    lines = [
        Text(
            f"Of {len(of_token)} tokens of the prompt a head keeps {held:.1f} on average, {stand:.1f} of them for "
            f"others like them ({len(heads)} layers, {sum(heads)} heads of keys and values):"
        )
    ]
    for fate, look in enumerate(LOOKS):
        count = int(np.count_nonzero(of_token == fate))
        if count:
            lines.append(Text.assemble(f"{count:7} ", _shown(look.meaning, fate, has_colours)))
    return Text("\n").join(lines)
