"""Replicas on Ray Serve, without Ray's processes: who gets a request, and what a client sees when a replica dies."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError
from starlette.requests import Request
from starlette.responses import StreamingResponse

from ov_kvcrush.errors import CrushError
from ov_kvcrush.server.ray.asgi import HttpRequest, ResponseStart, answer
from ov_kvcrush.server.ray.cores import cpus_by_core, cpus_of, pin
from ov_kvcrush.server.ray.exposition import labelled
from ov_kvcrush.server.ray.gateway import Gateway
from ov_kvcrush.server.ray.routing import Affinity, Holders, affinity_of, context_key, ranked, rendezvous
from ov_kvcrush.server.ray.settings import RaySettings, parse_settings
from ov_kvcrush.server.settings import ServerSettings

NAMES = st.sets(st.sampled_from([f"replica{i}" for i in range(8)]), min_size=1)
CHAT = "/v1/chat/completions"


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


# -- what ties requests ------------------------------------------------------------------------------------------------


def test_turns_of_a_conversation_have_one_key() -> None:
    first = [turn("system", "Be brief."), turn("user", "Name a river.")]
    later = [*first, turn("assistant", "The Rhine."), turn("user", "And a longer one?")]
    new, known = affinity_of(CHAT, {"messages": first}, "a"), affinity_of(CHAT, {"messages": later}, "a")
    assert new is not None
    assert known is not None
    assert new.key == known.key
    assert new.is_new
    assert not known.is_new


@pytest.mark.parametrize(
    "other",
    [
        {"messages": [turn("system", "Be long."), turn("user", "Name a river.")]},
        {"messages": [turn("system", "Be brief."), turn("user", "Name a lake.")]},
        {"messages": [turn("system", "Be brief."), turn("user", "Name a river.")], "context": "ctx_1"},
        {"messages": [turn("system", "Be brief."), turn("user", "Name a river.")], "prompt_cache_key": "k"},
    ],
)
def test_other_conversations_have_other_keys(other: dict[str, Any]) -> None:
    one = affinity_of(CHAT, {"messages": [turn("system", "Be brief."), turn("user", "Name a river.")]}, "a")
    assert affinity_of(CHAT, other, "a") != one


def test_a_context_has_one_key_wherever_it_is_named() -> None:
    expected = Affinity(context_key("ctx_1", "a"))
    assert affinity_of("/v1/contexts/ctx_1", None, "a") == expected
    assert affinity_of("/v1/contexts/ctx_1/extend", {"text": "more"}, "a") == expected
    assert affinity_of(CHAT, {"context": "ctx_1", "messages": [turn("user", "What?")]}, "a") == expected


def test_callers_have_nothing_in_common() -> None:
    for path, body in [("/v1/contexts/ctx_1", None), (CHAT, {"messages": [turn("user", "Hi")]}), (CHAT, {"user": "u"})]:
        assert affinity_of(path, body, "a") != affinity_of(path, body, "b")


@pytest.mark.parametrize(
    "body", [None, [], "x", 3, {}, {"messages": []}, {"messages": 3}, {"prompt": "short"}, {"user": 1}]
)
def test_what_is_tied_to_nothing(body: Any) -> None:
    assert affinity_of(CHAT, body, "a") is None


# -- who gets them -----------------------------------------------------------------------------------------------------


@given(st.text(max_size=20), NAMES)
def test_rendezvous_moves_only_the_keys_of_who_goes(key: str, names: set[str]) -> None:
    order = rendezvous(key, names)
    assert sorted(order) == sorted(names)
    for gone in names:
        assert rendezvous(key, names - {gone}) == [name for name in order if name != gone]


def test_rendezvous_spreads_keys() -> None:
    firsts = [rendezvous(str(i), ["a", "b", "c", "d"])[0] for i in range(1000)]
    assert all(180 < firsts.count(name) < 320 for name in "abcd")


@given(
    st.dictionaries(st.sampled_from("abcde"), st.integers(0, 20), min_size=1),
    st.one_of(st.none(), st.builds(Affinity, st.text(max_size=5), st.booleans())),
    st.one_of(st.none(), st.sampled_from("abcdef")),
    st.integers(0, 5),
)
def test_ranked(loads: dict[str, int], affinity: Affinity | None, holder: str | None, slack: int) -> None:
    groups = ranked(loads, affinity, holder, slack)
    assert sorted(name for group in groups for name in group) == sorted(loads)  # all, each once
    if affinity is None or len(loads) == 1:
        assert len(groups) == 1
        return
    (first,), least = groups[0], min(loads.values())
    assert loads[first] <= least + slack
    if holder in loads:
        assert first == holder or loads[holder] > least + slack
    elif affinity.is_new:
        assert loads[first] == least
    else:
        assert first == next(name for name in rendezvous(affinity.key, loads) if loads[name] <= least + slack)


def test_holders_forget_the_least_recently_used() -> None:
    holders = Holders(most=2)
    for key, replica in [("a", "1"), ("b", "2"), ("a", "3"), ("c", "4")]:
        holders.note(key, replica)
    assert [holders.of(key) for key in "abc"] == ["3", None, "4"]


# -- processors --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 16))
def test_replicas_share_no_processor(count: int, num_cpus: int) -> None:
    cpus = list(range(num_cpus))
    replicas = [cpus_of(rank, count, cpus) for rank in range(num_cpus // count)]
    taken = [cpu for replica in replicas for cpu in replica]
    assert len(taken) == len(set(taken)) == num_cpus // count * count
    with pytest.raises(CrushError, match="cores must leave"):
        cpus_of(num_cpus // count, count, cpus)


def test_threads_of_one_core_stand_beside_each_other(tmp_path: Path) -> None:
    for cpu, (socket, core) in enumerate([(0, 0), (0, 1), (1, 0), (0, 0), (0, 1), (1, 0)]):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{socket}\n")
        (folder / "core_id").write_text(f"{core}\n")
    assert cpus_by_core(range(6), tmp_path) == [0, 3, 1, 4, 2, 5]
    assert cpus_by_core([5, 4], tmp_path / "absent") == [4, 5]


def test_pin_binds_all_threads() -> None:
    before = os.sched_getaffinity(0)
    try:
        pin([min(before)])
        assert {frozenset(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")} == {
            frozenset([min(before)])
        }
    finally:
        pin(before)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_from_the_command_line() -> None:
    settings, server = parse_settings({"replicas": "2", "cores": "4", "max_kv_mb": "512", "api_keys": "k"})
    assert (settings.min_replicas, settings.max_replicas, settings.cores) == (2, 2, 4)
    assert (server.max_kv_mb, server.api_keys) == (512, ("k",))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"max_replica": 2}, "max_replica"),
        ({"cores": "many"}, "cores"),
        ({"cores": 0}, "cores must be"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas must be at least"),
        ({"port": 80}, "http_options"),
        ({"max_waiting": 0}, "max_waiting must be"),
    ],
)
def test_settings_are_refused_by_field(args: dict[str, Any], message: str) -> None:
    with pytest.raises(CrushError, match=message):
        parse_settings(args)


# -- an app in another process -----------------------------------------------------------------------------------------

REQUEST = HttpRequest("POST", CHAT, b"", ((b"content-type", b"application/json"),), b"{}")


def test_an_app_answers_piece_by_piece() -> None:
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 201, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": scope["method"].encode(), "more_body": True})
        await send({"type": "http.response.body", "body": body})

    async def run() -> list[Any]:
        return [piece async for piece in answer(app, REQUEST, "r")]

    assert asyncio.run(run()) == [ResponseStart(201, ((b"a", b"b"),), "r"), b"POST", b"{}"]


def test_an_app_is_told_that_its_client_went_away() -> None:
    told = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        told.append((await receive())["type"])

    async def run() -> None:
        pieces = answer(app, REQUEST, "r")
        await anext(pieces)
        await pieces.aclose()

    asyncio.run(run())
    assert told == ["http.disconnect"]


def test_an_error_of_the_app_is_raised() -> None:
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        raise KeyError("x")

    async def run() -> None:
        async for _ in answer(app, REQUEST, "r"):
            pass

    with pytest.raises(KeyError):
        asyncio.run(run())


# -- the gateway -------------------------------------------------------------------------------------------------------

EVENTS = ((b"content-type", b"text/event-stream"),)
JSON = ((b"content-type", b"application/json"),)
ROLE = b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
TOKEN = b'data: {"choices": [{"delta": {"content": "Hi"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


class Pieces:
    """What a replica sends; an exception is raised where it stands."""

    def __init__(self, script: list[Any]) -> None:
        self._script = iter(script)
        self.is_cancelled = False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        for piece in self._script:
            if isinstance(piece, BaseException):
                raise piece
            return piece
        raise StopAsyncIteration

    def cancel(self) -> None:
        self.is_cancelled = True


class Replicas:
    """In place of Serve's handle: the n-th request is answered by the n-th script."""

    def __init__(self, *scripts: list[Any]) -> None:
        self._scripts = list(scripts)
        self.asked: list[HttpRequest] = []
        self.sent: list[Pieces] = []

    def options(self, **_: Any) -> Replicas:
        return self

    def remote(self, request: HttpRequest) -> Pieces:
        self.asked.append(request)
        self.sent.append(Pieces(self._scripts.pop(0)))
        return self.sent[-1]


