"""An answer of either engine, and the generation config of answers."""

from __future__ import annotations

from dataclasses import dataclass

import openvino_genai as ov_genai

from ov_kvcrush.eval.benchmarks.items import Task
from ov_kvcrush.eval.runs.plan import Planned
from ov_kvcrush.eval.runs.prompts import QuestionPrompt
from ov_kvcrush.pipelines.llm import LLMPipeline


@dataclass(frozen=True)
class Answer:
    """An answer to a question under a setting, and the size of the cache when the question was asked.

    For long answers: its size when the answer ended; prompt_tokens then counts the answer's tokens too.
    kl, top1: as Divergence has them, to the full cache along its own answer; None where that was not measured. loss: of
    the reference, nats per token, likewise.
    """

    planned: Planned
    asked: QuestionPrompt
    text: str
    kept_tokens: float
    prompt_tokens: int
    num_bytes: int
    seconds: float
    kl: float | None = None
    top1: float | None = None
    loss: float | None = None


def generation_config(pipeline: LLMPipeline, task: Task, max_new_tokens: int) -> ov_genai.GenerationConfig:
    """Greedy decoding with the pipeline's end-of-sequence tokens."""
    return greedy(pipeline.get_generation_config(), task, max_new_tokens)


def greedy(own: ov_genai.GenerationConfig, task: Task, max_new_tokens: int) -> ov_genai.GenerationConfig:
    """Greedy decoding with the end-of-sequence tokens of the model's own config."""
    config = ov_genai.GenerationConfig()
    config.stop_token_ids = own.stop_token_ids
    if own.eos_token_id >= 0:
        config.set_eos_token_id(own.eos_token_id)
    config.max_new_tokens = max_new_tokens
    config.min_new_tokens = min(task.min_new_tokens, max_new_tokens)
    config.stop_strings = set(task.stop)
    return config
