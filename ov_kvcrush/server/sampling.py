"""From the fields of a body to what the engine samples by."""

from __future__ import annotations

import json
import secrets
from typing import Any

import openvino_genai as ov_genai

from ov_kvcrush.server.errors import ApiError
from ov_kvcrush.server.schemas.common import ResponseFormat, SamplingFields

_LENIENT = "x-guidance"  # llguidance's own keyword: leave out what it does not enforce


def generation_config(
    model: ov_genai.GenerationConfig, body: SamplingFields, max_tokens: int | None, num_logprobs: int | None
) -> ov_genai.GenerationConfig:
    """The config of a request.

    model: the model's own, a copy: what the body leaves out is as there, and else as OpenAI's defaults are.
    num_logprobs: tokens whose log probability is told beside the drawn one's; None = none is told.
    """
    config = model
    config.apply_chat_template = False
    if max_tokens is not None:
        config.max_new_tokens = max_tokens
    config.num_return_sequences = body.n or 1
    for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
        value = getattr(body, name)
        if value is not None:
            setattr(config, name, value)
    if body.top_k is not None and body.top_k > 0:
        config.top_k = body.top_k
    config.do_sample = config.temperature > 0
    if not config.do_sample and config.num_return_sequences > 1:
        raise ApiError(400, f"n must be 1 while temperature is 0, got {body.n}", "n")
    config.rng_seed = secrets.randbits(62) if body.seed is None else body.seed % (1 << 63)
    if body.min_tokens:
        config.min_new_tokens = body.min_tokens
    config.ignore_eos = bool(body.ignore_eos)
    config.stop_strings = set(body.stops)
    if num_logprobs is not None:  # the engine counts the drawn token's own as one
        config.logprobs = max(2, num_logprobs) if num_logprobs else 1
    if body.response_format is not None:
        config.structured_output_config = structured(body.response_format)
    return config


def biases(body: SamplingFields) -> dict[int, float]:
    """What is added to logits, by token."""
    return {int(token): bias for token, bias in (body.logit_bias or {}).items()}


def structured(wanted: ResponseFormat) -> ov_genai.StructuredOutputConfig | None:
    """What an answer must fit; None = anything."""
    if wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return ov_genai.StructuredOutputConfig(json_schema=json.dumps({"type": "object"}))
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise ApiError(400, "response_format.json_schema must have a schema, got none", "response_format.json_schema")
    schema = enforced(wanted.json_schema.schema_, is_strict=bool(wanted.json_schema.strict))
    return ov_genai.StructuredOutputConfig(json_schema=json.dumps(schema))


def enforced(schema: dict[str, Any], *, is_strict: bool) -> dict[str, Any]:
    """A schema of which, unless it is strict, keywords that cannot be enforced are left out."""
    return schema if is_strict else {**schema, _LENIENT: {"lenient": True}}
