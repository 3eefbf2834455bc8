"""Two replicas on Ray Serve in processes of their own, each on one processor; a run takes minutes."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conversations import counters, load

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")

from ov_kvcrush.server.ray import app  # noqa: E402  # Ray is there

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="each replica has a processor of its own"),
]
MODEL = "tiny"


# A process of Ray's imports for seconds before it answers, on a machine that does other things for longer than Serve
# waits by default: it would kill its proxy, and start another, three times 5 s after it was begun.
PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "180", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60"}


@pytest.fixture(scope="module")
def gateway() -> Iterator[str]:
    """Where it will listen: Ray and Serve run, without an application."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PATIENCE.items():  # of all processes that `ray.init` starts
            patch.setenv(name, value)
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.fixture(scope="module")
def settings(shallow: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    contexts = str(tmp_path_factory.mktemp("contexts"))
    return {"model": str(shallow), "alias": MODEL, "cores": 1, "max_kv_mb": 128, "contexts_dir": contexts}


@pytest.fixture(scope="module")
def url(gateway: str, settings: dict[str, Any]) -> str:
    """Where two replicas answer."""
    serve.run(app({**settings, "replicas": 2}))
    return gateway


def kill_one(replica: str) -> None:
    """End the process of a replica at once, as a lack of memory would."""
    names = [x for x in ray.util.list_named_actors(all_namespaces=True) if x["name"].endswith(replica)]
    assert len(names) == 1, names
    ray.kill(ray.get_actor(names[0]["name"], namespace=names[0]["namespace"]), no_restart=True)


def replicas_of(url: str) -> set[str]:
    """Names of those that answer."""
    return {name for name in counters(url, "ov_kvcrush_prompt_tokens", "replica") if name}


def wait_for(url: str, count: int) -> None:
    end = time.monotonic() + 300
    while len(found := replicas_of(url)) != count:
        assert time.monotonic() < end, f"Serve must have {count} replicas, got {found}"
        time.sleep(1)


def run(url: str, turns: int = 3, conversations: int = 1) -> dict[str, int]:
    return dict(asyncio.run(load(url, MODEL, 6, conversations, turns, 16)).ends)


def test_later_turns_go_to_who_answered_the_first(url: str) -> None:
    before = counters(url, "ov_kvcrush_routed", "affinity")
    assert run(url) == {"whole": 18}
    after = counters(url, "ov_kvcrush_routed", "affinity")
    assert {name: after[name] - before.get(name, 0) for name in ("new", "holder")} == {"new": 6, "holder": 12}
    assert all(n > 0 for name, n in counters(url, "ov_kvcrush_generation_tokens", "replica").items() if name)


def test_a_client_that_goes_away_ends_its_request(url: str) -> None:
    def ended() -> float:
        return sum(n for end, n in counters(url, "ov_kvcrush_requests", "end").items() if "cancel" in end.lower())

    before = ended()
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Count."}], "max_tokens": 2000, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**body, "ignore_eos": True}, timeout=60) as response:
        assert response.status_code == 200, response.read()
        next(response.iter_bytes())
    end = time.monotonic() + 60
    while ended() == before:
        assert time.monotonic() < end, "the request went on without its client"
        time.sleep(0.2)


def test_a_context_outlives_the_replica_that_made_it(url: str) -> None:
    made = httpx.post(f"{url}/v1/contexts", json={"text": "The code of the door is 4711. " * 40}, timeout=300)
    assert made.status_code < 300, made.text
    context = made.json()["id"]
    question = [{"role": "user", "content": "Which code?"}]
    ask = {"model": MODEL, "context": context, "messages": question, "max_tokens": 8, "temperature": 0}
    before = counters(url, "ov_kvcrush_context_hits", "replica")
    first = httpx.post(f"{url}/v1/chat/completions", json=ask, timeout=60).json()
    after = counters(url, "ov_kvcrush_context_hits", "replica")
    (holder,) = [name for name in after if after[name] > before.get(name, 0)]
    kill_one(holder)
    second = httpx.post(f"{url}/v1/chat/completions", json=ask, timeout=60).json()
    assert second["choices"][0]["message"] == first["choices"][0]["message"]
    wait_for(url, 2)
    assert httpx.delete(f"{url}/v1/contexts/{context}", timeout=60).status_code < 300
    assert httpx.post(f"{url}/v1/chat/completions", json=ask, timeout=60).status_code == 404


def test_a_replica_that_dies_costs_its_running_answers_and_nothing_else(url: str) -> None:
    wait_for(url, 2)

    async def both() -> dict[str, int]:
        running = asyncio.create_task(load(url, MODEL, 6, 4, 3, 48))
        await asyncio.sleep(3)
        kill_one(sorted(await asyncio.to_thread(replicas_of, url))[0])
        return dict((await running).ends)

    ends = asyncio.run(both())
    assert sum(ends.values()) == 72
    assert set(ends) <= {"whole", "error lost"}, ends
    assert ends.get("error lost", 0) <= 6  # at most what was running
    wait_for(url, 2)
    assert run(url) == {"whole": 18}


def test_a_queue_is_answered_by_another_replica(gateway: str, settings: dict[str, Any]) -> None:
    """The last one here: its application takes the place of that of the others."""
    serve.delete("default")
    serve.run(app({**settings, "max_replicas": 2, "target_ongoing": 2, "upscale_delay_s": 1, "downscale_delay_s": 5}))
    wait_for(gateway, 1)

    async def until_there_are_two() -> dict[str, int]:
        """Six clients go on asking, where a replica is to have two of them."""
        ends: Counter[str] = Counter()
        while len(await asyncio.to_thread(replicas_of, gateway)) < 2:
            ends += (await load(gateway, MODEL, 6, 1, 2, 48)).ends
            assert sum(ends.values()) < 6000, "no replica came"
        ends += (await load(gateway, MODEL, 6, 2, 2, 48)).ends
        return dict(ends)

    assert set(asyncio.run(until_there_are_two())) == {"whole"}
    assert all(n > 0 for name, n in counters(gateway, "ov_kvcrush_generation_tokens", "replica").items() if name)
    wait_for(gateway, 1)  # nobody asks any more
    assert run(gateway) == {"whole": 18}
