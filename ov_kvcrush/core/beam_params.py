"""What a request wants of beam search: from openvino_genai's GenerationConfig, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import openvino_genai as ov_genai

from ov_kvcrush.errors import RequestError

StopCriteria = ov_genai.StopCriteria

UNLIMITED = 2**64 - 1  # how GenerationConfig spells "not given" for its integers


@dataclass(frozen=True)
class BeamParams:
    """Group beam search (Vijayakumar et al., Diverse Beam Search, 2016), with GenerationConfig's names.

    diversity_penalty: taken from the log probability of a token for each beam of an earlier group that chose it in the
    same step. length_penalty: scores are sums of log probabilities divided by the length to the power of it.
    stop_criteria: when a group that has as many answers as beams ends. no_repeat_ngram_size: no run of so many tokens
    occurs twice in prompt and answer; 0 = any may.
    """

    num_beams: int
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    stop_criteria: ov_genai.StopCriteria = StopCriteria.HEURISTIC
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        groups, penalty = self.num_beam_groups, self.diversity_penalty
        rules = (
            ("num_beams", self.num_beams >= 2, "at least 2 for beam search"),
            ("num_beam_groups", groups >= 1, "at least 1"),
            ("num_beams", groups < 1 or self.num_beams % groups == 0, f"divisible by num_beam_groups={groups}"),
            ("diversity_penalty", math.isfinite(penalty), "a finite number"),
            ("diversity_penalty", groups == 1 or penalty != 0, f"other than 0 with num_beam_groups={groups}"),
            ("diversity_penalty", groups != 1 or penalty == 0, "0 with num_beam_groups=1"),
            ("length_penalty", math.isfinite(self.length_penalty), "a finite number"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "at least 1"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise RequestError(f"{name} must be {rule}, got {getattr(self, name)!r}")

    @property
    def group_size(self) -> int:
        """Beams of each group."""
        return self.num_beams // self.num_beam_groups

    @classmethod
    def from_config(cls, config: ov_genai.GenerationConfig) -> BeamParams | None:
        """None for a config with one beam.

        Raises RequestError, also for what openvino_genai does not have together with beams.
        """
        if config.num_beams <= 1:
            return None
        usual = (
            ("do_sample", False),
            ("repetition_penalty", 1.0),
            ("presence_penalty", 0.0),
            ("frequency_penalty", 0.0),
        )
        for name, value in usual:
            if getattr(config, name) != value:
                raise RequestError(f"{name} must be {value} with beam search, got {getattr(config, name)!r}")
        if config.no_repeat_ngram_size < 1:
            raise RequestError(f"no_repeat_ngram_size must be at least 1, got {config.no_repeat_ngram_size}")
        return cls(
            num_beams=config.num_beams,
            num_beam_groups=config.num_beam_groups,
            diversity_penalty=config.diversity_penalty,
            length_penalty=config.length_penalty,
            stop_criteria=config.stop_criteria,
            no_repeat_ngram_size=0 if config.no_repeat_ngram_size == UNLIMITED else config.no_repeat_ngram_size,
        )
