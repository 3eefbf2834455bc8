"""Structured output without a model: what a grammar allows, token by token, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino_genai as ov_genai
import pytest

from ov_kvcrush import RequestError
from ov_kvcrush.engine.grammar.compiler import GrammarCompiler
from ov_kvcrush.engine.grammar.masks import GrammarState
from ov_kvcrush.engine.grammar.repeats import num_atoms
from ov_kvcrush.engine.grammar.vocabulary import OpenVINOVocabulary, token_bytes

C = ov_genai.StructuredOutputConfig
VOCABULARY = 300  # logits; the tokenizer has fewer tokens
END = 257


class ByteTokenizer:
    """As openvino_genai.Tokenizer: a token for each byte, two special ones, and some longer ones."""

    words = ("{", '{"', '":', "<f>", "</f>", "ab", "12")

    def __init__(self) -> None:
        self.tokens = [bytes([i]) for i in range(256)] + [b"<s>", b"</s>"] + [word.encode() for word in self.words]

    def get_vocab(self) -> dict[bytes, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    def decode(self, batch: list[list[int]], skip_special_tokens: bool) -> list[str]:
        hidden = (256, 257) if skip_special_tokens else ()
        return ["" if i in hidden else self.tokens[i].decode("utf-8", "replace") for (i,) in batch]

    def encode(self, text: str, add_special_tokens: bool) -> Any:
        raise AssertionError("the tokens of forced texts are asked for")


class PlainTokenizer(ByteTokenizer):
    """One that splits texts into bytes."""

    words = ()

    def encode(self, text: str, add_special_tokens: bool) -> Any:
        class Encoded:
            class input_ids:
                data = np.array([list(text.encode())])

        return Encoded


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(None, PlainTokenizer(), VOCABULARY, frozenset([END]))  # type: ignore[arg-type]


Start = Callable[..., GrammarState]


@pytest.fixture
def start(compiler: GrammarCompiler) -> Start:
    return lambda ends=frozenset([END]), **kinds: compiler.compile(C(**kinds), ends)


def allowed(state: GrammarState) -> set[int]:
    bits = np.unpackbits(state.mask().view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def follow(state: GrammarState, text: str) -> bool:
    """Whether `text` may be written byte by byte."""
    for token in text.encode():
        if token not in allowed(state):
            return False
        state.thread.advance([state], [[token]])
    return True


def accepts(state: GrammarState, text: str) -> bool:
    return follow(state, text) and END in allowed(state)


PERSON = """{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
             "additionalProperties": false}"""
TAGS = [C.Tag("<f>", C.Regex("[0-9]"), "</f>"), C.Tag("<g>", C.AnyText(), "</g>")]
OLD_TAGS = ov_genai.StructuralTagsConfig(
    structural_tags=[ov_genai.StructuralTagItem(begin="<f=a>", schema='{"type": "integer"}', end="</f>")],
    triggers=["<f="],
)
NESTED = 'root ::= "b" root | "c"'
EXPRESSION = 'root ::= term ("+" term)*  # a sum\nterm ::= [0-9]+\n  | "(" root ")"\n  | "\\u0078"'


@pytest.mark.parametrize(
    ("kinds", "yes", "no"),
    [
        ({"json_schema": PERSON}, ['{"a":1}', '{ "a": -20\n}'], ["{}", '{"a":1.5}', '{"a":1,"b":2}', '{   "a":1}']),
        ({"json_schema": "true"}, ["[1, null]", '"ü"'], ["x", "[1"]),
        ({"regex": r"^\d{2}[a-c]+$"}, ["12a", "00cab"], ["1a", "12", "\u0661\u0662a"]),
        ({"regex": 'a/b"c'}, ['a/b"c'], ["a"]),
        ({"grammar": EXPRESSION}, ["1", "12+(3+x)"], ["", "1+", "(1"]),
        ({"grammar": 'start: "a" /[0-9]+/'}, ["a1"], ["a"]),
        ({"structural_tags_config": OLD_TAGS}, ["", "hi", "x<f=a>12</f> y<f=a>3</f>"], ["<f=b>", "<f=a>x", "<f=a>1"]),
        (
            {"structural_tags_config": C.TriggeredTags(["<f", "<g"], TAGS)},
            ["text <f>1</f><g>any < thing</g> end"],
            ["<fx", "<f>1</g>", "<g>open"],
        ),
        (
            {"structural_tags_config": C.TriggeredTags(["<f", "<g"], TAGS, at_least_one=True)},
            ["<f>1</f>", "<f>1</f> text <f>2</f>"],
            ["text", ""],
        ),
        (
            {"structural_tags_config": C.TriggeredTags(["<f", "<g"], TAGS, stop_after_first=True)},
            ["text", "text <f>1</f>"],
            ["<f>1</f> text"],
        ),
        (
            {"compound_grammar": C.TriggeredTags(["<f", "<g"], TAGS, at_least_one=True, stop_after_first=True)},
            ["<f>1</f>"],
            ["text <f>1</f>", "<f>1</f><f>1</f>"],
        ),
        (
            {"compound_grammar": C.TagsWithSeparator(TAGS, ";", at_least_one=True)},
            ["<f>1</f>", "<f>1</f>;<g>x</g>;<f>2</f>"],
            ["", "<f>1</f>;", "<f>1</f><f>1</f>"],
        ),
        ({"compound_grammar": C.TagsWithSeparator(TAGS, ";")}, ["", "<f>1</f>;<f>1</f>"], [";"]),
        ({"compound_grammar": C.TagsWithSeparator(TAGS, ";", False, True)}, ["", "<f>1</f>"], ["<f>1</f>;<f>1</f>"]),
        (
            {"compound_grammar": C.Tag("<t>", C.AnyText(), "</t>") + C.JSONSchema(PERSON)},
            ['<t>so < what</t>{"a":1}'],
            ["<t>so", '{"a":1}', '<t></t></t>{"a":1}'],
        ),
        (
            {"compound_grammar": C.AnyText() + C.ConstString("|") + (C.Regex("a+") | C.EBNF(NESTED))},
            ["text|aa", "|bbc"],
            ["text", "text|", "||a"],
        ),
        (
            {"compound_grammar": C.AnyText() + C.Tag("<t>", C.TriggeredTags(["<f"], TAGS[:1]), "</t>") + C.Regex("!")},
            ["a<t>b<f>1</f>c</t>!", "<t></t>!"],
            ["a<t>b<f>1</f>c</t>", "a<t>b<fx"],
        ),
        ({"compound_grammar": (C.AnyText() | C.ConstString("x")) + C.ConstString(".")}, ["x.", "yes."], ["x", "a.b"]),
        (
            {"structural_tags_config": '{"type": "structural_tag", "format": {"type": "const_string", "value": "é"}}'},
            ["é"],
            ["e"],
        ),
    ],
)
def test_what_a_grammar_allows(start: Start, kinds: dict[str, Any], yes: list[str], no: list[str]) -> None:
    for text in yes:
        assert accepts(start(**kinds), text), text
    for text in no:
        assert not accepts(start(**kinds), text), text


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"json_schema": "nope"}, "json_schema must have a JSON schema, got no JSON"),
        ({"json_schema": '{"x-guidance": null}'}, "json_schema must be .* x-guidance must be an object"),
        ({"json_schema": "[1]"}, "json_schema must be a JSON schema, got: schema must be an object"),
        (
            {"json_schema": "false"},
            "json_schema must be .* schema must be an object that has an answer",
        ),
        ({"json_schema": '{"type": "strin"}'}, "json_schema must be a JSON schema .*Invalid type: strin"),
        ({"json_schema": '{"not": {}}'}, "json_schema must be a JSON schema .*Unimplemented"),
        ({"json_schema": '{"type": "string", "pattern": "(a{999}){999}"}'}, "at most 10000 characters .* got 998001"),
        ({"json_schema": '{"enum": ["%s"]}' % ("a" * (1 << 20))}, "json_schema must have at most 1048576 characters"),
        ({"regex": "(a"}, "regex must be a regular expression .*unclosed group"),
        ({"regex": "a(?=b)"}, "regex must be a regular expression .*look-around"),
        ({"regex": "((a{50}b{50}){50}){50}"}, "regex must be a regular expression, got: .*got 250000"),
        ({"regex": r"[^\s\S]"}, "regex must have an answer"),
        ({"grammar": 'x ::= "a"'}, "grammar must be a grammar in EBNF, got: No 'root' rule"),
        ({"grammar": 'root ::= "a" (= "b")'}, "grammar must be a grammar in EBNF, got: Expected"),
        ({"grammar": "root ::= root"}, "grammar must"),
        ({"structural_tags_config": "<f>"}, "structural_tags_config must be structural tags in JSON"),
        ({"structural_tags_config": '{"type": "tag"}'}, "tag must have 'begin'"),
        ({"structural_tags_config": '{"type": "token"}'}, "of a type that is supported, got 'token'"),
        ({"compound_grammar": C.AnyText() + C.Regex("a")}, "free text must be last or before a constant text"),
        ({"compound_grammar": (C.AnyText() | C.Regex("b")) + C.Regex("a")}, "free text must be last"),
        ({"compound_grammar": C.TriggeredTags(["<x"], TAGS)}, "exactly one trigger, got '<f>'"),
        ({"compound_grammar": C.TriggeredTags(["<", "<f"], TAGS)}, "exactly one trigger, got '<f>'"),
        ({"compound_grammar": C.TriggeredTags(["<f", "<g", "<h"], TAGS)}, "each start a tag, got '<h'"),
        ({"compound_grammar": C.QwenXMLParametersFormat("{}")}, "supported, got 'qwen_xml_parameter'"),
    ],
)
def test_what_is_none_is_refused_by_name(start: Start, kinds: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        start(**kinds)


def test_exactly_one_kind_is_asked_for(compiler: GrammarCompiler) -> None:
    config = C(regex="a")
    config.json_schema = "{}"
    with pytest.raises(RequestError, match=r"exactly one of .*, got json_schema and regex"):
        compiler.compile(config, frozenset([END]))
    with pytest.raises(RequestError, match="got none"):
        compiler.compile(C(), frozenset([END]))


def test_a_model_without_end_tokens_is_refused() -> None:
    with pytest.raises(RequestError, match="end tokens must be known"):
        GrammarCompiler(None, PlainTokenizer(), VOCABULARY, frozenset()).compile(C(regex="a"), frozenset())  # type: ignore[arg-type]


def test_logits_without_a_token_and_special_tokens_are_masked(start: Start) -> None:
    state = start(compound_grammar=C.AnyText())
    assert allowed(state) == {*range(0x80), *range(0xC2, 0xF5), END}  # what UTF-8 begins with


def test_the_request_says_which_tokens_end_it(start: Start) -> None:
    assert allowed(start(regex="a?")) == {ord("a"), END}
    assert allowed(start(frozenset([256]), regex="a?")) == {ord("a"), 256}
    assert allowed(start(frozenset([256]), regex="a")) == {ord("a")}
    unending = start(frozenset(), regex="ab?")
    assert allowed(unending) == {ord("a")}
    assert not unending.completes(np.array([ord("a")]))
    unending.thread.advance([unending], [[]])
    assert allowed(unending) == {ord("b")}
    assert unending.completes(np.array([ord("a"), ord("b")]))


def test_forks_go_on_by_themselves_and_see_each_token_once(start: Start) -> None:
    first = start(regex="a(b|c)d")
    first.thread.advance([first], [[ord("a")]])
    second = first.fork()
    first.thread.advance([first, second], [[ord("b")], [ord("c")]])
    assert allowed(first) == allowed(second) == {ord("d")}
    assert first.num_seen == second.num_seen == 2
    first.thread.advance([first], [[ord("d")]])
    assert allowed(first) == {END}
    assert first.is_complete
    assert not second.is_complete


def test_compiled_grammars_are_kept(compiler: GrammarCompiler, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    start(regex="kept[0-9]")
    for i in range(63):
        start(regex=f"other{i}")
    monkeypatch.setattr(compiler, "_compile", None)
    assert accepts(start(regex="kept[0-9]"), "kept7")
    with pytest.raises(TypeError):  # it was not there
        start(regex="new")
    with pytest.raises(TypeError):  # the oldest made room
        start(json_schema=PERSON)


def test_each_salt_has_compiled_grammars_of_its_own(
    compiler: GrammarCompiler, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.compile(C(regex="salted[0-9]"), frozenset([END]), "alice")
    for i in range(64):  # of others: they take nobody's room
        start(regex=f"more{i}")
    monkeypatch.setattr(compiler, "_compile", None)
    assert accepts(compiler.compile(C(regex="salted[0-9]"), frozenset([END]), "alice"), "salted7")
    for salt in ("bob", ""):
        with pytest.raises(TypeError):  # it is not there for them
            compiler.compile(C(regex="salted[0-9]"), frozenset([END]), salt)


def test_texts_without_a_choice_are_split_into_known_tokens() -> None:
    class Odd(PlainTokenizer):
        words = ByteTokenizer.words

        def encode(self, text: str, add_special_tokens: bool) -> Any:
            return super().encode(" " + text, add_special_tokens)  # as SentencePiece does

    vocabulary = OpenVINOVocabulary(Odd(), VOCABULARY, END)  # type: ignore[arg-type]
    assert vocabulary.special_token_ids == [256, 257]
    assert [vocabulary.tokens[i] for i in vocabulary('{"ab":12é')] == [b'{"', b"ab", b'":', b"12", b"\xc3", b"\xa9"]
    assert vocabulary.tokens[VOCABULARY - 1] == b""


def test_bytes_of_sentencepiece_tokens() -> None:
    lone = [f"<0x{i:02X}>".encode() for i in range(256)]
    assert token_bytes([*lone, "\u2581the".encode()])[-2:] == [b"\xff", b" the"]
    assert token_bytes([b"<0x41>", "\u2581".encode()]) == [b"<0x41>", "\u2581".encode()]  # a text in another vocabulary


@pytest.mark.parametrize(
    ("pattern", "size"),
    [("a{3}b", 4), ("(ab{2}){10}", 30), (r"\{5}", 3), ("[{9}]{2,4}", 4), ("a{2,}|b", 3), ("((x{3}){3}){3}", 27)],
)
def test_repeats_are_counted(pattern: str, size: int) -> None:
    assert num_atoms(pattern) == size
