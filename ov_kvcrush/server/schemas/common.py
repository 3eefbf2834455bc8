"""Fields that several bodies have."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Tokens = Annotated[int, Field(ge=1, le=1 << 40)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
ContextId = Annotated[str, Field(min_length=1, max_length=64)]


class Strict(BaseModel):
    """Values of the right type and nothing else."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """What a stream says beside the answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # no effect: chunks are not padded


class JsonSchema(Strict):
    """A schema and how strictly it is meant."""

    name: Annotated[str, Field(max_length=64)] = "answer"
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """What the answer must fit."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class SamplingFields(Strict):
    """How an answer is drawn, as OpenAI's API has it, with what vLLM has beside: top_k, min_p, repetition_penalty,
    min_tokens, ignore_eos.
    """

    model: str
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 30)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    max_tokens: Tokens | None = None
    min_tokens: Annotated[int, Field(ge=0, le=1 << 40)] | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    # What is told of the caller has no effect here.
    user: str | None = None
    metadata: dict[str, str] | None = None
    # Beyond OpenAI's: the id of a context that the prompt goes on from; passages that no policy drops.
    context: ContextId | None = None
    protect: Annotated[list[str], Field(max_length=256)] | None = None

    @field_validator("logit_bias")
    @classmethod
    def _of_tokens(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for token in value or ():
            if not (token.isascii() and token.isdecimal() and len(token) < 12):
                raise ValueError("keys must be token ids")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with what it took."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_usage_always(self) -> bool:
        """Whether every chunk of a stream has it."""
        return bool(self.wants_usage and self.stream_options and self.stream_options.continuous_usage_stats)
