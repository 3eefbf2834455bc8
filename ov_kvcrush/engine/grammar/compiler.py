"""From StructuredOutputConfig to where a sequence begins in its grammar: checked, compiled, kept for the next one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openvino_genai as ov_genai
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from ov_kvcrush.core.sampling_params import outside_vocabulary
from ov_kvcrush.engine.grammar.formats import format_of
from ov_kvcrush.engine.grammar.lark import grammar_of
from ov_kvcrush.engine.grammar.masks import GrammarState, MaskThread, reason_in
from ov_kvcrush.engine.grammar.vocabulary import make_tokenizer
from ov_kvcrush.errors import RequestError

MAX_CHARACTERS = 1 << 20  # of a grammar
_MAX_KEPT = 64  # compiled grammars of a salt
_MAX_SALTS = 16  # whose grammars are kept
# llguidance's own are 500k, 1M and 200k: what is too large is refused after four times as long with those.
_GRAMMAR_SIZE = 500_000
_LEXER_FUEL = 300_000
_STEP_FUEL = 50_000
_DEAD_END = "NoExtension"  # what llguidance says where no token can come next
_RULES = {
    "json_schema": "a JSON schema",
    "regex": "a regular expression",
    "grammar": "a grammar in EBNF",
    "structural_tags_config": "structural tags",
    "compound_grammar": "a compound of grammars",
}


class _Compiled(NamedTuple):
    matcher: LLMatcher  # at the start of an answer; copied for each
    mask: np.ndarray  # int32 (words,), of the first token


class GrammarCompiler:
    """Grammars of one model and its tokenizer. May be used from any thread; what it makes, by the engine's only.

    folder: with the tokenizer.json that `tokenizer` was made of; None = not known. end_tokens: the model's.
    thread: what makes the masks, None before the first grammar.
    """

    def __init__(
        self, folder: Path | None, tokenizer: ov_genai.Tokenizer, vocab_size: int, end_tokens: frozenset[int]
    ) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._ends = tuple(sorted(end_tokens - set(outside_vocabulary(end_tokens, vocab_size))))
        self._vocabulary: LLTokenizer | None = None
        self._first = threading.Lock()
        self._kept: OrderedDict[str, OrderedDict[str, _Compiled]] = OrderedDict()  # by salt, then by grammar
        self._lock = threading.Lock()
        self.thread: MaskThread | None = None

    def compile(
        self, config: ov_genai.StructuredOutputConfig, end_tokens: frozenset[int], salt: str = ""
    ) -> GrammarState:
        """The start of an answer that ends with one of `end_tokens`. Raises RequestError naming the kind of grammar.

        The first call reads the vocabulary; a grammar of the last 64 of this salt is there already. salt: as
        CacheParams.cache_salt: who has another cannot know by the time that it takes whether a grammar is in use.
        """
        kind, fmt = format_of(config)
        try:
            grammar = grammar_of(fmt)
        except ValueError as error:
            raise RequestError(f"{kind} must be {_RULES[kind]}, got: {error}") from None
        if len(grammar) > MAX_CHARACTERS:
            raise RequestError(f"{kind} must have at most {MAX_CHARACTERS} characters, got {len(grammar)}")
        thread, vocabulary = self._prepare()
        compiled = self._find(salt, grammar)
        if compiled is None:
            compiled = self._compile(kind, grammar, thread, vocabulary)
            self._keep(salt, grammar, compiled)
        return GrammarState(thread, compiled.matcher.deep_copy(), compiled.mask.copy(), end_tokens)

    def _find(self, salt: str, grammar: str) -> _Compiled | None:
        with self._lock:
            kept = self._kept.get(salt)
            if kept is None or grammar not in kept:
                return None
            self._kept.move_to_end(salt)
            kept.move_to_end(grammar)
            return kept[grammar]

    def _keep(self, salt: str, grammar: str, compiled: _Compiled) -> None:
        """Room is made among those of the same salt: how many others use shows in no time, either."""
        with self._lock:
            kept = self._kept.setdefault(salt, OrderedDict())
            kept[grammar] = compiled
            self._kept.move_to_end(salt)
            if len(kept) > _MAX_KEPT:
                kept.popitem(last=False)
            if len(self._kept) > _MAX_SALTS:
                self._kept.popitem(last=False)

    def _prepare(self) -> tuple[MaskThread, LLTokenizer]:
        if not self._ends:
            raise RequestError("end tokens must be known for structured output, got none; set eos_token_id")
        with self._first:
            if self._vocabulary is None or self.thread is None:
                self._vocabulary = make_tokenizer(self._folder, self._tokenizer, self._vocab_size, self._ends)
                self.thread = MaskThread(self._vocabulary.vocab_size, self._vocabulary.eos_tokens)
            return self.thread, self._vocabulary

    def _compile(self, kind: str, grammar: str, thread: MaskThread, vocabulary: LLTokenizer) -> _Compiled:
        limits = LLParserLimits(
            max_grammar_size=_GRAMMAR_SIZE,
            initial_lexer_fuel=_LEXER_FUEL,
            step_lexer_fuel=_STEP_FUEL,
            verbose_errors=False,
        )
        matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
        mask = None if matcher.is_error() else thread.fill([matcher])[0]
        if matcher.is_error() and not reason_in(matcher).startswith(_DEAD_END):
            raise RequestError(f"{kind} must be {_RULES[kind]} within limits, got: {reason_in(matcher)}")
        if mask is None or matcher.is_error() or not mask.any():
            raise RequestError(f"{kind} must have an answer in the model's vocabulary, got one without")
        return _Compiled(matcher, mask)
