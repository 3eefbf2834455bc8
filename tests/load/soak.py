"""A long run of mixed load on one server: does its memory grow, does anything fail?

    python tests/load/soak.py                          # the default model, 30 minutes
    python tests/load/soak.py MODEL --minutes 3 --clients 8

Clients chat, stream, go away in mid-stream, make, ask and delete contexts, want JSON, and send what is malformed, at
random. Prints a row each interval, and at the end how much the process grew in the second half of the run, by which its
caches are full. Exit code 1 where an answer was not the one that a request must have.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any

import httpx
from load import model_name, resident_mib, server
from workload import messages

Kind = Callable[["Soak", str], Awaitable[str | None]]


class Soak:
    """Clients of one server; what each kind of request came to."""

    def __init__(self, client: httpx.AsyncClient, model: str, end: float) -> None:
        self.client = client
        self.model = model
        self.end = end
        self.rng = random.Random(1)
        self.ends: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self._number = 0

    async def run(self) -> None:
        """One client, until the time is over."""
        kinds: list[Kind] = [chat, chat, stream, stream, leave, leave_whole, several, schema, context, malformed]
        while time.monotonic() < self.end:
            kind = self.rng.choice(kinds)
            try:
                wrong = await kind(self, kind.__name__)
            except httpx.TransportError as error:
                wrong = type(error).__name__
            self.ends[kind.__name__] += 1
            if wrong is not None:
                self.errors[f"{kind.__name__}: {wrong}"] += 1

    def asked(self, **fields: Any) -> dict[str, Any]:
        """A question that nobody has asked."""
        self._number += 1
        said = messages(0, self._number, self.rng.choice([8, 64, 400]))
        return {"model": self.model, "messages": said, "max_tokens": self.rng.randint(1, 48), **fields}

    async def post(self, body: Any, path: str = "chat/completions") -> httpx.Response:
        """Ask it."""
        return await self.client.post(f"/v1/{path}", json=body)


def _unless(answer: httpx.Response, status: int) -> str | None:
    return None if answer.status_code == status else f"{answer.status_code} {answer.text[:200]}"


async def chat(soak: Soak, _: str) -> str | None:
    return _unless(await soak.post(soak.asked()), 200)


async def stream(soak: Soak, _: str) -> str | None:
    async with soak.client.stream("POST", "/v1/chat/completions", json=soak.asked(stream=True)) as answer:
        lines = [line async for line in answer.aiter_lines() if line]
    return None if answer.status_code == 200 and lines[-1] == "data: [DONE]" else f"{answer.status_code} {lines[-1]}"


async def leave(soak: Soak, _: str) -> str | None:
    body = soak.asked(stream=True, ignore_eos=True) | {"max_tokens": 2000}
    async with soak.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for _line in answer.aiter_lines():
            break
    return None if answer.status_code == 200 else str(answer.status_code)


async def leave_whole(soak: Soak, _: str) -> str | None:
    try:
        await asyncio.wait_for(soak.post(soak.asked(ignore_eos=True) | {"max_tokens": 2000}), soak.rng.random())
    except asyncio.TimeoutError:
        return None
    return None


async def several(soak: Soak, _: str) -> str | None:
    return _unless(await soak.post(soak.asked(n=3, logprobs=True, top_logprobs=2)), 200)


async def schema(soak: Soak, _: str) -> str | None:
    name = {"type": "string", "maxLength": soak.rng.randint(1, 9)}
    wanted = {"type": "object", "properties": {"name": name}, "required": ["name"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": wanted}}
    return _unless(await soak.post(soak.asked(response_format=form)), 200)


async def context(soak: Soak, _: str) -> str | None:
    text = soak.asked()["messages"][0]["content"]
    made = await soak.post({"text": text, "budget": "1/4"}, "contexts")
    if made.status_code != 201:
        return _unless(made, 201)
    name = made.json()["id"]
    asked = await soak.post(soak.asked(context=name))
    deleted = await soak.client.delete(f"/v1/contexts/{name}")
    gone = await soak.post(soak.asked(context=name))
    return _unless(asked, 200) or _unless(deleted, 200) or _unless(gone, 404)


async def malformed(soak: Soak, _: str) -> str | None:
    return _unless(await soak.post({**soak.asked(), "temperature": "hot"}), 400)


async def watch(soak: Soak, pid: int, interval: float) -> list[float]:
    """Print a row each interval; returns MiB of the process at each."""
    begin, rows = time.monotonic(), []
    print("| minutes | MiB | kv MiB | requests | errors |\n|---|---|---|---|---|", flush=True)
    while time.monotonic() < soak.end:
        await asyncio.sleep(interval)
        resident = resident_mib(pid)
        if resident is None:
            soak.errors["the server's process is gone"] += 1
            break
        rows.append(resident)
        figures = (await soak.client.get("/metrics")).text
        found = re.search(r"^ov_kvcrush_kv_bytes (\S+)", figures, re.MULTILINE)
        kv = float(found[1]) / (1 << 20) if found else float("nan")
        minutes, asked, wrong = (time.monotonic() - begin) / 60, soak.ends.total(), soak.errors.total()
        print(f"| {minutes:.1f} | {resident:.0f} | {kv:.0f} | {asked} | {wrong} |", flush=True)
    return rows


async def soaked(args: argparse.Namespace, url: str, pid: int) -> int:
    """The run. Returns the exit code."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        soak = Soak(client, model_name(url, ""), time.monotonic() + 60 * args.minutes)
        rows, *_ = await asyncio.gather(watch(soak, pid, args.interval), *(soak.run() for _ in range(args.clients)))
    print("requests:", dict(soak.ends))
    for wrong, count in soak.errors.items():
        print(f"error, {count} times: {wrong}")
    quarter = len(rows) // 4
    if quarter:
        third, last = median(rows[2 * quarter : 3 * quarter]), median(rows[3 * quarter :])
        print(f"from the third quarter to the last the process grew from {third:.0f} to {last:.0f} MiB")
    return 1 if soak.errors else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of an exported model; the default model if omitted")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--interval", type=float, default=10, help="seconds between rows")
    parser.add_argument("--budget", help="as ov_kvcrush-serve --budget")
    parser.add_argument("--max-kv-mb", type=int, default=128, help="as ov_kvcrush-serve --max-kv-mb")
    parser.add_argument("--max-waiting", type=int, help="as ov_kvcrush-serve --max-waiting")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as contexts, server(args, "--contexts", contexts) as (url, pid):
        return asyncio.run(soaked(args, url, pid))


if __name__ == "__main__":
    raise SystemExit(main())
