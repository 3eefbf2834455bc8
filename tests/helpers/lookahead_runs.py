"""What the tests of guessed tokens share: requests of all kinds, and guesses that all run."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov

import ov_kvcrush as ours
from ov_kvcrush import ContinuousBatchingPipeline, GenerationConfig
from ov_kvcrush.engine.lookahead.draft_pace import DraftPace

NEW_TOKENS = 70  # over two borders of tiles


class AllIn(DraftPace):
    """Runs every token that is guessed, whatever it costs."""

    def choose(self, odds: Any, most: Any, room: int) -> list[int]:
        return list(most)


def ids_of(length: int, seed: int = 0) -> np.ndarray:
    """A text that repeats itself."""
    rng = np.random.default_rng(seed)
    return np.resize(rng.integers(0, 256, max(length // 3, 1)), length)


def accepted(handles: list[Any]) -> tuple[int, int]:
    requests = [handle.request for handle in handles]
    return sum(r.num_accepted for r in requests), sum(r.num_drafted for r in requests)


def mixed_configs() -> list[GenerationConfig]:
    """Eight requests, each with something else that depends on the tokens before."""
    grammar = GenerationConfig(max_new_tokens=40)
    grammar.structured_output_config = ours.StructuredOutputConfig(regex="(ab|cd){3,12}")
    long = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    return [
        GenerationConfig(**long),
        GenerationConfig(**long, repetition_penalty=1.05, logprobs=3),
        GenerationConfig(**long, presence_penalty=0.2, frequency_penalty=0.05),
        GenerationConfig(max_new_tokens=NEW_TOKENS, min_new_tokens=9, stop_token_ids=set(range(0, 288, 3))),
        GenerationConfig(**long, do_sample=True, temperature=0.4, top_k=20, rng_seed=5, logprobs=1),
        GenerationConfig(**long, do_sample=True, temperature=0.3, num_return_sequences=2, rng_seed=6),
        grammar,
        GenerationConfig(max_new_tokens=12, num_beams=3, num_return_sequences=2),
    ]


def answers(pipe: ContinuousBatchingPipeline, together: bool) -> tuple[list[Any], list[Any]]:
    """What each request said, how sure it was and why it ended; and the handles."""
    handles = []
    for i, config in enumerate(mixed_configs()):
        handles.append(pipe.add_request(i, ov.Tensor(ids_of(25 + 7 * i, seed=i)[None]), config))
        while not together and pipe.has_non_finished_requests():
            pipe.step()
    while pipe.has_non_finished_requests():
        pipe.step()
    said = [[(o.generated_ids, o.finish_reason) for o in handle.outputs()] for handle in handles]
    return said, handles
