"""The vocabulary of a model for llguidance: the bytes of each token, which are special, and how text is split."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import cast

import openvino_genai as ov_genai
from llguidance import LLTokenizer, TokenizerWrapper

_BYTE = re.compile(rb"<0x([0-9A-F]{2})>")
_SPACE = "\u2581".encode()  # of SentencePiece
_FORCED_TEXTS = 4096  # that are remembered with their tokens


def make_tokenizer(
    folder: Path | None, tokenizer: ov_genai.Tokenizer, vocab_size: int, ends: tuple[int, ...]
) -> LLTokenizer:
    """The tokenizer that masks are made for, of `vocab_size` bits: logits that no token has are always masked.

    folder: with the tokenizer.json that `tokenizer` was made of, if it has one; None = not known. ends: tokens that
    end a text, not empty. It takes 0.3 to 5 s, for 49k to 152k tokens on 2 cores.
    """
    path = folder / "tokenizer.json" if folder else None
    if path is not None and path.is_file():
        try:
            return LLTokenizer(path.read_text(encoding="utf-8"), n_vocab=vocab_size, eos_token=list(ends))
        except ValueError:  # of a kind that llguidance does not know, or with more tokens than the model has logits
            pass
    vocabulary = cast(TokenizerWrapper, OpenVINOVocabulary(tokenizer, vocab_size, ends[0]))
    return LLTokenizer(vocabulary, n_vocab=vocab_size, eos_token=list(ends))


class OpenVINOVocabulary:
    """An OpenVINO tokenizer with the members that llguidance asks of a tokenizer.

    tokens: their bytes; empty = no text. special_token_ids: those that decoding leaves out.
    """

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: ov_genai.Tokenizer, vocab_size: int, eos: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos
        self.bos_token_id: int | None = None
        texts = {token: _bytes(text) for text, token in tokenizer.get_vocab().items()}
        self.tokens = token_bytes([texts.get(token, b"") for token in range(vocab_size)])
        self.special_token_ids = _special(tokenizer, self.tokens)
        self._greedy = _Greedy(self.tokens, set(self.special_token_ids))
        self._split = lru_cache(_FORCED_TEXTS)(self._encode)

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text that a grammar leaves no choice in: those that the model is used to."""
        return self._split(_bytes(text).decode(errors="replace"))

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).input_ids.data[0].tolist()
        # Tokenizers that put a blank before a text are of no use within one.
        if b"".join(self.tokens[i] for i in ids) == text.encode():
            return ids
        return self._greedy(text.encode())


def token_bytes(tokens: list[bytes]) -> list[bytes]:
    """Bytes of tokens as text: of SentencePiece's, which write blanks and lone bytes as signs of their own."""
    if sum(_BYTE.fullmatch(token) is not None for token in tokens) < 256:
        return tokens
    return [
        bytes([int(byte[1], 16)]) if (byte := _BYTE.fullmatch(token)) else token.replace(_SPACE, b" ")
        for token in tokens
    ]


class _Greedy:
    """Splits bytes into the longest tokens from the left."""

    def __init__(self, tokens: list[bytes], special: set[int]) -> None:
        self._ids = {token: i for i, token in enumerate(tokens) if token and i not in special}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        ids: list[int] = []
        at = 0
        while at < len(text):
            sizes = range(min(self._longest, len(text) - at), 0, -1)
            size = next((n for n in sizes if text[at : at + n] in self._ids), 0)
            if not size:  # a byte that no token has: llguidance goes on from what is there
                return ids
            ids.append(self._ids[text[at : at + size]])
            at += size
        return ids


def _special(tokenizer: ov_genai.Tokenizer, tokens: list[bytes]) -> list[int]:
    """Tokens that decode to a text, but to none where special ones are left out."""
    named = [i for i, token in enumerate(tokens) if len(token) > 1]
    shown = tokenizer.decode([[i] for i in named], skip_special_tokens=True)
    silent = [i for i, text in zip(named, shown, strict=True) if not text]
    if not silent:
        return []
    texts = tokenizer.decode([[i] for i in silent], skip_special_tokens=False)
    return [i for i, text in zip(silent, texts, strict=True) if text]


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()
