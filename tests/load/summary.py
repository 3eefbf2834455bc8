"""Answers of a load run to its figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

PERCENTILES = (50, 95, 99)


@dataclass
class Answer:
    """One request. Moments are of CLOCK_MONOTONIC, in seconds, which all processes of a machine share.

    times: when text came, once for each piece of it. tokens: of the whole answer, which the pieces share equally.
    status: of HTTP; 0 = no answer at all. error: what went wrong; a 429 is none.
    """

    begin: float
    status: int = 0
    times: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it came to its end."""
        return self.status == 200 and self.error is None


@dataclass(frozen=True)
class Figures:
    """Of what happened between two moments; percentiles as in PERCENTILES, None where there was nothing.

    tokens_per_s: tokens that came in that time. ttft_ms: of answers whose first text came then, from sending the
    request. tpot_ms: of whole answers that ended then, (last - first moment) / (tokens - 1).
    answers, refused, errors: whole answers, 429s and anything else, of the whole run.
    """

    tokens_per_s: float
    ttft_ms: list[float] | None
    tpot_ms: list[float] | None
    answers: int
    refused: int
    errors: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def summarise(answers: list[Answer], begin: float, end: float) -> Figures:
    """Figures of the time from begin to end. Requests before and behind it keep the server as busy as within."""
    tokens = sum(a.tokens * sum(begin <= moment < end for moment in a.times) / len(a.times) for a in answers if a.times)
    ttft = [1e3 * (a.times[0] - a.begin) for a in answers if a.times and begin <= a.times[0] < end]
    tpot = [
        1e3 * (a.times[-1] - a.times[0]) / (a.tokens - 1)
        for a in answers
        if a.is_whole and a.tokens > 1 and len(a.times) > 1 and begin <= a.times[-1] < end
    ]
    return Figures(
        tokens_per_s=tokens / (end - begin),
        ttft_ms=_percentiles(ttft),
        tpot_ms=_percentiles(tpot),
        answers=sum(a.is_whole for a in answers),
        refused=sum(a.status == 429 for a in answers),
        errors=sum(not a.is_whole and a.status != 429 for a in answers),
    )


def _percentiles(values: list[float]) -> list[float] | None:
    return [float(x) for x in np.percentile(values, PERCENTILES)] if values else None
