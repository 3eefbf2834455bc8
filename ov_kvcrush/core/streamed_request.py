"""What the requests of every engine have for their callers."""

from __future__ import annotations

import time

import openvino_genai as ov_genai

from ov_kvcrush.core.end_reason import EndReason
from ov_kvcrush.core.outputs import StepSeconds
from ov_kvcrush.core.request_options import DEFAULT_REQUEST_OPTIONS, RequestOptions
from ov_kvcrush.core.token_stream import TokenStream
from ov_kvcrush.errors import RequestTimeout

Status = ov_genai.GenerationStatus


class StreamedRequest:
    """How a request goes, as its callers see it; written by the engine's thread.

    is_driven: whether the engine moves it on by itself; else its caller does, step by step. error: why there is no
    whole answer. steps: numbers of those that it took part in, and what each took. max_read: tokens of the first
    sequence that its reader still wanted, None = all.
    """

    def __init__(self, request_id: int, options: RequestOptions = DEFAULT_REQUEST_OPTIONS) -> None:
        self.request_id = request_id
        self.options = options
        self.arrival = time.perf_counter()
        self.stream = TokenStream()
        self.status = Status.RUNNING
        self.end_reason: EndReason | None = None
        self.error: Exception | None = None
        self.is_driven = False
        self.steps: list[tuple[int, StepSeconds]] = []
        self.max_read: int | None = None

    @property
    def is_finished(self) -> bool:
        """Whether every sequence has ended."""
        return self.status != Status.RUNNING

    @property
    def deadline(self) -> float:
        """The moment of time.perf_counter at which its time is over."""
        limit = self.options.timeout_s
        return float("inf") if limit is None else self.arrival + limit

    def timeout(self, num_tokens: int) -> RequestTimeout:
        """The error of a request whose time was over after `num_tokens` of its answer."""
        limit = self.options.timeout_s
        return RequestTimeout(f"request must end within timeout_s={limit}, got {num_tokens} tokens until then")
