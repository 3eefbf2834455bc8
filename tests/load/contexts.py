"""Many clients of one long context: how long reading it takes, what it holds, how soon each client has its first token.

    python tests/load/contexts.py                                       # the default model, 8,000 tokens, 20 clients
    python tests/load/contexts.py MODEL --tokens 30000 --clients 20 --json contexts.json

Makes the context over HTTP, asks it with one client, then with all at once; sends the same text as a plain prompt,
which is what a client waits for without a context. Then the server is started anew on the same files: all ask at once
again, and the first of them has the context read from its file. Exit code 1 where a client had no whole answer, or
where the clients held more than their questions and answers beside the context. docs/server_load.md has what came out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from load import machine, model_name, server
from workload import words

_QUESTION = "Which word does this text begin with? Answer, and go on with what comes to your mind."
_PROBE_WORDS = 1000  # of a text that tells how many tokens a word has
_MORE_TOKENS = 128  # of a question and of two tiles
_STREAM = {"stream": True, "temperature": 0, "ignore_eos": True}


class Clients:
    """Clients of one server, of which `failed` tells what was no whole answer. body: fields of all their requests."""

    def __init__(self, http: httpx.AsyncClient, body: dict[str, Any]) -> None:
        self._http = http
        self._body = body
        self.failed: list[str] = []

    async def ask(self, number: int, context: str | None, text: str = "") -> float:
        """Seconds to the first text of an answer, which is read to its end. text: before the question."""
        question = {"role": "user", "content": f"{text}Client {number}. {_QUESTION}"}
        body = self._body | _STREAM | {"messages": [question]} | ({"context": context} if context else {})
        begin, first, data = time.perf_counter(), float("inf"), ""
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                self.failed.append(f"{answer.status_code} {(await answer.aread())[:200]!r}")
                return first
            async for line in answer.aiter_lines():
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()
                if first == float("inf") and _has_text(data):
                    first = time.perf_counter() - begin
        if data != "[DONE]":
            self.failed.append(data[:200])
        return first

    async def ask_together(self, count: int, context: str) -> tuple[list[float], int]:
        """The same of `count` clients at once, ascending, and the most bytes that the store held meanwhile."""
        answers = asyncio.gather(*(self.ask(number, context) for number in range(count)))
        most = 0
        while not answers.done():
            most = max(most, await self.held())
            await asyncio.sleep(0.1)
        return sorted(await answers), most

    async def make(self, text: str, **fields: Any) -> tuple[dict[str, Any], float]:
        """A context, and the seconds until the server had it. Raises httpx.HTTPStatusError."""
        begin = time.perf_counter()
        answer = await self._http.post("/v1/contexts", json={"text": text, **fields})
        answer.raise_for_status()
        return dict(answer.json()), time.perf_counter() - begin

    async def delete(self, context: str) -> None:
        """Have the server forget one."""
        (await self._http.delete(f"/v1/contexts/{context}")).raise_for_status()

    async def held(self) -> int:
        """Bytes in the store."""
        figures = (await self._http.get("/metrics")).text
        found = re.search(r"^ov_kvcrush_kv_bytes (\S+)", figures, re.MULTILINE)
        assert found is not None, figures[:200]
        return int(float(found[1]))


def _has_text(data: str) -> bool:
    choices = json.loads(data).get("choices") if data.startswith("{") else None
    return bool(choices and choices[0]["delta"].get("content"))


async def first_life(clients: Clients, args: argparse.Namespace) -> dict[str, Any]:
    """Make the context and ask it."""
    probe, _ = await clients.make(words("context", _PROBE_WORDS), policy="none")
    await clients.delete(probe["id"])
    text = words("context", round(_PROBE_WORDS * args.tokens / probe["num_tokens"]))
    found: dict[str, Any] = {"bytes_before": await clients.held()}
    chosen = {name: value for name, value in (("policy", args.policy), ("budget", args.context_budget)) if value}
    context, found["read_s"] = await clients.make(text, **chosen)
    found |= {"context": context, "bytes_with_context": await clients.held()}
    found["alone_s"] = [await clients.ask(100 + i, context["id"]) for i in range(args.repeat)]
    found["together_s"], found["bytes_with_clients"] = await clients.ask_together(args.clients, context["id"])
    found |= {"bytes_after": await clients.held(), "load": os.getloadavg()[0]}
    found["plain_s"] = await clients.ask(0, None, f"{text}\n\n")  # last: its prefix stays in the store
    return found


async def second_life(clients: Clients, args: argparse.Namespace, context: str) -> dict[str, Any]:
    """Ask it where it is in its file only."""
    found: dict[str, Any] = {"bytes_before": await clients.held()}
    found["together_s"], found["bytes_with_clients"] = await clients.ask_together(args.clients, context)
    found |= {"bytes_with_context": await clients.held(), "load": os.getloadavg()[0]}
    found["alone_s"] = [await clients.ask(100 + i, context) for i in range(args.repeat)]
    return found


async def in_life(url: str, args: argparse.Namespace, context: str | None) -> tuple[dict[str, Any], list[str]]:
    """Figures of one life of the server, and what failed."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=1800, limits=limits) as http:
        clients = Clients(http, {"model": model_name(url, ""), "max_tokens": args.max_tokens})
        found = await (first_life(clients, args) if context is None else second_life(clients, args, context))
    return found, clients.failed