def ask(
    gateway: Gateway, body: bytes = b"{}", path: str = CHAT, client: str = "127.0.0.1", method: str = "POST"
) -> tuple[int, bytes, dict[str, str]]:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def run() -> tuple[int, bytes, dict[str, str]]:
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "client": (client, 1)}
        response = await gateway(Request({**scope, "headers": list(JSON), "server": ("h", 80)}, receive))
        if isinstance(response, StreamingResponse):
            content = b"".join([bytes(piece) async for piece in response.body_iterator])
        else:
            content = bytes(response.body)
        return response.status_code, content, dict(response.headers)

    return asyncio.run(run())


def gateway_to(*scripts: list[Any], **settings: Any) -> tuple[Gateway, Replicas]:
    replicas = Replicas(*scripts)
    return Gateway(RaySettings(**settings), ServerSettings(), replicas), replicas


def test_a_replica_that_dies_before_the_first_token_is_not_seen() -> None:
    gateway, replicas = gateway_to(
        [ActorDiedError()],
        [ResponseStart(200, EVENTS, "a"), ROLE, ActorDiedError()],
        [ResponseStart(200, EVENTS, "b"), ROLE, TOKEN, DONE],
    )
    assert ask(gateway)[:2] == (200, ROLE + TOKEN + DONE)
    assert len(replicas.asked) == 3


