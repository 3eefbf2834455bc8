"""Bodies that mean nothing: each is refused in OpenAI's shape; whatever is sent is no failure of the server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ov_kvcrush import ContinuousBatchingPipeline
from ov_kvcrush.server.app import create_app
from ov_kvcrush.server.settings import ServerSettings

Ask = Callable[..., httpx.Response]
MESSAGES = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
CONTEXT = "/v1/contexts/ctx_" + "0" * 32
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/contexts": {"text": "Hi"},
    f"{CONTEXT}/extend": {"text": "Hi"},
    f"{CONTEXT}/fork": {},
}
ANSWERS = tuple(BODIES)[:3]
LIMITS = {"/v1/responses": "max_output_tokens"}  # the others' is max_tokens
FIELDS = (
    "messages", "prompt", "input", "text", "model", "n", "temperature", "top_p", "top_k", "min_p", "seed", "stop",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "max_tokens", "max_completion_tokens",
    "max_output_tokens", "min_tokens", "ignore_eos", "logit_bias", "stream", "stream_options", "response_format",
    "user", "metadata", "context", "protect", "logprobs", "top_logprobs", "tools", "tool_choice", "echo", "best_of",
    "name", "policy", "budget", "kept", "instructions", "store", "suffix", "parallel_tool_calls",
)  # fmt: skip
# Of these no field takes any value, wherever it stands.
WRONG: dict[str, list[Any]] = {
    "model": [None, 1, "other", "\0", "a" * 9999],
    "temperature": ["1", -1, 2.1, True, [], 10**400],
    "top_p": [0, 1.5, "x", {}],
    "seed": [1.5, 1 << 63, "1", -(1 << 64)],
    "stream": [1, "true", []],
    "metadata": [1, [], {"a": 1}],
    "context": ["", 1, "ctx_", "../../etc/passwd", "ctx_" + "0" * 32, "ctx_\0", "x" * 65],
    "user": [1, [], {}],
    "unknown": [None, 1, {}],
}
LETTERS = st.text(st.characters(codec=None, categories=("L", "N", "P", "Cc", "Cs", "So")), max_size=8)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.floats(), LETTERS,
    st.sampled_from(["type", "function", "text", "json_schema", "json_object", "auto", "required", "none", "ref", "#"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LETTERS | st.sampled_from(FIELDS), inner, max_size=3),
    max_leaves=8,
)
SCHEMAS = st.dictionaries(
    st.sampled_from(
        ["type", "properties", "items", "$ref", "$defs", "enum", "const", "anyOf", "allOf", "pattern", "minLength",
         "maximum", "required", "additionalProperties", "format", "x-guidance"]
    ),
    VALUES, max_size=3,
)  # fmt: skip
COUNT = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def many(share: float) -> settings:
    """Of the whole, 200 by default and 1,000 with --exhaustive."""
    whole = 200 if settings.default.max_examples < 100 else 1000
    return settings(COUNT, max_examples=round(whole * share), deadline=None)


@pytest.fixture(scope="module")
def ask(quick_settings: ServerSettings, quick_pipeline: ContinuousBatchingPipeline) -> Iterator[Ask]:
    """The app without a socket: `ask(path, body)`; a body that is no bytes is sent as JSON."""
    app = create_app(replace(quick_settings, api_keys=()), quick_pipeline)
    loop = asyncio.new_event_loop()
    lifespan = app.router.lifespan_context(app)
    loop.run_until_complete(lifespan.__aenter__())
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1", timeout=None)

    def send(path: str, body: Any, kind: str = "application/json", method: str = "POST") -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return loop.run_until_complete(client.request(method, path, content=content, headers={"Content-Type": kind}))

    yield send
    loop.run_until_complete(client.aclose())
    loop.run_until_complete(lifespan.__aexit__(None, None, None))
    loop.close()


def body_of(path: str, model: str) -> dict[str, Any]:
    whole = {"model": model, LIMITS.get(path, "max_tokens"): 1} if path in ANSWERS else {}
    return whole | BODIES[path]


def check_refused(answer: httpx.Response) -> None:
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text)
    check_shape(answer)


def check_shape(answer: httpx.Response) -> None:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert isinstance(error["message"], str)
    assert isinstance(error["code"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["type"] in ("invalid_request_error", "authentication_error", "permission_error", "rate_limit_error")


@pytest.fixture(autouse=True)
def next_one_works(ask: Ask, quick_settings: ServerSettings) -> Iterator[None]:
    yield
    for path in ANSWERS:
        assert ask(path, body_of(path, quick_settings.model_name)).status_code == 200


def test_what_is_no_json(ask: Ask, quick_settings: ServerSettings) -> None:
    @many(0.3)
    @given(st.sampled_from(sorted(BODIES)), st.binary(min_size=1, max_size=40), st.integers(1, 60), st.booleans())
    def law(path: str, noise: bytes, at: int, is_cut: bool) -> None:
        whole = json.dumps(body_of(path, quick_settings.model_name)).encode()
        at %= max(len(whole) - 1, 1)
        # Cut off, or with a byte in it that no JSON and no UTF-8 has.
        check_refused(ask(path, whole[: at or 1] if is_cut else whole[:at] + b"\xff" + noise + whole[at:]))

    law()


def test_fields_of_the_wrong_kind(ask: Ask, quick_settings: ServerSettings) -> None:
    pairs = [(name, value) for name, values in WRONG.items() for value in values]

    @many(0.3)
    @given(
        st.sampled_from(ANSWERS), st.sampled_from(pairs), st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2)
    )
    def law(path: str, wrong: tuple[str, Any], others: dict[str, Any]) -> None:
        check_refused(ask(path, body_of(path, quick_settings.model_name) | others | dict([wrong])))

    law()


def test_whatever_is_sent_is_no_failure_of_the_server(ask: Ask, quick_settings: ServerSettings) -> None:
    @many(0.3)
    @given(st.sampled_from(sorted(BODIES)), st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3))
    def law(path: str, given_fields: dict[str, Any]) -> None:
        body = body_of(path, quick_settings.model_name) | given_fields
        if path in ANSWERS:
            body[LIMITS.get(path, "max_tokens")] = 1
            body.pop("max_completion_tokens", None)
        answer = ask(path, body)
        if answer.status_code not in (200, 201):
            check_refused(answer)
        elif answer.status_code == 201:
            assert ask(f"/v1/contexts/{answer.json()['id']}", b"", method="DELETE").status_code == 200

    law()


def test_schemas_and_tools_that_mean_nothing(ask: Ask, quick_settings: ServerSettings) -> None:
    names = st.text(max_size=3) | st.just("f")

    @many(0.1)
    @given(SCHEMAS, names, st.booleans(), st.booleans())
    def law(schema: dict[str, Any], name: str, strict: bool, is_tool: bool) -> None:
        wanted: dict[str, Any]
        if is_tool:
            function = {"name": name, "parameters": schema, "strict": strict}
            wanted = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
        else:
            given_schema = {"name": name, "schema": schema, "strict": strict}
            wanted = {"response_format": {"type": "json_schema", "json_schema": given_schema}}
        answer = ask(ANSWERS[0], body_of(ANSWERS[0], quick_settings.model_name) | wanted)
        if answer.status_code != 200:
            check_refused(answer)

    law()


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/v1/completions", b"{}", "text/plain"),
        ("/v1/completions", b"{}", ""),
        ("/v1/completions", b"[" * 100_000, "application/json"),
        ("/v1/completions", b'{"a":' * 100_000, "application/json"),
        ("/v1/completions", b"9" * 100_000, "application/json"),
        ("/v1/contexts", b"", "application/octet-stream"),
        ("/v1/contexts", b"KVC" + b"\0" * 999, "application/octet-stream"),
        ("/v1/contexts", b"x", "multipart/form-data"),
        ("/v1/contexts", b"x", "multipart/form-data; boundary=x"),
        ("/v1/contexts", b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n\xff\r\n--x--\r\n',
         "multipart/form-data; boundary=x"),
        ("/v1/contexts", b'--x\r\nContent-Disposition: form-data; name="kept"\r\n\r\nnan\r\n--x--\r\n',
         "multipart/form-data; boundary=x"),
        ("/v1/contexts", b"--x\r\nContent-Disposition: \xff\r\n\r\n\r\n--x--", "multipart/form-data; boundary=x"),
        ("/v1/contexts", b"text=%ff", "application/x-www-form-urlencoded"),
        ("/v1/nothing", b"{}", "application/json"),
    ],
)  # fmt: skip
def test_bodies_of_other_kinds(ask: Ask, path: str, body: bytes, kind: str) -> None:
    check_refused(ask(path, body, kind))


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"])
def test_methods_that_a_path_has_not(ask: Ask, method: str) -> None:
    check_refused(ask("/v1/completions", b"{}", method=method))


def test_a_file_that_is_no_context(ask: Ask) -> None:
    @many(0.05)
    @given(st.binary(max_size=200))
    def law(content: bytes) -> None:
        check_refused(ask("/v1/contexts", content, "application/octet-stream"))

    law()
