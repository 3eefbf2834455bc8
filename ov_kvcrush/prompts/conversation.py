"""The tokens of a conversation: a later turn goes on from the very tokens of the earlier ones, so their KV fits."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field, replace

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.core.perf_metrics import PerfMetrics
from ov_kvcrush.prompts.encoder import PromptEncoder

_LOOK_BACK = 16  # tokens of the prompt that are decoded with an answer, as the first token's text may depend on them
_NOT_TEXT = "\ufffd"  # what decoding puts in the place of half a character


@dataclass(frozen=True, eq=False)
class KnownTokens:
    """What is known of one conversation: its text, tokens int64 (S,), and where in both its parts end. Never changed.

    ends: characters and tokens up to the end of each prompt and answer, growing. keeps_answers: whoever asks gives each
    answer back as it was, and no one else can: what was generated is the conversation, whatever its text shows.
    """

    text: str = ""
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    ends: tuple[tuple[int, int], ...] = ()
    keeps_answers: bool = False

    def before(self, text: str) -> KnownTokens:
        """The longest part of it that `text` goes on from."""
        fits = (
            i
            for i, (chars, _) in reversed(list(enumerate(self.ends)))
            if chars < len(text) and text.startswith(self.text[:chars])
        )
        last = next(fits, None)
        if last is None:
            return replace(NOTHING_KNOWN, keeps_answers=self.keeps_answers)
        chars, tokens = self.ends[last]
        return replace(self, text=self.text[:chars], ids=self.ids[:tokens], ends=self.ends[: last + 1])

    def joined(self, text: str, ids: np.ndarray) -> KnownTokens:
        """The same and a text behind it, of the tokens int64 (T,)."""
        whole = np.concatenate([self.ids, np.asarray(ids, np.int64)])
        text = self.text + text
        return replace(self, text=text, ids=whole, ends=(*self.ends, (len(text), len(whole))))


NOTHING_KNOWN = KnownTokens()
NEW_CHAT = KnownTokens(keeps_answers=True)


class ConversationEncoder:
    """Tokens of conversations, from what the caller knows of each; it keeps nothing itself.

    The text of an answer, encoded again, may give other tokens than those that were generated; their KV would be lost.
    So only the text after the answer is encoded, and joined to the known tokens.
    """

    def __init__(self, encoder: PromptEncoder, tokenizer: ov_genai.Tokenizer) -> None:
        self._encoder = encoder
        self._tokenizer = tokenizer

    def encode(self, known: KnownTokens, text: str, metrics: PerfMetrics) -> KnownTokens:
        """The whole rendered conversation `text`, from what is known of it."""
        before = known.before(text)
        rest = text[len(before.text) :]
        if not before.text:
            return before.joined(rest, self._encoder.encode(rest, metrics, add_special_tokens=False))
        return before.joined(rest, self._encoder.encode_after(before.text, rest, metrics))

    def answered(self, prompt: KnownTokens, said: str, said_ids: list[int]) -> KnownTokens:
        """A prompt and the answer to it, whose tokens come without the one that ended it.

        The prompt alone where the tokens say something else than the text: half a character, special tokens that the
        text leaves out, a space that it begins with, a last token without text. A caller may have put the text there.
        """
        if not said_ids:
            return prompt
        tail = prompt.ids[-_LOOK_BACK:].tolist()
        if not prompt.keeps_answers and (
            _NOT_TEXT in said
            or self._decode(tail + said_ids) != (exact := self._decode(tail) + said)
            or self._decode(tail + said_ids[:-1]) == exact
        ):
            return prompt
        return prompt.joined(said, np.array(said_ids, np.int64))

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


class HistoryTokens:
    """What is known of each ChatHistory, for as long as the caller holds it. For any number of threads.

    It belongs to the object, and is used where its text is the beginning of what the object says now. Another history
    of the same text is encoded anew: its answers must not depend on which tokens someone else's were generated in.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: weakref.WeakKeyDictionary[ov_genai.ChatHistory, KnownTokens] = weakref.WeakKeyDictionary()

    def of(self, history: ov_genai.ChatHistory) -> KnownTokens:
        """What is known of a history."""
        with self._lock:
            return self._known.get(history, NOTHING_KNOWN)

    def set(self, history: ov_genai.ChatHistory, known: KnownTokens) -> None:
        """Replace what is known of a history."""
        with self._lock:
            self._known[history] = known
