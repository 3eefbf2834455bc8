"""Clients of a server with OpenAI's API, for locust: each asks, reads the stream to its end, and asks again.

Moments of all text are written to the file that --answers names; `load.py` starts this and reads it.
"""

from __future__ import annotations

import itertools
import json
import resource
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gevent
from locust import HttpUser, constant, events, task
from summary import Answer
from workload import messages

_answers: list[Answer] = []
_numbers = itertools.count()


@events.init_command_line_parser.add_listener
def _arguments(parser: Any) -> None:
    parser.add_argument("--answers", default="answers.json", help="file for the answers")
    parser.add_argument("--model-name", default="", help="as the server's API calls it")
    parser.add_argument("--key", default="", help="API key")
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)


@events.quitting.add_listener
def _write(environment: Any, **_: Any) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found = {"cpu_s": usage.ru_utime + usage.ru_stime, "answers": [asdict(answer) for answer in _answers]}
    Path(environment.parsed_options.answers).write_text(json.dumps(found))


def data_of(chunks: Iterable[bytes]) -> Iterator[str]:
    """The data of server-sent events, as they come."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line[5:].strip().decode() for line in lines if line.startswith(b"data:"))


class Client(HttpUser):
    """Asks without a pause; one that is refused waits as long as it is told to."""

    wait_time = constant(0)

    def on_start(self) -> None:
        """Take a number, which its questions come of."""
        self.client_number = next(_numbers)
        self.asked = 0

    @task
    def ask(self) -> None:
        """One question, to the end of its answer."""
        options = self.environment.parsed_options
        body = {
            "model": options.model_name,
            "messages": messages(self.client_number, self.asked, options.prompt_words),
            "max_tokens": options.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"Authorization": f"Bearer {options.key}"} if options.key else {}
        self.asked += 1
        answer = Answer(time.monotonic())
        _answers.append(answer)
        url = "/v1/chat/completions"
        with self.client.post(url, json=body, headers=headers, stream=True, catch_response=True) as response:
            answer.status = response.status_code
            if answer.status == 429:
                response.success()  # the queue's limit, which is counted by itself
                gevent.sleep(float(response.headers.get("Retry-After", 1)))
                return
            try:
                if answer.status != 200:
                    raise ValueError(f"status {answer.status}: {response.text[:200]}")
                _read(answer, response.iter_content(None))
            except Exception as error:
                answer.error = f"{type(error).__name__}: {error}"
                response.failure(answer.error)


def _read(answer: Answer, chunks: Iterable[bytes]) -> None:
    """Note when text comes. Raises ValueError for a stream that does not end as it must."""
    for data in data_of(chunks):
        if data == "[DONE]":
            answer.tokens = answer.tokens or len(answer.times)  # a server that does not tell
            return
        chunk = json.loads(data)
        if "error" in chunk:
            raise ValueError(str(chunk["error"]))
        if any(choice["delta"].get("content") for choice in chunk["choices"]):
            answer.times.append(time.monotonic())
        if chunk.get("usage"):
            answer.tokens = chunk["usage"]["completion_tokens"]
    raise ValueError("the stream broke off")
