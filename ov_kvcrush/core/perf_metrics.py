"""Timings of `generate` calls, computed as openvino_genai computes them; its own class cannot be filled from Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np

from ov_kvcrush.errors import CrushError


class MeanStdPair(NamedTuple):
    """Mean and standard deviation, in milliseconds unless a method says otherwise."""

    mean: float
    std: float


class SummaryStats(NamedTuple):
    """Mean, standard deviation, minimum and maximum, in milliseconds; -1 if there is nothing to sum up."""

    mean: float = -1.0
    std: float = -1.0
    min: float = -1.0
    max: float = -1.0

    def as_tuple(self) -> tuple[float, float, float, float]:
        """The four as a tuple."""
        return self.mean, self.std, self.min, self.max


def mean_std(values: list[float]) -> MeanStdPair:
    """Mean and standard deviation of `values`; (-1, -1), as openvino_genai has it, if there are none."""
    if not values:
        return MeanStdPair(-1.0, -1.0)
    return MeanStdPair(float(np.mean(values)), float(np.std(values)))


@dataclass(frozen=True)
class RawPerfMetrics:
    """What the statistics are computed from, in microseconds, under openvino_genai's names.

    m_new_token_times: moments of the steps that gave tokens, in milliseconds, as there; m_batch_sizes: how many tokens
    each of them gave.
    m_durations: for each token after those of the first step, the time of its step over the step's tokens.
    token_infer_durations, sampling_durations: one for each step; inference_durations: one for each call.
    """

    generate_durations: list[float] = field(default_factory=list)
    tokenization_durations: list[float] = field(default_factory=list)
    detokenization_durations: list[float] = field(default_factory=list)
    chat_template_durations: list[float] = field(default_factory=list)
    m_times_to_first_token: list[float] = field(default_factory=list)
    m_new_token_times: list[float] = field(default_factory=list)
    token_infer_durations: list[float] = field(default_factory=list)
    m_batch_sizes: list[int] = field(default_factory=list)
    m_durations: list[float] = field(default_factory=list)
    inference_durations: list[float] = field(default_factory=list)
    grammar_compile_times: list[float] = field(default_factory=list)
    sampling_durations: list[float] = field(default_factory=list)


@dataclass
class PerfMetrics:
    """Timings of `generate` calls over all their requests. Fields are in seconds, getters return milliseconds."""

    load_time_s: float = 0.0
    num_input_tokens: int = 0
    num_generated_tokens: int = 0
    # Prompt tokens whose KV came from an earlier turn or request instead of being computed.
    num_reused_tokens: int = 0
    # Guessed tokens that were run, and those of them that were right.
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    kv_bytes: int = 0
    # Tokens whose KV a head held at the end, on average; None where the engine does not tell.
    kept_tokens: int | None = None
    ttft_s: list[float] = field(default_factory=list)
    new_token_moments_s: list[float] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    token_durations_s: list[float] = field(default_factory=list)
    generate_s: list[float] = field(default_factory=list)
    inference_s: list[float] = field(default_factory=list)
    inference_of_calls_s: list[float] = field(default_factory=list)
    sampling_s: list[float] = field(default_factory=list)
    tokenization_s: list[float] = field(default_factory=list)
    detokenization_s: list[float] = field(default_factory=list)
    chat_template_s: list[float] = field(default_factory=list)

    def add_tokens(self, start: float, token_times: Iterable[Sequence[float]]) -> None:
        """Note the tokens of one call. token_times: of each sequence; tokens of one step have the same moment."""
        steps = sorted(Counter(moment for times in token_times for moment in times).items())
        before = None
        for moment, size in steps:
            if before is None:
                self.ttft_s.append(moment - start)
            else:
                self.token_durations_s += [(moment - before) / size] * size
            before = moment
            self.new_token_moments_s.append(moment)
            self.batch_sizes.append(size)
            self.num_generated_tokens += size

    def add_steps(self, inference_s: list[float], sampling_s: list[float]) -> None:
        """Note what each step of one call took."""
        self.inference_s += inference_s
        self.sampling_s += sampling_s
        if inference_s:
            self.inference_of_calls_s.append(sum(inference_s))

    def __add__(self, other: PerfMetrics) -> PerfMetrics:
        """Those of the calls of both. Raises CrushError for metrics of different pipelines."""
        if not isinstance(other, type(self)):
            return NotImplemented
        if self.load_time_s != other.load_time_s:
            raise CrushError(
                "metrics must be of the same pipeline to be added, got load times of "
                f"{self.get_load_time():.0f} and {other.get_load_time():.0f} ms"
            )
        both = type(self)(self.load_time_s)
        for name in (f.name for f in fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "kept_tokens":
                both.kept_tokens = mine if theirs is None else theirs + (mine or 0)
            elif name != "load_time_s":
                setattr(both, name, mine + theirs)
        return both

    @property
    def raw_metrics(self) -> RawPerfMetrics:
        """The same in microseconds, as openvino_genai has it."""

        def us(seconds: list[float]) -> list[float]:
            return [s * 1e6 for s in seconds]

        return RawPerfMetrics(
            generate_durations=us(self.generate_s),
            tokenization_durations=us(self.tokenization_s),
            detokenization_durations=us(self.detokenization_s),
            chat_template_durations=us(self.chat_template_s),
            m_times_to_first_token=us(self.ttft_s),
            m_new_token_times=[s * 1e3 for s in self.new_token_moments_s],
            token_infer_durations=us(self.inference_s),
            m_batch_sizes=list(self.batch_sizes),
            m_durations=us(self.token_durations_s),
            inference_durations=us(self.inference_of_calls_s),
            sampling_durations=us(self.sampling_s),
        )

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
        """Time to the first token of a call."""
        return self._ms(self.ttft_s)

    def get_tpot(self) -> MeanStdPair:
        """Time per output token after the first step: in a batch a step's time over the tokens that it gave."""
        return self._ms(self.token_durations_s)

    def get_ipot(self) -> MeanStdPair:
        """Inference time per step."""
        return self._ms(self.inference_s)

    def get_throughput(self) -> MeanStdPair:
        """Tokens per second after the first step: 1000 / TPOT; negative where there is none."""
        tpot = self.get_tpot()
        if not tpot.mean:
            return MeanStdPair(-1.0, -1.0)
        return MeanStdPair(1000 / tpot.mean, 1000 * tpot.std / tpot.mean**2)

    def get_generate_duration(self) -> MeanStdPair:
        """Whole `generate` call."""
        return self._ms(self.generate_s)

    def get_inference_duration(self) -> MeanStdPair:
        """All inferences of a call together."""
        return self._ms(self.inference_of_calls_s)

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

    def get_grammar_compiler_init_times(self) -> dict[str, float]:
        """Empty: there are no grammars."""
        return {}

    def get_grammar_compile_time(self) -> SummaryStats:
        """Nothing: there are no grammars."""
        return SummaryStats()
