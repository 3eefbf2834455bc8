"""What goes wrong between a client and the server: each fault has its answer, and the next request works."""

from __future__ import annotations

import asyncio
import json
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Served, metric, served, until

from ov_kvcrush import ContinuousBatchingPipeline
from ov_kvcrush.errors import CrushError
from ov_kvcrush.server.keys import make_owners
from ov_kvcrush.server.settings import ServerSettings

ALICE, BOB = ({"Authorization": f"Bearer key-of-{name}"} for name in ("alice", "bob"))
TEXT = "The code of the vault is 4711. " + "The weather was mild and the road was long. " * 30
MB = 1 << 20
HEAD = (
    "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    "Authorization: Bearer key-of-alice\r\n"
)


def body_of(server: Served, **fields: Any) -> dict[str, Any]:
    return {"model": server.model, "prompt": "One, two,", "max_tokens": 4, "ignore_eos": True, **fields}


def ask(server: Served, who: dict[str, str] = ALICE, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=body_of(server, **fields), headers=who, timeout=120)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """It, in OpenAI's shape."""
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    return error


def works(server: Served) -> None:
    answer = ask(server)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 4


def connected(server: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=120)


def answer_on(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and JSON of an answer after which the server closes."""
    found = b""
    while piece := connection.recv(1 << 16):
        found += piece
    head, _, content = found.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower(), found
    return int(head.split()[1]), json.loads(content)


# -- clients that go ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_is_killed_has_its_request_cancelled(quick: Served, stream: bool) -> None:
    before = metric(quick.state, "requests_total", end="cancelled")
    content = json.dumps(body_of(quick, max_tokens=8000, stream=stream))
    connection = connected(quick)
    connection.sendall(f"{HEAD}Content-Length: {len(content)}\r\n\r\n{content}".encode())
    if stream:
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    else:
        until(lambda: quick.state.pipeline.get_metrics().requests == 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, as of a dead process
    connection.close()
    until(lambda: metric(quick.state, "requests_total", end="cancelled") == before + 1)
    until(lambda: quick.state.pipeline.get_metrics().requests == 0)
    works(quick)


# -- bodies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_told", [True, False])
def test_a_body_of_100_mb_is_refused_before_it_is_read(quick: Served, is_told: bool) -> None:
    kind = f"Content-Length: {100 * MB}" if is_told else "Transfer-Encoding: chunked"
    piece = b" " * MB if is_told else b"%x\r\n%s\r\n" % (MB, b" " * MB)
    num_sent = 0
    with connected(quick) as connection:
        connection.sendall(f"{HEAD}{kind}\r\n\r\n".encode())
        connection.setblocking(False)
        while num_sent < 100 * len(piece):
            readable, writable, _ = select.select([connection], [connection], [], 120)
            if readable:
                break
            assert writable, "the server neither read nor answered"
            num_sent += connection.send(piece[num_sent % len(piece) :])
        connection.setblocking(True)
        connection.settimeout(120)
        status, answer = answer_on(connection)
    assert (status, answer["error"]["code"]) == (413, "request_too_large")
    assert num_sent < 50 * MB  # its limit of 16 and what sockets hold
    works(quick)


def test_a_client_that_sends_it_all_first_has_its_413(quick: Served) -> None:
    answer = httpx.post(f"{quick.url}/v1/completions", content=b" " * 100 * MB, headers=ALICE, timeout=120)
    assert answer.status_code == 413
    assert "at most" in error_of(answer)["message"]
    works(quick)


@pytest.fixture(scope="module")
def impatient(quick_settings: ServerSettings, quick_pipeline: ContinuousBatchingPipeline) -> Iterator[Served]:
    with served(replace(quick_settings, idle_timeout_s=2, body_timeout_s=2), quick_pipeline) as one:
        yield one


def test_a_body_that_does_not_come_is_408(impatient: Served) -> None:
    with connected(impatient) as connection:
        connection.sendall(f'{HEAD}Content-Length: 1000\r\n\r\n{{"model":'.encode())
        status, answer = answer_on(connection)
    assert (status, answer["error"]["code"]) == (408, "request_timeout")
    works(impatient)


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
def test_a_body_that_nobody_reads_does_not_hold_its_connection(impatient: Served, path: str) -> None:
    with connected(impatient) as connection:
        key = ALICE["Authorization"]
        connection.sendall(
            f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\nContent-Length: 9\r\n\r\n".encode()
        )
        assert answer_on(connection)[0] == 200
    works(impatient)


# -- connections -------------------------------------------------------------------------------------------------------


def test_connections_that_say_nothing_keep_nobody_waiting_and_are_closed(impatient: Served) -> None:
    silent = [connected(impatient) for _ in range(200)]
    for connection in silent[::4]:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost:")
    try:
        works(impatient)
        for connection in silent:
            assert connection.recv(1) == b""
    finally:
        for connection in silent:
            connection.close()
    works(impatient)


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [None, "Bearer key-of-alic", "Bearer key-of-alicee", "key-of-alice", "Bearer \xe4"])
def test_a_wrong_key_is_refused_on_every_path(quick: Served, header: str | None) -> None:
    who = {"Authorization": header.encode("latin-1")} if header is not None else {}
    for path in ("completions", "chat/completions", "responses", "contexts", "contexts/ctx_0/extend", "nothing"):
        answer = httpx.post(f"{quick.url}/v1/{path}", json={}, headers=who, timeout=120)
        assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
    works(quick)


def test_a_context_of_another_key_is_as_one_that_never_was(quick: Served) -> None:
    url = f"{quick.url}/v1/contexts"
    made = make(quick, policy="none")
    never = "ctx_" + "0" * 32

    def tried(name: str) -> list[tuple[int, str]]:
        with httpx.Client(headers=BOB, timeout=120) as bob:
            answers = [bob.get(f"{url}/{name}"), bob.get(f"{url}/{name}/file"), bob.delete(f"{url}/{name}")]
            answers += [bob.post(f"{url}/{name}/extend", json={"text": "x"}), bob.post(f"{url}/{name}/fork")]
        answers.append(ask(quick, BOB, context=name))
        return [(answer.status_code, answer.text.replace(name, "")) for answer in answers]

    assert tried(made["id"]) == tried(never)
    assert {status for status, _ in tried(never)} == {404}
    assert ask(quick, context=made["id"]).status_code == 200
    works(quick)


def test_a_schema_of_another_key_takes_what_a_new_one_takes(
    quick: Served, quick_pipeline: ContinuousBatchingPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars: Any = quick_pipeline._backend.grammars  # type: ignore[attr-defined]
    compiled: list[str] = []

    def compile(kind: str, grammar: str, *rest: Any, then: Any = grammars._compile) -> Any:
        compiled.append(grammar)
        return then(kind, grammar, *rest)

    monkeypatch.setattr(grammars, "_compile", compile)
    schema = {"type": "object", "properties": {"vault": {"type": "integer"}}, "required": ["vault"]}
    form = {"type": "json_schema", "json_schema": {"name": "vault", "schema": schema}}
    for who, count in ((ALICE, 1), (ALICE, 1), (BOB, 2), (BOB, 2), (ALICE, 2)):
        assert ask(quick, who, response_format=form).status_code == 200
        assert len(compiled) == count


# -- contexts ----------------------------------------------------------------------------------------------------------


def make(server: Served, **fields: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}/v1/contexts", json={"text": TEXT, **fields}, headers=ALICE, timeout=120)
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


@contextmanager
def no_long_files() -> Iterator[None]:
    """No file of this process grows beyond 64 KiB, whoever writes it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files_of(settings: ServerSettings) -> set[Path]:
    return {path for path in Path(str(settings.contexts_dir)).rglob("*") if path.is_file()}


def test_a_full_disk_keeps_contexts_in_the_store(quick: Served, quick_settings: ServerSettings) -> None:
    before = files_of(quick_settings)
    with no_long_files():
        made = make(quick, policy="none", protect=["mild"])
        assert not made["on_disk"]
        file = httpx.get(f"{quick.url}/v1/contexts/{made['id']}/file", headers=ALICE, timeout=120)
        assert (file.status_code, error_of(file)["code"]) == (507, "insufficient_storage")
        assert ask(quick, context=made["id"]).status_code == 200
    assert files_of(quick_settings) == before
    assert make(quick, policy="none", protect=["long"])["on_disk"]
    assert httpx.get(f"{quick.url}/v1/contexts/{made['id']}/file", headers=ALICE, timeout=120).status_code == 200
    works(quick)


def test_a_folder_that_cannot_be_written_keeps_contexts_in_the_store(
    quick_settings: ServerSettings, quick_pipeline: ContinuousBatchingPipeline, tmp_path: Path
) -> None:
    folder = tmp_path / "contexts"
    with served(replace(quick_settings, contexts_dir=folder), quick_pipeline) as server:
        shutil.rmtree(folder)
        folder.write_text("")  # also root cannot make a file in it
        made = make(server, policy="none")
        assert not made["on_disk"]
        assert ask(server, context=made["id"]).status_code == 200
        assert [x["id"] for x in httpx.get(f"{server.url}/v1/contexts", headers=ALICE).json()["data"]] == [made["id"]]
        folder.unlink()
        folder.mkdir()
        assert make(server, policy="none")["on_disk"]
        assert httpx.delete(f"{server.url}/v1/contexts/{made['id']}", headers=ALICE).status_code == 200
        works(server)
    (tmp_path / "file").write_text("")
    with pytest.raises(CrushError, match="contexts_dir must be a folder that can be written"):
        make_owners(("key",), tmp_path / "file")


def test_clients_of_one_context_hold_its_bytes_once(quick: Served, quick_pipeline: ContinuousBatchingPipeline) -> None:
    made = make(quick, text=TEXT * 4, policy="none")
    assert made["num_tokens"] > 1000
    before, most, is_over = metric(quick.state, "kv_bytes"), [0.0], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.01):
            most.append(metric(quick.state, "kv_bytes"))

    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(headers=ALICE, timeout=300) as client:
            bodies = [body_of(quick, prompt=f"Question {i}", max_tokens=16, context=made["id"]) for i in range(20)]
            posts = [client.post(f"{quick.url}/v1/completions", json=body) for body in bodies]
            return list(await asyncio.gather(*posts))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        answers = asyncio.run(run())
    finally:
        is_over.set()
        watcher.join()
    assert [answer.status_code for answer in answers] == [200] * 20
    for answer in answers:
        assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == made["num_tokens"]
    # Of each: question and answer, beside what rounds up to whole blocks; far from a copy of the context.
    tail = quick_pipeline.bf16_kv_bytes(128)
    assert before < max(most) <= before + 20 * tail < before + 20 * made["kv_bytes"] / 4


