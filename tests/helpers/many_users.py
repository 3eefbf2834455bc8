"""Many users of one engine at once: each gets the answer that it would get alone, whatever the others do.

As a script, for as long as is asked:  python tests/helpers/many_users.py --seconds 600 --threads 64
"""

from __future__ import annotations

import argparse
import gc
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from ov_kvcrush import (
    ChatHistory,
    ContinuousBatchingPipeline,
    CrushError,
    EndReason,
    LLMPipeline,
    RequestError,
    RequestTimeout,
    StreamingStatus,
)
from ov_kvcrush.utils.process_memory import rss_bytes

F32 = {"INFERENCE_PRECISION_HINT": "f32"}
CACHE = {"key_precision": "f32", "value_precision": "f32"}
TEXTS = [f"In the harbour of Anstruther lie {n} boats. " * 4 + "The red one is called Reaper." for n in range(4)]
QUESTIONS = ["What is it called?", "How many?", "Where is the harbour, and which colour has the Reaper?"]
BUDGET = {"kept_tokens": 40, "sink_tokens": 2, "recent_tokens": 8, "min_tokens": 16}
POLICIES = [None, {"name": "snapkv", **BUDGET, "window": 8}, {"name": "h2o", **BUDGET}]
IDS = np.random.default_rng(3).integers(0, 256, 400)


@dataclass(frozen=True)
class Wish:
    """What one user wants; equal wishes have equal answers."""

    kind: str
    index: int
    new_tokens: int

    @property
    def ids(self) -> ov.Tensor:
        begin, length = 7 * (self.index % 5), 5 + 37 * (self.index % 6)
        return ov.Tensor(IDS[None, begin : begin + length].copy())

    @property
    def options(self) -> dict[str, Any]:
        return {"max_new_tokens": self.new_tokens, "ignore_eos": True}

    @property
    def text(self) -> str:
        return TEXTS[self.index % len(TEXTS)]

    @property
    def question(self) -> str:
        return QUESTIONS[self.index % len(QUESTIONS)]


KINDS = (
    "plain", "sampled", "copies", "policy", "chat", "context", "own context", "iterate", "text", "stop string",
    "cancel", "cancel at once", "drop", "stop", "raise", "deadline", "bad",
)  # fmt: skip


