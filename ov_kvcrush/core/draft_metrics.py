"""Timings of a model and of the draft model that guesses for it, computed as openvino_genai computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

from ov_kvcrush.core.perf_metrics import MeanStdPair, PerfMetrics, RawPerfMetrics


class ModelStep(NamedTuple):
    """One step of one of the two models: all of it and its inference, in seconds, and the tokens that it gave."""

    seconds: float
    inference: float
    num_tokens: int


@dataclass
class SDPerfMetrics(PerfMetrics):
    """Timings of one of two models by its steps that gave tokens. Fields are in seconds, getters return milliseconds.

    The first two steps stand alone, as TTFT and TTST; TPOT and latency are of those behind them.
    """

    step_s: list[float] = field(default_factory=list)
    ttst_s: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)

    @classmethod
    def of_steps(cls, load_time_s: float, steps: Sequence[ModelStep]) -> SDPerfMetrics:
        """Those of one call."""
        seconds = [step.seconds for step in steps]
        return cls(
            load_time_s,
            num_generated_tokens=sum(step.num_tokens for step in steps),
            ttft_s=seconds[:1],
            batch_sizes=[step.num_tokens for step in steps],
            token_durations_s=[step.seconds / step.num_tokens for step in steps[2:]],
            generate_s=[sum(seconds)],
            inference_of_calls_s=[sum(step.inference for step in steps)],
            step_s=seconds,
            ttst_s=seconds[1:2],
            latency_s=seconds[2:],
        )

    @property
    def raw_metrics(self) -> RawPerfMetrics:
        """m_durations: of the steps, in microseconds."""
        return replace(super().raw_metrics, m_durations=[s * 1e6 for s in self.step_s])

    def get_ttst(self) -> MeanStdPair:
        """Time of the second step."""
        return self._ms(self.ttst_s)

    def get_latency(self) -> MeanStdPair:
        """Time of a step from the third on."""
        return self._ms(self.latency_s)


@dataclass
class SDPerModelsPerfMetrics(SDPerfMetrics):
    """Timings of calls, and of both models in them."""

    main_model_metrics: SDPerfMetrics = field(default_factory=SDPerfMetrics)
    draft_model_metrics: SDPerfMetrics = field(default_factory=SDPerfMetrics)

    @classmethod
    def of_call(
        cls, metrics: PerfMetrics, main: Sequence[ModelStep], draft: Sequence[ModelStep]
    ) -> SDPerModelsPerfMetrics:
        """metrics: of the call."""
        load = metrics.load_time_s
        return cls(
            **{f.name: getattr(metrics, f.name) for f in fields(PerfMetrics)},
            main_model_metrics=SDPerfMetrics.of_steps(load, main),
            draft_model_metrics=SDPerfMetrics.of_steps(load, draft),
        )

    def get_num_accepted_tokens(self) -> int:
        """Guessed tokens that were the model's own."""
        return self.num_accepted_tokens

    def get_num_draft_tokens(self) -> int:
        """Guessed tokens that the model looked at."""
        return self.num_drafted_tokens

    def get_num_rejected_tokens(self) -> int:
        """Guessed tokens that were not the model's own."""
        return self.num_drafted_tokens - self.num_accepted_tokens

    def get_num_draft_processed_tokens(self) -> int:
        """Tokens that the draft model wrote."""
        return self.draft_model_metrics.num_generated_tokens

    def get_draft_acceptance_rate(self) -> float:
        """Of the guessed tokens; NaN where there are none."""
        return _quotient(self.num_accepted_tokens, self.num_drafted_tokens)

    def get_draft_processed_to_candidate_ratio(self) -> float:
        """Tokens that the draft model wrote over those that the model looked at; NaN where there are none."""
        return _quotient(self.draft_model_metrics.num_generated_tokens, self.num_drafted_tokens)

    def get_draft_to_main_inference_duration_ratio(self) -> float:
        """Seconds of the draft model's inferences over the model's; NaN where there are none."""
        draft, main = (sum(x.inference_of_calls_s) for x in (self.draft_model_metrics, self.main_model_metrics))
        return _quotient(draft, main)


def _quotient(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
