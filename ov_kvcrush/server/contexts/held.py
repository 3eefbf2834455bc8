"""One context of one owner, in the store or not."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ov_kvcrush.contexts.context import Context

FIGURES: dict[str, tuple[type, ...]] = {
    "created": (float, int),
    "num_tokens": (int,),
    "kept_tokens": (int,),
    "nbytes": (int,),
    "seconds": (float, int),
    "kind": (str,),
}


@dataclass(eq=False)
class HeldContext:
    """What is known of it without its bytes.

    nbytes: in the store, shared ones included. parts: these by who brought them there (`Context.nbytes_by_part`), while
    it is in the store. kind: "text", which a question follows in the same message, or "conversation". policy: name
    and settings of what chose. path: its file, None = it has none. context: None = it is in its file only.
    """

    id: str
    owner: str
    name: str | None
    created: float
    num_tokens: int
    kept_tokens: int
    nbytes: int
    seconds: float
    kind: str
    policy: dict[str, Any] | None
    path: Path | None = None
    context: Context | None = None
    parts: dict[int, int] = field(default_factory=dict)
    used: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def part(self) -> int:
        """The key of its own bytes in `parts`: the same for forks of it."""
        return next(reversed(self.parts))

    def figures(self) -> dict[str, Any]:
        """What a file beside its file says."""
        return {name: getattr(self, name) for name in (*FIGURES, "name", "policy")}


def held(name: str, owner: str, context: Context, title: str | None) -> HeldContext:
    """A context that was just made. It waits for the engine's step."""
    content, policy = context.content, context.policy
    return HeldContext(
        name,
        owner,
        title,
        time.time(),
        context.num_tokens,
        context.kept_tokens,
        context.nbytes,
        context.seconds,
        "conversation" if content.messages and not content.is_open else "text",
        dict(policy) if policy else None,
        context=context,
        parts=context.nbytes_by_part,
        used=time.time(),
    )