@dataclass
class Users:
    """Two pipelines on one model folder, what was compressed for all, and what went wrong."""

    llm: LLMPipeline
    batch: ContinuousBatchingPipeline
    contexts: list[Any] = field(default_factory=list)
    expected: dict[Wish, Any] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    next_id: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def on(cls, folder: Path, **scheduler: Any) -> Users:
        scheduler = {"max_num_batched_tokens": 96, "max_num_seqs": 12, **scheduler}
        pipes = [kind(folder, device="CPU", scheduler_config=scheduler, cache_config=CACHE, **more)
                 for kind, more in ((LLMPipeline, F32), (ContinuousBatchingPipeline, {"properties": F32}))]  # fmt: skip
        users = cls(*pipes)
        users.contexts = [users.llm.compress(text, policy="none") for text in TEXTS]
        return users

    def request_id(self) -> int:
        with self.lock:
            self.next_id += 1
            return self.next_id

    def add(self, wish: Wish, **more: Any) -> Any:
        return self.batch.add_request(self.request_id(), wish.ids, **{**wish.options, **more})

    # -- one wish of each kind: the answer

    def answer(self, wish: Wish) -> Any:
        return getattr(self, "_" + wish.kind.replace(" ", "_"))(wish)

    def _plain(self, wish: Wish) -> Any:
        return self.llm.generate(wish.ids, **wish.options).tokens

    def _sampled(self, wish: Wish) -> Any:
        options = {"do_sample": True, "temperature": 0.8, "rng_seed": wish.index, "top_k": 20, "top_p": 0.9}
        return self.llm.generate(wish.ids, **wish.options, **options).tokens

    def _copies(self, wish: Wish) -> Any:
        options = {"do_sample": True, "rng_seed": wish.index, "num_return_sequences": 3}
        return self.llm.generate(wish.ids, **wish.options, **options).tokens

    def _policy(self, wish: Wish) -> Any:
        return self.llm.generate(wish.ids, **wish.options, policy=POLICIES[wish.index % len(POLICIES)]).tokens

    def _chat(self, wish: Wish) -> Any:
        history = ChatHistory([{"role": "user", "content": f"{wish.text} {wish.question}"}])
        first = self.llm.generate(history, **wish.options).texts[0]
        history.append({"role": "assistant", "content": first})
        history.append({"role": "user", "content": wish.question})
        return first, self.llm.generate(history, **wish.options).texts[0]

    def _context(self, wish: Wish) -> Any:
        with self.contexts[wish.index % len(TEXTS)].fork() as context:
            return self.llm.generate(wish.question, context=context, **wish.options)

    def _own_context(self, wish: Wish) -> Any:
        policy = POLICIES[1 + wish.index % (len(POLICIES) - 1)]
        with self.batch.compress(wish.text + str(wish.index), policy=policy) as context:
            handle = self.batch.add_request(self.request_id(), wish.question, context=context, **wish.options)
            handle.wait()
            handle.raise_error()
            return handle.outputs()[0].generated_ids

    def _iterate(self, wish: Wish) -> Any:
        return [token for outputs in self.add(wish) for token in outputs[0].generated_ids]

    def _text(self, wish: Wish) -> Any:
        handle, pieces = self.add(wish), []
        while piece := handle.read_text():
            pieces.append(piece)
        return "".join(pieces)

    def _stop_string(self, wish: Wish) -> Any:
        handle = self.add(wish, stop_strings={"e", "a1"})
        read = [token for outputs in handle for token in outputs[0].generated_ids]
        assert read == handle.outputs()[0].generated_ids
        return read

    # -- those that end otherwise; the answer alone is the whole one, theirs a beginning of it

    def _cancel(self, wish: Wish) -> Any:
        handle = self.add(wish)
        for outputs in handle:
            if handle.outputs()[0].generated_ids[2:]:
                handle.cancel()
            del outputs
        assert handle.end_reason in (EndReason.CANCELLED, EndReason.LENGTH)
        return handle.outputs()[0].generated_ids

    def _cancel_at_once(self, wish: Wish) -> Any:
        handle = self.add(wish)
        handle.cancel()
        handle.wait()
        return handle.outputs()[0].generated_ids

    def _drop(self, wish: Wish) -> Any:
        handle = self.add(wish)
        handle.drive()
        if wish.index % 2:
            return handle.read()[0].generated_ids
        return []

    def _stop(self, wish: Wish) -> Any:
        pieces: list[str] = []

        def streamer(piece: str) -> StreamingStatus:
            pieces.append(piece)
            return StreamingStatus.STOP if len(pieces) == 2 else StreamingStatus.RUNNING

        return self.llm.generate(wish.ids, streamer=streamer, **wish.options).tokens[0]

    def _raise(self, wish: Wish) -> Any:
        try:
            self.llm.generate(wish.ids, streamer=lambda piece: 1 // 0, **wish.options)
        except ZeroDivisionError:
            return []
        raise AssertionError("the streamer's error got lost")

    def _deadline(self, wish: Wish) -> Any:
        try:
            return self.llm.generate(wish.ids, timeout_s=1e-4 * (1 + wish.index), **wish.options).tokens[0]
        except RequestTimeout:
            return []

    def _bad(self, wish: Wish) -> Any:
        bad = ({"max_new_tokens": 0}, {"temperature": -1}, {"stop_token_ids": {10**6}}, {"timeout_s": -1}, {"top_p": 3})
        try:
            self.llm.generate(wish.ids, **{**wish.options, **bad[wish.index % len(bad)]})
        except (RequestError, CrushError):
            return []
        raise AssertionError("a bad value was taken")

    # -- all of them

    def wishes(self) -> list[Wish]:
        return [Wish(kind, index, 6 + 5 * (index % 3)) for kind in KINDS for index in range(6)]

    def learn(self) -> None:
        """What each wish is answered alone; where its user breaks off, what one is answered who does not."""
        for wish in self.wishes():
            whole = wish.kind not in ("cancel", "cancel at once", "drop", "stop", "raise", "deadline", "bad")
            self.expected[wish] = self.answer(wish if whole else Wish("iterate", wish.index, wish.new_tokens))

    def check(self, wish: Wish) -> None:
        try:
            got, expected = self.answer(wish), self.expected[wish]
            is_part = wish.kind in ("cancel", "cancel at once", "drop", "stop", "raise", "deadline", "bad")
            if got != (expected[: len(got)] if is_part else expected):
                self.wrong.append(f"{wish}: {got}, alone {expected}")
        except BaseException as error:
            self.wrong.append(f"{wish}: {error!r}")
        with self.lock:
            self.done[wish.kind] += 1

    def run(self, num_threads: int, seed: int, goes_on: Callable[[int], bool]) -> None:
        """Random wishes in threads, until `goes_on` of their number says no."""
        wishes, count = self.wishes(), iter(range(1 << 60))

        def user(index: int) -> None:
            rng = random.Random(seed * 1000 + index)
            while True:
                with self.lock:
                    if not goes_on(next(count)):
                        return
                self.check(rng.choice(wishes))

        threads = [threading.Thread(target=user, args=(i,)) for i in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def left(self) -> dict[str, Any]:
        """What is still held when everybody has gone."""
        gc.collect()
        found: dict[str, Any] = {}
        for name, pipe in (("llm", self.llm), ("batch", self.batch)):
            backend: Any = pipe._backend
            backend.process_aborts()
            backend.clear_prefixes()
            found[f"{name} requests"] = pipe.get_metrics().requests
            found[f"{name} blocks"] = backend.cache.staging.pool.num_used
            found[f"{name} sequences"] = len(backend.scheduler)
            found[f"{name} bytes"] = pipe.get_metrics().kv_cache_size_in_bytes
            found[f"{name} promised"] = len(backend.cache._admission.prefilling)
        found["llm bytes"] -= sum(context.nbytes for context in self.contexts)
        return found


def resident_bytes() -> int:
    gc.collect()
    return rss_bytes() or 0


def main() -> None:
    """The traffic for as long as is asked; exits with 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--threads", type=int, default=64)
    args = parser.parse_args()

    from tiny_models import tiny_model

    from model_export import export_model

    with tempfile.TemporaryDirectory() as folder:
        export_model(tiny_model("llama", Path(folder) / "hf"), Path(folder) / "ir", weight_format="fp32")
        users = Users.on(Path(folder) / "ir")
        users.learn()
        users.run(args.threads, 0, lambda n: n < 500)
        begin, sizes = time.monotonic(), [resident_bytes()]
        for part in range(1, 11):
            users.run(args.threads, part, lambda n, end=begin + part * args.seconds / 10: time.monotonic() < end)  # type: ignore[misc]
            sizes.append(resident_bytes())
            print(
                f"{time.monotonic() - begin:6.0f} s  {users.done.total()} requests, {len(users.wrong)} wrong, "
                f"left {sum(users.left().values())}, process {sizes[-1] / 2**20:.0f} MiB",
                flush=True,
            )
        print(dict(users.done))
        print(users.left())
        print("\n".join(users.wrong[:20]))
        raise SystemExit(bool(users.wrong or sum(users.left().values())))


if __name__ == "__main__":
    main()
