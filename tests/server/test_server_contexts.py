"""Contexts over HTTP: made, asked, owned, moved to files and back; and a disk that is full."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from served import Served, metric, served

from ov_kvcrush import ContinuousBatchingPipeline
from ov_kvcrush.contexts import file as context_file
from ov_kvcrush.server.settings import ServerSettings

TEXT = "The code of the vault is 4711. " + "The weather was mild and the road was long. " * 30
ALICE, BOB = ({"Authorization": f"Bearer key-of-{name}"} for name in ("alice", "bob"))


def ask(server: Served, name: str, who: dict[str, str] = ALICE) -> httpx.Response:
    body: dict[str, Any] = {
        "model": "smol", "context": name, "max_tokens": 8, "temperature": 0,
        "messages": [{"role": "user", "content": "What is the code of the vault?"}],
    }  # fmt: skip
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=who, timeout=60)


def make(server: Served, **fields: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}/v1/contexts", json={"text": TEXT, **fields}, headers=ALICE, timeout=120)
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_context_is_asked_by_its_owner_only(server: Served) -> None:
    made = make(server, budget="1/4", protect=["4711"], name="vault")
    assert made["kept_tokens"] <= made["num_tokens"]
    assert made["on_disk"]
    answer = ask(server, made["id"])
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == made["num_tokens"]
    for path in ("", "/file"):
        assert httpx.get(f"{server.url}/v1/contexts/{made['id']}{path}", headers=BOB).status_code == 404
    nothing = ask(server, "ctx_" + "0" * 32, BOB).json()
    assert ask(server, made["id"], BOB).json() == nothing
    assert httpx.get(f"{server.url}/v1/contexts", headers=BOB).json()["data"] == []
    listed = httpx.get(f"{server.url}/v1/contexts", headers=ALICE).json()["data"]
    assert [x["name"] for x in listed] == ["vault"]
    shown = httpx.get(f"{server.url}/v1/contexts/{made['id']}", params={"kept_map": "true"}, headers=ALICE).json()
    assert len(shown["kept_map"]["kept"]) == len(shown["kept_map"]["texts"]) == made["num_tokens"]
    assert "4711" in "".join(shown["kept_map"]["texts"])
    assert httpx.delete(f"{server.url}/v1/contexts/{made['id']}", headers=BOB).status_code == 404
    assert httpx.delete(f"{server.url}/v1/contexts/{made['id']}", headers=ALICE).status_code == 200
    assert ask(server, made["id"]).status_code == 404


def test_extended_forked_downloaded_and_uploaded(server: Served) -> None:
    made = make(server, policy="none")
    url = f"{server.url}/v1/contexts"
    longer = httpx.post(f"{url}/{made['id']}/extend", json={"text": " Then it rained."}, headers=ALICE, timeout=60)
    assert longer.json()["num_tokens"] > made["num_tokens"]
    forked = httpx.post(f"{url}/{made['id']}/fork", headers=ALICE).json()
    assert forked["kv_bytes"] == made["kv_bytes"]
    data = httpx.get(f"{url}/{made['id']}/file", headers=ALICE).content
    media = {"Content-Type": "application/octet-stream"}
    loaded = httpx.post(url, content=data, headers={**BOB, **media}, timeout=60)
    assert loaded.json()["num_tokens"] == made["num_tokens"]
    assert ask(server, loaded.json()["id"], BOB).status_code == 200
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 1
    assert httpx.post(url, content=bytes(damaged), headers={**BOB, **media}).status_code == 400
    form = httpx.post(url, files={"file": ("a.txt", TEXT)}, data={"policy": "none"}, headers=ALICE, timeout=60)
    assert (form.status_code, form.json()["name"]) == (201, "a.txt")


def test_contexts_leave_the_store_and_come_back_also_after_a_restart(
    server: Served, settings: ServerSettings, pipeline: ContinuousBatchingPipeline
) -> None:
    made = make(server, policy="none", name="kept")
    before = ask(server, made["id"]).json()["choices"][0]["message"]["content"]
    server.state.contexts._shrink(server.state.contexts._limit)
    assert ask(server, made["id"]).json()["choices"][0]["message"]["content"] == before
    assert metric(server.state, "context_loads_total") == 1
    with served(settings, pipeline) as again:
        assert ask(again, made["id"]).json()["choices"][0]["message"]["content"] == before
        assert ask(again, made["id"], BOB).status_code == 404


def test_a_full_disk_keeps_contexts_in_the_store(
    server: Served, alice: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(context_file, "atomic_write", full)
        made = make(server, policy="none", protect=["mild"])
        assert not made["on_disk"]
        assert ask(server, made["id"]).status_code == 200
    assert make(server, policy="none", protect=["long"])["on_disk"]