def test_a_replica_that_dies_in_an_answer_ends_it_with_an_error() -> None:
    gateway, replicas = gateway_to([ResponseStart(200, EVENTS, "a"), ROLE, TOKEN, ActorDiedError()])
    status, content, _ = ask(gateway)
    assert (status, content[: len(ROLE + TOKEN)]) == (200, ROLE + TOKEN)
    assert b"is gone; send the request again" in content
    assert DONE not in content
    assert len(replicas.asked) == 1


def test_an_answer_without_a_stream_can_be_had_from_another_replica_to_its_end() -> None:
    gateway, _ = gateway_to(
        [ResponseStart(200, JSON, "a"), b'{"choices', ActorDiedError()],
        [ResponseStart(200, JSON, "b"), b'{"choices": 1}'],
    )
    assert ask(gateway)[:2] == (200, b'{"choices": 1}')


def test_a_request_is_not_sent_for_ever() -> None:
    gateway, replicas = gateway_to([ActorDiedError()], [ActorDiedError()], [ActorDiedError()], tries=2)
    status, content, headers = ask(gateway)
    assert (status, len(replicas.asked)) == (503, 2)
    assert b"send it again" in content
    assert "retry-after" in headers


def test_an_error_of_the_server_is_not_sent_elsewhere() -> None:
    gateway, replicas = gateway_to([RayTaskError("answer", "traceback", ValueError("x"))], [])
    with pytest.raises(RayTaskError):
        ask(gateway)
    assert len(replicas.asked) == 1


def test_a_full_queue_is_429() -> None:
    gateway, _ = gateway_to([BackPressureError(num_queued_requests=1, max_queued_requests=1)])
    status, _, headers = ask(gateway)
    assert (status, headers["retry-after"]) == (429, "1")


def test_later_turns_name_who_answered_the_first() -> None:
    whole = [ResponseStart(200, JSON, "a"), b"{}"]
    gateway, replicas = gateway_to(whole, whole)
    ask(gateway, b'{"messages": [{"role": "user", "content": "Hi"}]}')
    ask(gateway, b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}')
    assert [request.holder for request in replicas.asked] == [None, "a"]


def test_a_context_is_held_by_who_made_it() -> None:
    gateway, replicas = gateway_to(
        [ResponseStart(201, JSON, "a"), b'{"id": "ctx_1"}'], [ResponseStart(200, JSON, "a"), b"{}"]
    )
    ask(gateway, b'{"text": "long"}', "/v1/contexts")
    ask(gateway, b'{"context": "ctx_1"}')
    assert [request.holder for request in replicas.asked] == [None, "a"]


def test_without_keys_only_this_machine_may_ask() -> None:
    gateway, replicas = gateway_to([])
    assert ask(gateway, client="192.0.2.1")[0] == 403
    assert not replicas.asked


def test_bodies_have_a_limit() -> None:
    replicas = Replicas()
    gateway = Gateway(RaySettings(), ServerSettings(max_body_mb=1), replicas)  # type: ignore[arg-type]
    assert ask(gateway, b"x" * (1 << 20) + b"x")[0] == 413
    assert not replicas.asked


def test_figures_of_all_replicas_are_one_text() -> None:
    text = '# HELP a_total A\n# TYPE a_total counter\na_total{end="stop"} 2\n# HELP b B\n# TYPE b gauge\nb 1\n'
    families = list(text_string_to_metric_families(labelled([("r1", text), ("r2", text)]).decode()))
    assert [family.name for family in families] == ["a", "b"]
    assert [sample.labels for sample in families[0].samples] == [
        {"end": "stop", "replica": "r1"},
        {"end": "stop", "replica": "r2"},
    ]
