"""The bodies of /v1/contexts."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from ov_kvcrush.server.schemas.chat import Message, Tool
from ov_kvcrush.server.schemas.common import Strict

Name = Annotated[str, Field(max_length=256)]
PolicySettings = Annotated[dict[str, int | float | str | None], Field(max_length=32)]


class ContextRequest(Strict):
    """What becomes a context: a text, or messages with their tools.

    policy: a name, or its settings with the name among them. budget: bytes over those of a bf16 cache, as "1/8". kept:
    the fraction that stays instead. protect: passages that stay.
    """

    text: Annotated[str, Field(min_length=1)] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=100_000)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    name: Name | None = None
    policy: Annotated[str, Field(max_length=64)] | PolicySettings | None = None
    budget: float | Annotated[str, Field(max_length=32)] | None = None
    kept: float | None = None
    protect: Annotated[list[str], Field(max_length=256)] | None = None


class ExtendRequest(Strict):
    """More text behind a context."""

    text: Annotated[str, Field(min_length=1)]
    name: Name | None = None
    policy: Annotated[str, Field(max_length=64)] | PolicySettings | None = None


class ForkRequest(Strict):
    """Another context of the same bytes."""

    name: Name | None = None


def fields_of(form: dict[str, Any]) -> ContextRequest:
    """The body of a form, whose values are texts. Raises ValidationError."""
    values = dict(form)
    if "kept" in values:
        values["kept"] = _number(values["kept"])
    if "protect" in values and isinstance(values["protect"], str):
        values["protect"] = [values["protect"]]
    return ContextRequest.model_validate(values)


def _number(text: Any) -> Any:
    try:
        return float(text)
    except (TypeError, ValueError):
        return text
