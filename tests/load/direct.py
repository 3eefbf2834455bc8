"""The same questions asked of the engine itself, by as many asyncio tasks as there would be clients.

`load.py` starts this: what a server takes beside the engine is the difference between both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import asdict
from pathlib import Path

from summary import Answer
from workload import messages

from ov_kvcrush import ChatHistory, ContinuousBatchingPipeline
from ov_kvcrush.errors import QueueFull
from ov_kvcrush.server.settings import ServerSettings


async def ask(pipe: ContinuousBatchingPipeline, client: int, number: int, args: argparse.Namespace) -> Answer:
    """One question, to the end of its answer."""
    answer = Answer(time.monotonic())
    history = ChatHistory(messages(client, number, args.prompt_words))
    try:
        handle = pipe.add_request(client, history, max_new_tokens=args.max_tokens)
        async for outputs in handle:
            answer.times.append(time.monotonic())
            answer.tokens += len(outputs[0].generated_ids)
        answer.status = 200
    except QueueFull:
        answer.status = 429
        await asyncio.sleep(1)
    except Exception as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


async def run(pipe: ContinuousBatchingPipeline, args: argparse.Namespace) -> list[Answer]:
    """All answers of all clients that were asked for until the time was over."""
    end = time.monotonic() + args.run_time

    async def client(number: int) -> list[Answer]:
        answers: list[Answer] = []
        while time.monotonic() < end:
            answers.append(await ask(pipe, number, len(answers), args))
        return answers

    return [answer for answers in await asyncio.gather(*map(client, range(args.users))) for answer in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--budget")
    parser.add_argument("--max-kv-mb", type=int)
    parser.add_argument("--max-waiting", type=int, default=ServerSettings.max_waiting)
    parser.add_argument("--users", type=int, default=1)
    parser.add_argument("--run-time", type=float, default=60)
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--answers", default="answers.json")
    args = parser.parse_args()
    settings = ServerSettings(
        model=args.model, budget=args.budget, max_kv_mb=args.max_kv_mb, max_waiting=args.max_waiting
    )
    pipe = ContinuousBatchingPipeline(
        args.model, settings.scheduler_config(), cache_config=settings.cache_config(), engine="crush"
    )
    begin = time.monotonic()
    answers = asyncio.run(run(pipe, args))
    found = {"begin": begin, "answers": [asdict(answer) for answer in answers]}
    Path(args.answers).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