def wrong_in(found: dict[str, Any], failed: list[str], context: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """What must not be."""
    more = found["bytes_with_clients"] - found["bytes_with_context"]
    # Of each client: question and answer, beside what rounds up to whole tiles, at most in bf16.
    most = args.clients * (args.max_tokens + _MORE_TOKENS) * context["bf16_bytes"] // context["num_tokens"]
    return [
        *failed,
        *([f"clients must hold at most {most} bytes beside the context, got {more}"] if more > most else []),
    ]


def header(first: dict[str, Any]) -> str:
    """What was read, and the first lines of the table."""
    context, mib = first["context"], 1 << 20
    return (
        f"{context['num_tokens']} tokens, {context['kept_tokens']} kept, {context['kv_bytes'] / mib:.1f} MiB "
        f"({context['bf16_bytes'] / mib:.1f} in bf16), policy {json.dumps(context['policy'])}\n"
        f"made over HTTP in {first['read_s']:.2f} s, of which reading {context['seconds']:.2f} s; first token of the "
        f"text as a plain prompt after {first['plain_s']:.2f} s\n"
        "| server | load | alone s | made / alone | plain / alone | together s p50 | max | made / max | plain / max "
        "| MiB before | with context | with all clients |\n|" + "---|" * 12
    )


def row(name: str, life: dict[str, Any], first: dict[str, Any]) -> str:
    """A row of it."""
    alone, together = median(life["alone_s"]), life["together_s"]
    cells = [name, f"{life['load']:.1f}"]
    for times in ([f"{alone:.3f}"], alone), ([f"{median(together):.3f}", f"{together[-1]:.3f}"], together[-1]):
        cells += [*times[0], *(f"{first[whole] / times[1]:.1f}" for whole in ("read_s", "plain_s"))]
    cells += [f"{life[f'bytes_{key}'] / (1 << 20):.1f}" for key in ("before", "with_context", "with_clients")]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of an exported model; the default model if omitted")
    parser.add_argument("--tokens", type=int, default=8000, help="of the context, about: the model has a limit")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--repeat", type=int, default=3, help="questions of one client alone")
    parser.add_argument("--policy", help="of the context; the server's default if omitted")
    parser.add_argument("--context-budget", help="of the context, as CacheConfig.budget")
    parser.add_argument("--budget", help="as ov_kvcrush-serve --budget")
    parser.add_argument("--max-kv-mb", type=int, help="as ov_kvcrush-serve --max-kv-mb")
    parser.add_argument("--max-waiting", type=int, help="as ov_kvcrush-serve --max-waiting")
    parser.add_argument("--json", default="contexts.json", help="where all figures go")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with server(args, "--contexts", folder) as (url, _):
            first, failed = asyncio.run(in_life(url, args, None))
        print(header(first), row("first", first, first), sep="\n", flush=True)
        with server(args, "--contexts", folder) as (url, _):
            second, failed_again = asyncio.run(in_life(url, args, first["context"]["id"]))
    print(row("started anew", second, first))
    found = {"machine": machine(), "settings": vars(args), "first": first, "second": second}
    Path(args.json).write_text(json.dumps(found, indent=1))
    context = first["context"]
    wrong = wrong_in(first, failed, context, args) + wrong_in(second, failed_again, context, args)
    for line in wrong:
        print(f"error: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
