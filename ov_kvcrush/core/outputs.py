"""What `generate` returns. The members are openvino_genai's, whose own result classes cannot be filled from Python."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.policies.plans.plan import CachePlan


class MeanStdPair(NamedTuple):
    """Mean and standard deviation, in milliseconds unless a method says otherwise."""

    mean: float
    std: float


def mean_std(values: list[float]) -> MeanStdPair:
    """Mean and standard deviation of `values`; (-1, -1), as openvino_genai has it, if there are none."""
    if not values:
        return MeanStdPair(-1.0, -1.0)
    return MeanStdPair(float(np.mean(values)), float(np.std(values)))


@dataclass
class PerfMetrics:
    """Timings of one `generate` call over all its requests. Fields are in seconds, getters return milliseconds."""

    load_time_s: float = 0.0
    num_input_tokens: int = 0
    num_generated_tokens: int = 0
    # Prompt tokens whose KV came from an earlier turn or request instead of being computed.
    num_reused_tokens: int = 0
    kv_bytes: int = 0
    # Tokens whose KV a head held at the end, on average; None where the engine does not tell.
    kept_tokens: int | None = None
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    token_intervals_s: list[float] = field(default_factory=list)
    generate_s: list[float] = field(default_factory=list)
    inference_s: list[float] = field(default_factory=list)
    sampling_s: list[float] = field(default_factory=list)
    tokenization_s: list[float] = field(default_factory=list)
    detokenization_s: list[float] = field(default_factory=list)
    chat_template_s: list[float] = field(default_factory=list)

    @staticmethod
    def _ms(seconds: list[float]) -> MeanStdPair:
        return mean_std([s * 1e3 for s in seconds])

    def get_load_time(self) -> float:
        """Milliseconds taken to load and compile the model."""
        return self.load_time_s * 1e3

    def get_num_input_tokens(self) -> int:
        """Prompt tokens of all requests."""
        return self.num_input_tokens

    def get_num_generated_tokens(self) -> int:
        """Generated tokens of all requests."""
        return self.num_generated_tokens

    def get_ttft(self) -> MeanStdPair:
        """Time to first token."""
        return self._ms(self.ttft_s)

    def get_tpot(self) -> MeanStdPair:
        """Time per output token after the first, per sequence."""
        return self._ms(self.tpot_s)

    def get_ipot(self) -> MeanStdPair:
        """Inference time per step."""
        return self._ms(self.inference_s)

    def get_throughput(self) -> MeanStdPair:
        """Generated tokens per second."""
        total = sum(self.generate_s)
        return MeanStdPair(self.num_generated_tokens / total, 0.0) if total else MeanStdPair(-1.0, -1.0)

    def get_generate_duration(self) -> MeanStdPair:
        """Whole `generate` call."""
        return self._ms(self.generate_s)

    def get_inference_duration(self) -> MeanStdPair:
        """All inferences of the call together."""
        return self._ms([sum(self.inference_s)] if self.inference_s else [])

    def get_sampling_duration(self) -> MeanStdPair:
        """Sampling, per step."""
        return self._ms(self.sampling_s)

    def get_tokenization_duration(self) -> MeanStdPair:
        """Tokenization of the prompts."""
        return self._ms(self.tokenization_s)

    def get_detokenization_duration(self) -> MeanStdPair:
        """Detokenization of the final texts."""
        return self._ms(self.detokenization_s)

    def get_chat_template_duration(self) -> MeanStdPair:
        """Application of the chat template."""
        return self._ms(self.chat_template_s)


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
        logprobs = self.generated_log_probs[:num_tokens]
        tops = None if self.top_logprobs is None else self.top_logprobs[:num_tokens]
        return GenerationOutput(
            self.generated_ids[:num_tokens], logprobs, sum(logprobs), self.finish_reason, None, tops
        )


class StepSeconds(NamedTuple):
    """What one step took: the inference, sampling, and everything but the inference (planning, inputs, sampling).

    policy: the part of the overhead in which policies chose what stays in the cache, scores included, and in which the
    store did what they chose.
    """

    inference: float
    sampling: float
    overhead: float
    policy: float = 0.0


@dataclass(frozen=True)
class RequestStats:
    """What a request took. Moments are seconds of time.perf_counter; token_times has one list per sequence.

    kept_tokens: tokens whose KV a head of the first sequence holds, on average; after its end, held then. None where
    the engine does not tell. plan: what a budget of bytes came to, and its predicted cost. steps: numbers of the
    engine's steps that it took part in, and what each took.
    """

    num_input_tokens: int
    num_reused_tokens: int
    arrival: float
    token_times: list[list[float]]
    kv_bytes: int
    kept_tokens: int | None = None
    plan: CachePlan | None = None
    steps: list[tuple[int, StepSeconds]] = field(default_factory=list)


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
    """

    texts: list[str]
    scores: list[float]
    perf_metrics: PerfMetrics
    finish_reasons: list[ov_genai.GenerationFinishReason]
    kept: list[KeptTokens | None] = field(default_factory=list)

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


@dataclass
class GenerationResult:
    """Texts of one request of `ContinuousBatchingPipeline.generate`."""

    m_request_id: int
    m_generation_ids: list[str]
    m_scores: list[float]
    m_status: ov_genai.GenerationStatus
    finish_reasons: list[ov_genai.GenerationFinishReason]
    perf_metrics: PerfMetrics

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
