"""The body of /v1/completions."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ov_kvcrush.server.schemas.common import SamplingFields

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Ids = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(SamplingFields):
    """The whole body. prompt: a text, several, the tokens of one, or of several."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=128)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=128)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
