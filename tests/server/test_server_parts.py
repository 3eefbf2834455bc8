"""What the server is made of, without a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ov_kvcrush.errors import CrushError
from ov_kvcrush.kvcache.prefix_cache import PrefixCache
from ov_kvcrush.pipelines.loading import load_tokenizer
from ov_kvcrush.server.detokenizer import TokenTexts
from ov_kvcrush.server.keys import make_owners
from ov_kvcrush.server.settings import ServerSettings
from ov_kvcrush.server.tools.formats import tool_format

CALL = {"name": "f", "arguments": {"x": [1, "</tool_call"]}}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"host": "0.0.0.0"}, "api_keys"),
        ({"host": "example.org"}, "api_keys"),
        ({"api_keys": ("a b",)}, "api_keys"),
        ({"port": 65536}, "port"),
        ({"max_kv_mb": 0}, "max_kv_mb"),
        ({"max_waiting": 0}, "max_waiting"),
        ({"budget": "2/1"}, "budget"),
        ({"tool_format": "xml"}, "tool_format"),
        ({"request_timeout_s": float("nan")}, "request_timeout_s"),
    ],
)
def test_settings_are_checked(options: dict[str, object], field: str) -> None:
    with pytest.raises(CrushError, match=field):
        ServerSettings(**options)  # type: ignore[arg-type]


def test_settings_do_not_show_keys() -> None:
    assert "secret" not in repr(ServerSettings(host="0.0.0.0", api_keys=("secret",)))


def test_owners_are_the_same_after_a_restart_and_do_not_tell_keys(tmp_path: Path) -> None:
    first, again = (make_owners(("one", "two"), tmp_path) for _ in range(2))
    assert first.of("one") == again.of("one") != first.of("two")
    assert first.of("three") is first.of(None) is None
    assert make_owners(("one",), tmp_path / "other").of("one") != first.of("one")
    assert make_owners((), None).of(None) == "local"


@given(st.lists(st.integers(1, 6), min_size=1, max_size=40), st.booleans())
def test_calls_are_found_however_the_text_is_cut(sizes: list[int], with_text: bool) -> None:
    text = ("Well: " if with_text else "") + f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>" * 2
    reader, shown, at = tool_format("hermes", "").reader(), "", 0
    for size in [*sizes, len(text)]:
        shown += reader.add(text[at : at + size])
        at += size
    shown += reader.end()
    assert shown == ("Well: " if with_text else "")
    assert [json.loads(call.arguments) for call in reader.calls] == [CALL["arguments"]] * 2


@pytest.mark.parametrize(
    "text", ["<tool_call>\nnot json\n</tool_call>", "a < b <tool", "<tool_call>{}</tool_call>", ""]
)
def test_what_is_no_call_is_text(text: str) -> None:
    reader = tool_format("hermes", "").reader()
    assert reader.add(text) + reader.end() == text
    assert not reader.calls


@pytest.mark.parametrize("before", ["", "<|python_tag|>", "\n"])
def test_calls_of_llama(before: str) -> None:
    form = tool_format("auto", 'tools ... "parameters"')
    reader = form.reader()
    assert form.name == "llama"
    text = before + '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}'
    assert reader.add(text[:9]) + reader.add(text[9:]) + reader.end() == ""
    assert [(call.name, call.arguments) for call in reader.calls] == [("f", '{"a": 1}'), ("g", "{}")]
    other = form.reader()
    assert other.add("Hello {") + other.end() == "Hello {"


@pytest.fixture(scope="module")
def texts(smollm2: Path) -> TokenTexts:
    return TokenTexts(load_tokenizer(smollm2, {}))


@pytest.mark.parametrize("text", ["Hello, world!", " 東京 \N{ROCKET}\n naïve", "a<|im_end|>b", "\t{'x': 1}  \n\n"])
def test_streams_decode_as_the_tokenizer_does(texts: TokenTexts, text: str, smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2, {})
    ids = tokenizer.encode(text, add_special_tokens=False).input_ids.data[0].tolist()
    stream = texts.stream()
    assert texts.is_exact
    assert "".join([*(stream.add([token]) for token in ids), stream.end(None)]) == tokenizer.decode(ids)
    assert texts.decode(ids) == tokenizer.decode(ids)


@given(st.text("ab", max_size=12), st.sampled_from(["ab", "aab", "bb", "aba"]))
def test_a_stream_shows_nothing_of_a_stop_string(texts: TokenTexts, text: str, stop: str) -> None:
    stream = texts.stream([stop])
    shown = ""
    for letter in text:
        shown += stream.add(texts._ids(letter))
        assert stop not in shown
    end = text.find(stop)
    expected = text if end < 0 else text[:end]
    assert shown + stream.end(expected if end >= 0 else None) == expected


def test_prefixes_serve_their_own_salt_only() -> None:
    import numpy as np

    released: list[str] = []
    cache: PrefixCache[str] = PrefixCache(released.append)
    ids = np.arange(1, 9)
    cache.put(ids, "alice", "a")
    cache.put(ids[:4], "bob", "b")
    assert cache.match(np.append(ids, 9), salt="a") == ("alice", 8)
    assert cache.match(np.append(ids, 9), salt="b") == ("bob", 4)
    assert cache.match(ids) is None
    cache.put(ids, "nobody")
    assert released == []
    cache.put(np.append(ids, 9), "bob again", "b")
    assert released == ["bob"]
