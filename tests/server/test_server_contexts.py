"""Contexts over HTTP: made, asked, owned, moved to files and back."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from served import Served, metric, served

from ov_kvcrush import ContinuousBatchingPipeline
from ov_kvcrush.server.settings import ServerSettings

TEXT = "The code of the vault is 4711. " + "The weather was mild and the road was long. " * 30
ALICE, BOB = ({"Authorization": f"Bearer key-of-{name}"} for name in ("alice", "bob"))


def ask(server: Served, name: str, who: dict[str, str] = ALICE) -> httpx.Response:
    body: dict[str, Any] = {
        "model": server.model, "context": name, "max_tokens": 8, "temperature": 0,
        "messages": [{"role": "user", "content": "What is the code of the vault?"}],
    }  # fmt: skip
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=who, timeout=60)


def make(server: Served, **fields: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}/v1/contexts", json={"text": TEXT, **fields}, headers=ALICE, timeout=120)
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_context_is_asked_by_its_owner_only(quick: Served) -> None:
    made = make(quick, budget="1/4", protect=["4711"], name="vault")
    assert made["kept_tokens"] <= made["num_tokens"]
    assert made["on_disk"]
    answer = ask(quick, made["id"])
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == made["num_tokens"]
    for path in ("", "/file"):
        assert httpx.get(f"{quick.url}/v1/contexts/{made['id']}{path}", headers=BOB).status_code == 404
    nothing = ask(quick, "ctx_" + "0" * 32, BOB).json()
    assert ask(quick, made["id"], BOB).json() == nothing
    theirs, mine = (httpx.get(f"{quick.url}/v1/contexts", headers=who).json()["data"] for who in (BOB, ALICE))
    assert made["id"] not in [x["id"] for x in theirs]
    assert (made["id"], "vault") in [(x["id"], x["name"]) for x in mine]
    shown = httpx.get(f"{quick.url}/v1/contexts/{made['id']}", params={"kept_map": "true"}, headers=ALICE).json()
    assert len(shown["kept_map"]["kept"]) == len(shown["kept_map"]["texts"]) == made["num_tokens"]
    assert "4711" in "".join(shown["kept_map"]["texts"])
    assert httpx.delete(f"{quick.url}/v1/contexts/{made['id']}", headers=BOB).status_code == 404
    assert httpx.delete(f"{quick.url}/v1/contexts/{made['id']}", headers=ALICE).status_code == 200
    assert ask(quick, made["id"]).status_code == 404


def test_extended_forked_downloaded_and_uploaded(quick: Served) -> None:
    made = make(quick, policy="none")
    url = f"{quick.url}/v1/contexts"
    longer = httpx.post(f"{url}/{made['id']}/extend", json={"text": " Then it rained."}, headers=ALICE, timeout=60)
    assert longer.json()["num_tokens"] > made["num_tokens"]
    forked = httpx.post(f"{url}/{made['id']}/fork", headers=ALICE).json()
    assert forked["kv_bytes"] == made["kv_bytes"]
    data = httpx.get(f"{url}/{made['id']}/file", headers=ALICE).content
    media = {"Content-Type": "application/octet-stream"}
    loaded = httpx.post(url, content=data, headers={**BOB, **media}, timeout=60)
    assert loaded.json()["num_tokens"] == made["num_tokens"]
    assert ask(quick, loaded.json()["id"], BOB).status_code == 200
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 1
    assert httpx.post(url, content=bytes(damaged), headers={**BOB, **media}).status_code == 400
    form = httpx.post(url, files={"file": ("a.txt", TEXT)}, data={"policy": "none"}, headers=ALICE, timeout=60)
    assert (form.status_code, form.json()["name"]) == (201, "a.txt")


def test_bytes_that_contexts_share_count_once(quick: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts, url = quick.state.contexts, f"{quick.url}/v1/contexts"
    contexts._shrink(contexts._limit)
    stays = metric(quick.state, "context_bytes")  # of contexts that another test could not write
    made, other = make(quick, policy="none"), make(quick, policy="none", text=TEXT[::-1])
    before = metric(quick.state, "context_bytes")
    assert before == stays + made["kv_bytes"] + other["kv_bytes"]
    forked = httpx.post(f"{url}/{made['id']}/fork", headers=ALICE).json()
    assert metric(quick.state, "context_bytes") == before
    longer = httpx.post(f"{url}/{made['id']}/extend", json={"text": " Rain."}, headers=ALICE, timeout=60).json()
    assert before < metric(quick.state, "context_bytes") < before + longer["kv_bytes"] / 2

    def resident() -> set[str]:
        asked = {made["id"], other["id"], forked["id"], longer["id"]}
        listed = httpx.get(url, headers=ALICE).json()["data"]
        return {x["id"] for x in listed if x["resident"]} & asked

    # The oldest has the bytes of those that were made last: it would free nothing by leaving before them.
    for leaves in ({other["id"]}, {longer["id"]}, {forked["id"], made["id"]}):
        stayed = resident()
        monkeypatch.setattr(contexts, "_limit", int(metric(quick.state, "context_bytes")) - 1)
        contexts._shrink()
        assert stayed - resident() == leaves
    assert metric(quick.state, "context_bytes") == stays


def test_contexts_leave_the_store_and_come_back_also_after_a_restart(
    quick: Served, quick_settings: ServerSettings, quick_pipeline: ContinuousBatchingPipeline
) -> None:
    made = make(quick, policy="none", name="kept")
    before = ask(quick, made["id"]).json()["choices"][0]["message"]["content"]
    loads = metric(quick.state, "context_loads_total")
    quick.state.contexts._shrink(quick.state.contexts._limit)
    assert ask(quick, made["id"]).json()["choices"][0]["message"]["content"] == before
    assert metric(quick.state, "context_loads_total") == loads + 1
    with served(quick_settings, quick_pipeline) as again:
        assert ask(again, made["id"]).json()["choices"][0]["message"]["content"] == before
        assert ask(again, made["id"], BOB).status_code == 404
