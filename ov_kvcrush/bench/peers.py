"""llama.cpp as the bench drives it: the GGUF file that our model was converted from, by llama-cpp-python."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np

from ov_kvcrush.bench.measure import MeasuredHandle, Storage
from ov_kvcrush.errors import CrushError
from ov_kvcrush.kvcache.block_pool import BLOCK_SIZE
from ov_kvcrush.model.plugin import plugin_threads

LLAMA_CPP = "llama.cpp"
_MODULE, _PACKAGE = "llama_cpp", "llama-cpp-python"


def check_llama_cpp() -> None:
    """Raise CrushError where llama-cpp-python is not installed."""
    if importlib.util.find_spec(_MODULE) is None:
        raise CrushError(
            f"--against {LLAMA_CPP} must have {_PACKAGE}, got none; pip install 'ov-kvcrush[peers]', which compiles it"
        )


def peer_versions(engines: Sequence[str]) -> dict[str, str]:
    """Versions of what is measured beside openvino_genai, by package."""
    return {_PACKAGE: metadata.version(_PACKAGE)} if LLAMA_CPP in engines else {}


class _Output(NamedTuple):
    generated_ids: list[int]


class _Answer:
    """The one request that runs: its prompt, and what it has generated."""

    def __init__(self, ids: np.ndarray, new_tokens: int) -> None:
        self.waiting: list[int] = ids.tolist()  # prompt tokens that are not read yet
        self.left = new_tokens
        self._unread: list[int] = []

    def take(self, token: int) -> None:
        self._unread.append(token)
        self.left -= 1

    def can_read(self) -> bool:
        return bool(self._unread)

    def read(self) -> dict[int, Any]:
        tokens, self._unread = self._unread, []
        return {0: _Output(tokens)}

    def cancel(self) -> None:
        self.left = 0


class LlamaUnderTest:
    """llama.cpp with as many threads as OpenVINO takes, and our chunks of prompts; its cache is f16, its default.

    Tokens are the likeliest of the logits as they lie in memory: cheaper than llama.cpp's chain of samplers.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        import llama_cpp

        self._library = llama_cpp
        self._chunk = int(job["max_num_batched_tokens"])
        threads = plugin_threads(job["properties"])
        try:
            self._llama = llama_cpp.Llama(
                job["gguf"], n_ctx=job["num_kv_blocks"] * BLOCK_SIZE, n_batch=self._chunk, n_ubatch=self._chunk,
                n_threads=threads, n_threads_batch=threads, verbose=False,
            )  # fmt: skip
        except ValueError as error:
            raise CrushError(f"model must be one that llama.cpp can load, got: {error}") from None
        self._answer: _Answer | None = None

    def add(self, request_id: int, ids: np.ndarray, new_tokens: int) -> MeasuredHandle:
        """Begin a request, alone: what the one before it left in the cache is dropped."""
        assert not self.has_unfinished(), "settings have a batch of 1"
        self._llama.reset()
        self._answer = _Answer(ids, new_tokens)
        return self._answer

    def step(self) -> None:
        """Read a chunk of the prompt, or the last token; the next token follows where the prompt is read."""
        answer = self._answer
        assert answer is not None, "a step follows a request"
        chunk, answer.waiting = answer.waiting[: self._chunk], answer.waiting[self._chunk :]
        self._llama.eval(chunk)
        if answer.waiting:
            return
        logits = self._library.llama_get_logits(self._llama.ctx)
        token = int(np.ctypeslib.as_array(logits, (self._llama.n_vocab(),)).argmax())
        answer.take(token)
        answer.waiting = [token]

    def has_unfinished(self) -> bool:
        return self._answer is not None and self._answer.left > 0

    def kv_bytes(self) -> int:
        """What the cells in use would take in a file."""
        return int(self._library.llama_state_seq_get_size(self._llama.ctx, 0))

    def storage(self) -> Storage:
        return Storage(LLAMA_CPP, "f16", "f16")

    def last_overhead_s(self) -> float | None:
        return None

    def last_policy_s(self) -> float | None:
        return 0.0

    def kept_tokens(self, handle: Any) -> int | None:
        return None
