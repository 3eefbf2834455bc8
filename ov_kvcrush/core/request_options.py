"""What a request asks for beside its sampling and its cache: how urgent it is, how long it may take, biased tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ov_kvcrush.errors import RequestError


@dataclass(frozen=True)
class RequestOptions:
    """Options of one request.

    priority: requests of a higher one are scheduled first; 0 = usual.
    timeout_s: seconds from its arrival after which it ends, wherever it is; None = never.
    logit_bias: {token id: what is added to its logit}, -inf bans the token.
    Raises RequestError for values that cannot be.
    """

    priority: int = 0
    timeout_s: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.priority, bool) or not isinstance(self.priority, int):
            raise RequestError(f"priority must be an integer, got {self.priority!r}")
        limit = self.timeout_s
        is_number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
        if limit is not None and not (is_number and limit > 0 and math.isfinite(limit)):
            raise RequestError(f"timeout_s must be a finite number of seconds above 0, got {limit!r}")
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias must be a dict of token ids and numbers, got {self.logit_bias!r}")


DEFAULT_REQUEST_OPTIONS = RequestOptions()
