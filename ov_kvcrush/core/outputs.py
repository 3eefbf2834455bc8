"""What `generate` returns. The members are openvino_genai's, whose own result classes cannot be filled from Python."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.core.draft_metrics import ModelStep, SDPerModelsPerfMetrics
from ov_kvcrush.core.perf_metrics import PerfMetrics
from ov_kvcrush.policies.plans.plan import CachePlan


@dataclass
class GenerationOutput:
    """New tokens of one sequence: `generated_ids`, their log probabilities, and why it ended, if it did.

    text: given where the ids alone do not tell the text, because a stop string ends inside a token. top_logprobs: for
    each token {token: log probability} of the most probable ones, as many as `logprobs` asks for; None if it asks for
    no more than the token's own, or the engine does not tell.
    """

    generated_ids: list[int]
    generated_log_probs: list[float]
    score: float
    finish_reason: ov_genai.GenerationFinishReason
    text: str | None = None
    top_logprobs: list[dict[int, float]] | None = None

    def up_to(self, num_tokens: int | None) -> GenerationOutput:
        """The first tokens of it; itself where it has no more, and for None."""
        if num_tokens is None or num_tokens >= len(self.generated_ids):
            return self
        if not num_tokens:
            return GenerationOutput([], [], 0.0, ov_genai.GenerationFinishReason.NONE)
        logprobs = self.generated_log_probs[:num_tokens]
        tops = None if self.top_logprobs is None else self.top_logprobs[:num_tokens]
        return GenerationOutput(
            self.generated_ids[:num_tokens], logprobs, sum(logprobs), self.finish_reason, None, tops
        )

    def followed_by(self, new: GenerationOutput) -> GenerationOutput:
        """Its tokens and those of the next steps; score and reason are of the last."""
        tops = None if self.top_logprobs is None else self.top_logprobs + (new.top_logprobs or [])
        return GenerationOutput(
            self.generated_ids + new.generated_ids,
            self.generated_log_probs + new.generated_log_probs,
            new.score,
            new.finish_reason,
            None,
            tops,
        )


class StepSeconds(NamedTuple):
    """What one step took: the inference, sampling, and everything but the inference (planning, inputs, sampling).

    policy: the part of the overhead in which policies chose what stays in the cache, scores included, and in which the
    store did what they chose. end: its moment of time.perf_counter. draft: what a draft model did in it, None = there
    is none.
    """

    inference: float
    sampling: float
    overhead: float
    policy: float = 0.0
    end: float = 0.0
    draft: tuple[ModelStep, ...] | None = None


@dataclass(frozen=True)
class RequestStats:
    """What a request took. Moments are seconds of time.perf_counter; token_times has one list per sequence.

    kept_tokens: tokens whose KV a head of the first sequence holds, on average; after its end, held then. None where
    the engine does not tell. counts_steps: token_times has one list, the steps of a beam search, which are what
    openvino_genai counts as its tokens. plan: what a budget of bytes came to, and its predicted cost. steps: numbers of
    the engine's steps that it took part in, and what each took. num_drafted, num_accepted: guessed tokens that were
    run, and those that were right.
    """

    num_input_tokens: int
    num_reused_tokens: int
    arrival: float
    token_times: list[list[float]]
    kv_bytes: int
    kept_tokens: int | None = None
    plan: CachePlan | None = None
    steps: list[tuple[int, StepSeconds]] = field(default_factory=list)
    counts_steps: bool = False
    num_drafted: int = 0
    num_accepted: int = 0


@dataclass(frozen=True)
class KeptTokens:
    """What policies left in the cache of a request that has ended.

    ids: int64 (S,), the prompt. positions: [layer][KV head] int32, ascending: the places in the text, prompt and
    answer, whose KV was still held. representatives: of these, the ones that the last choice kept for others that are
    like them; None if its policy knows none.
    """

    ids: np.ndarray
    positions: list[list[np.ndarray]]
    representatives: list[list[np.ndarray]] | None = None


@dataclass
class DecodedResults:
    """Texts of all prompts; with n sequences for each, the first n belong to the first prompt.

    kept: for each prompt what its first sequence kept; None where nothing was evicted or the engine does not tell.
    parsed: for each text the message that the config's parsers made of it; empty without parsers.
    """

    texts: list[str]
    scores: list[float]
    perf_metrics: PerfMetrics
    finish_reasons: list[ov_genai.GenerationFinishReason]
    kept: list[KeptTokens | None] = field(default_factory=list)
    parsed: list[dict[str, Any]] = field(default_factory=list)
    extended_perf_metrics: SDPerModelsPerfMetrics | None = None  # with a draft model

    def __str__(self) -> str:
        return "\n".join(self.texts)


@dataclass
class EncodedResults:
    """Token ids of all prompts; with n sequences for each, the first n belong to the first prompt.

    kept: as of DecodedResults.
    """

    tokens: list[list[int]]
    scores: list[float]
    perf_metrics: PerfMetrics
    finish_reasons: list[ov_genai.GenerationFinishReason]
    kept: list[KeptTokens | None] = field(default_factory=list)
    extended_perf_metrics: SDPerModelsPerfMetrics | None = None  # with a draft model


@dataclass
class GenerationResult:
    """Texts of one request of `ContinuousBatchingPipeline.generate`."""

    m_request_id: int
    m_generation_ids: list[str]
    m_scores: list[float]
    m_status: ov_genai.GenerationStatus
    finish_reasons: list[ov_genai.GenerationFinishReason]
    perf_metrics: PerfMetrics
    extended_perf_metrics: SDPerModelsPerfMetrics | None = None  # with a draft model

    def get_generation_ids(self) -> list[str]:
        """The texts, under openvino_genai's name for them."""
        return self.m_generation_ids


@dataclass
class EncodedGenerationResult:
    """Token ids of one request of `ContinuousBatchingPipeline.generate`."""

    m_request_id: int
    m_generation_ids: list[list[int]]
    m_scores: list[float]
    m_status: ov_genai.GenerationStatus
    finish_reasons: list[ov_genai.GenerationFinishReason]
    perf_metrics: PerfMetrics
    extended_perf_metrics: SDPerModelsPerfMetrics | None = None  # with a draft model


@dataclass(frozen=True)
class PipelineMetrics:
    """State of the engine after its last step. Cache usage is in percent of the capacity, sizes are in bytes.

    kv_cache_size_in_bytes: keys and values that requests and kept prefixes hold. staging_size_in_bytes: blocks of
    prompts that are being read, beside them; 0 where prompts are read in the cache itself.
    """

    requests: int
    scheduled_requests: int
    cache_usage: float
    max_cache_usage: float
    avg_cache_usage: float
    kv_cache_size_in_bytes: int
    cache_size_in_bytes: int
    num_used_blocks: int
    num_preemptions: int
    staging_size_in_bytes: int = 0
