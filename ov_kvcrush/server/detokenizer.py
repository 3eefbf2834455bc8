"""From tokens to text, token by token and cheaply: an OpenVINO detokenizer takes half a millisecond for each call."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

import openvino_genai as ov_genai

from ov_kvcrush.core.stop_strings import StopStringTracker
from ov_kvcrush.engine.grammar.vocabulary import token_bytes

_PROBE = "I do n't know : it 's 12 , naïve 東京 \N{ROCKET}\n\tx . end"
_REPLACEMENT = "\ufffd"


class TokenTexts:
    """The bytes of each token of a model. May be used from any thread.

    Where joined bytes are not what the tokenizer makes of a text, `is_exact` is False and streams decode as it does.
    """

    def __init__(self, tokenizer: ov_genai.Tokenizer) -> None:
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        texts = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for text, token in vocabulary.items():
            texts[token] = text if isinstance(text, bytes) else text.encode()
        self._bytes = token_bytes(texts)
        self._shown: dict[int, tuple[bytes, bytes]] = {}  # within a text, and at its beginning
        self.is_exact = self._joined(_PROBE) == self._decoded(_PROBE)

    def shown(self, token: int, *, first: bool = False) -> bytes:
        """The bytes of an answer that it is, none of a special one. first: whether the answer begins with it."""
        found = self._shown.get(token)
        if found is None:
            found = self._shown[token] = self._look(token)
        return found[first]

    def raw(self, token: int) -> bytes:
        """Its bytes, also of a special one."""
        return self._bytes[token] if 0 <= token < len(self._bytes) else b""

    def text(self, token: int) -> str:
        """Its text, with signs of replacement for parts of characters."""
        return self.raw(token).decode(errors="replace")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer."""
        if not self.is_exact:
            return str(self._tokenizer.decode(list(ids))) if ids else ""
        return b"".join(self.shown(token, first=i == 0) for i, token in enumerate(ids)).decode(errors="replace")

    def _look(self, token: int) -> tuple[bytes, bytes]:
        own = self.raw(token)
        alone = str(self._tokenizer.decode([token]))
        if not alone and _REPLACEMENT not in own.decode(errors="replace") and own != b" ":
            return b"", b""  # special
        begins = own[1:] if own.startswith(b" ") and not alone.startswith(" ") else own
        return own, begins

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).input_ids.data[0].tolist()
        return ids

    def _joined(self, text: str) -> str:
        ids = self._ids(text)
        return b"".join(self.shown(token, first=i == 0) for i, token in enumerate(ids)).decode(errors="replace")

    def _decoded(self, text: str) -> str:
        return str(self._tokenizer.decode(self._ids(text)))

    def stream(self, stops: Iterable[str] = ()) -> TextStream:
        """The text of an answer that begins."""
        return TextStream(self, tuple(stops))

    def tracker(self) -> StopStringTracker:
        """A text that grows as the tokenizer itself decodes it."""
        return StopStringTracker((), self._tokenizer.decode)


class TextStream:
    """The text of one answer as it grows: whole characters, nothing of a stop string nor of what may become one."""

    def __init__(self, texts: TokenTexts, stops: tuple[str, ...]) -> None:
        self._texts = texts
        self._stops = stops
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._tracker = None if texts.is_exact else texts.tracker()
        self._is_first = True
        self._text = ""
        self._num_shown = 0

    def add(self, tokens: Iterable[int]) -> str:
        """More text of the answer, after more of its tokens."""
        for token in tokens:
            self._take(token)
        return self._show(self._safe_length())

    def end(self, final: str | None) -> str:
        """The rest. final: the whole answer, where it is not that of its tokens."""
        if final is not None:
            self._text = final
        elif self._tracker is None:
            self._text += self._decoder.decode(b"", True)
        return self._show(len(self._text))

    @property
    def num_characters(self) -> int:
        """Of the text so far, shown or not."""
        return len(self._text)

    def _take(self, token: int) -> None:
        if self._tracker is not None:
            self._tracker.add(token)
            self._text = self._tracker.text
            return
        self._text += self._decoder.decode(self._texts.shown(token, first=self._is_first))
        self._is_first = False

    def _show(self, length: int) -> str:
        new = self._text[self._num_shown : length]
        self._num_shown = max(self._num_shown, length)
        return new

    def _safe_length(self) -> int:
        text, begin = self._text, self._num_shown
        ends = [at for stop in self._stops if (at := text.find(stop, begin)) >= 0]
        if ends:
            return min(ends)
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text) - begin), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return len(text) - longest