# -- the end -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def process(shallow: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`ov_kvcrush-serve` as a process, ready, and where it is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "ov_kvcrush.server.main", str(shallow), "--alias", "m", "--max-kv-mb", "64"]
    with subprocess.Popen([*command, "--port", url.rsplit(":", 1)[1]], stderr=subprocess.DEVNULL) as server:
        try:
            until(lambda: server.poll() is not None or _status(url) == 200, 300)
            yield server, url
        finally:
            server.kill()


def _status(url: str) -> int:
    try:
        return httpx.get(f"{url}/ready", timeout=60).status_code
    except httpx.TransportError:
        return 0


class Running:
    """A stream in a thread of its own."""

    def __init__(self, url: str, max_tokens: int) -> None:
        self.events: list[str] = []
        self.is_broken = False
        self._url = url
        self._body = {"model": "m", "prompt": "One,", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        options = {"stream_options": {"include_usage": True}}
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", json=self._body | options, timeout=300) as answer:
                for line in answer.iter_lines():
                    if line:
                        self.events.append(line.removeprefix("data: "))
        except httpx.TransportError:
            self.is_broken = True

    def end(self) -> None:
        self._thread.join(300)
        assert not self._thread.is_alive()


def test_sigterm_under_load_lets_answers_end_and_refuses_new_ones(process: tuple[subprocess.Popen[bytes], str]) -> None:
    server, url = process
    running = [Running(url, 500) for _ in range(3)]
    until(lambda: all(one.events for one in running))
    server.send_signal(signal.SIGTERM)
    until(lambda: _status(url) == 503)
    refused = httpx.post(f"{url}/v1/completions", json={"model": "m", "prompt": "x"}, timeout=120)
    assert (refused.status_code, error_of(refused)["code"]) == (503, "unavailable")
    assert refused.headers["retry-after"]
    for one in running:
        one.end()
        assert not one.is_broken
        assert one.events[-1] == "[DONE]"
        assert json.loads(one.events[-2])["usage"]["completion_tokens"] == 500
    assert server.wait(120) == 0


def test_a_second_sigterm_ends_at_once(process: tuple[subprocess.Popen[bytes], str]) -> None:
    server, url = process
    running = Running(url, 8000)
    until(lambda: bool(running.events))
    server.send_signal(signal.SIGTERM)
    until(lambda: _status(url) == 503)
    server.send_signal(signal.SIGTERM)
    assert server.wait(120) == 0
    running.end()
    assert "[DONE]" not in running.events  # its answer was not waited for
