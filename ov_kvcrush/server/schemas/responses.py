"""The body of /v1/responses: text in, text out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ov_kvcrush.server.schemas.common import ContextId, Strict, Tokens


class ContentPart(Strict):
    """A part of a message. Answers that are sent back have annotations and logprobs, of nothing."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None


class InputMessage(Strict):
    """A message; id and status are of answers that are sent back."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    id: str | None = None
    status: Literal["completed", "incomplete"] | None = None
    phase: None = None


class TextFormat(Strict):
    """What the answer must fit."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(max_length=64)] = "answer"
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Strict):
    """Of the answer's text."""

    format: TextFormat = TextFormat(type="text")


class ResponseRequest(Strict):
    """The whole body. Nothing is stored: `store` must be false or left out."""

    model: str
    input: Annotated[str, Field(min_length=1)] | Annotated[list[InputMessage], Field(min_length=1, max_length=100_000)]
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    store: Literal[False] | None = None
    background: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    truncation: Literal["disabled"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Beyond OpenAI's.
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    context: ContextId | None = None
