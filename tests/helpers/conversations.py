"""Load of many conversations on a server: `python tests/helpers/conversations.py URL --clients 8 --turns 3`.

Each client talks through one conversation after the other, streaming, and checks that every answer is whole.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

_TOPIC = "Conversation {0}. Here is what we know so far. " + "The river rises in the hills and ends in the sea. " * 12
_QUESTIONS = ("What is known?", "Tell me more.", "And what then?", "Why is that?", "Sum it up.")


@dataclass
class Result:
    """What came of a load. ends: how many answers were whole, and how the others ended."""

    ends: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        """Figures by name."""
        times = sorted(self.first_token_s) or [0.0]
        return {
            "ends": dict(self.ends),
            "seconds": round(self.seconds, 1),
            "tokens_per_s": round(self.tokens / self.seconds, 1) if self.seconds else 0.0,
            "ttft_p50_s": round(times[len(times) // 2], 3),
            "ttft_p95_s": round(times[int(len(times) * 0.95)], 3),
        }


async def answer(client: httpx.AsyncClient, model: str, messages: list[Any], max_tokens: int, result: Result) -> str:
    """Ask, and read the answer to its end; what came of it goes to `result`."""
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "stream": True, "temperature": 0}
    start, text, is_whole = time.perf_counter(), "", False
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                result.ends[f"status {response.status_code}"] += 1
                return ""
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ")
                if not line or data == "[DONE]":
                    is_whole = is_whole or data == "[DONE]"
                    continue
                event = json.loads(data)
                if "error" in event:
                    result.ends[f"error {event['error']['code']}"] += 1
                    return ""
                piece = event["choices"][0]["delta"].get("content") if event["choices"] else None
                if piece:
                    if not text:
                        result.first_token_s.append(time.perf_counter() - start)
                    text += piece
                    result.tokens += 1
    except httpx.HTTPError as error:
        result.ends[type(error).__name__] += 1
        return ""
    result.ends["whole" if is_whole else "cut"] += 1
    return text


async def load(url: str, model: str, clients: int, conversations: int, turns: int, max_tokens: int) -> Result:
    """Have `clients` talk at a time, each through so many conversations of so many turns."""
    result, limits = Result(), httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def talk(number: int) -> None:
            for i in range(conversations):
                messages = [{"role": "system", "content": _TOPIC.format(number * 1000 + i)}]
                for turn in range(turns):
                    messages.append({"role": "user", "content": _QUESTIONS[turn % len(_QUESTIONS)]})
                    text = await answer(client, model, messages, max_tokens, result)
                    messages.append({"role": "assistant", "content": text or "I do not know."})

        start = time.perf_counter()
        await asyncio.gather(*(talk(number) for number in range(clients)))
        result.seconds = time.perf_counter() - start
    return result


def counters(url: str, name: str, label: str) -> dict[str, float]:
    """A counter of a server's /metrics by one of its labels, summed over the others."""
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=60).text):
        for sample in family.samples:
            if sample.name == f"{name}_total":
                found[sample.labels.get(label, "")] += sample.value  # type: ignore[assignment]
    return dict(found)


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    for name, default in (("clients", 8), ("conversations", 2), ("turns", 3), ("max-tokens", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    before = counters(args.url, "ov_kvcrush_routed", "affinity")
    result = asyncio.run(load(args.url, args.model, args.clients, args.conversations, args.turns, args.max_tokens))
    after = counters(args.url, "ov_kvcrush_routed", "affinity")
    routed = {key: value - before.get(key, 0) for key, value in after.items() if key}
    reused = counters(args.url, "ov_kvcrush_reused_tokens", "")
    print(json.dumps({**result.summary(), "routed": routed, "reused_tokens": sum(reused.values())}))


if __name__ == "__main__":
    main()
