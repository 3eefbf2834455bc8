"""Context: a text in the store, compressed once, that many requests go on from."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from ov_kvcrush.core.outputs import KeptTokens
from ov_kvcrush.core.snapshot import KVSnapshot
from ov_kvcrush.errors import RequestError
from ov_kvcrush.policies.base import Policy
from ov_kvcrush.policies.registry import PolicyLike, Settings, as_policy, build, name_of, settings_of
from ov_kvcrush.prompts.context import ContextText

DEFAULT_CONTEXT_POLICY = "kvzip"

Progress = Callable[[int, int], None]  # tokens that were read, and all


class ContextOwner(Protocol):
    """Who makes the contexts of one pipeline, and what comes of them."""

    def kv_heads(self) -> list[int]: ...

    def extend(self, context: Context, text: str, policy: Policy | None, progress: Progress | None) -> Context: ...

    def save(self, context: Context, path: str | os.PathLike[str]) -> None: ...

    def load(self, path: str | os.PathLike[str]) -> Context: ...


class HasContexts(Protocol):
    """A pipeline."""

    @property
    def context_owner(self) -> ContextOwner: ...


class Context:
    """A text or conversation that was read once and compressed, independent of what will be asked.

    `LLMPipeline.compress` makes one, `load` reads one from a file. It does not change: questions, forks and what
    extends it share its bytes and add their own. Its bytes are given back when nothing refers to it any more, or by
    `close`, or at the end of a `with` block.
    """

    def __init__(
        self,
        owner: ContextOwner,
        ids: np.ndarray,
        text: ContextText,
        snapshot: KVSnapshot,
        policy: Policy | None,
        seconds: float = 0.0,
        parts: Mapping[int, int] | None = None,
    ) -> None:
        self._owner_ref = weakref.ref(owner)
        self._ids = ids
        self._text = text
        self._snapshot: KVSnapshot | None = snapshot
        self._policy = policy
        self._seconds = seconds
        self._parts = parts
        self._finalizer = weakref.finalize(self, snapshot.release)

    # -- what it is ----------------------------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """Tokens of the text, kept or not, with those of the chat template before it."""
        return len(self._ids)

    @property
    def kept_tokens(self) -> int:
        """Tokens that a KV head holds, on average over all layers and heads."""
        return self._held().num_kept

    @property
    def nbytes(self) -> int:
        """Bytes of its keys and values in the store, those that it shares with others included."""
        snapshot = self._held()
        self._owner()
        return snapshot.nbytes

    @property
    def nbytes_by_part(self) -> dict[int, int]:
        """Its bytes by who brought them into the store, its own last: forks of one context have one part, what extends
        it has that and one of its own.

        The sum over the different parts of several contexts of one pipeline is their bytes, shared ones counted once.
        """
        if self._parts is None:
            self._parts = {self._held().store_id: self.nbytes}
        return dict(self._parts)

    @property
    def policy(self) -> Settings | None:
        """Name and settings of what chose the tokens; None if all of them stay.

        Without kept and kept_tokens where nobody said how much stays (`CacheConfig.budget`).
        """
        return None if self._policy is None else settings_of(self._policy)

    @property
    def seconds(self) -> float:
        """What it took to read and compress it, when that was done."""
        return self._seconds

    @property
    def is_open(self) -> bool:
        """Whether it can be used: it was not closed."""
        return self._snapshot is not None

    @property
    def text(self) -> str:
        """What it says, as the chat template has it."""
        return self._text.rendered

    def kept_map(self) -> KeptTokens:
        """Which places of the text each layer and KV head still holds."""
        snapshot = self._held()
        positions = snapshot.state.positions_of(snapshot.num_tokens)
        if positions is None:
            everything = np.arange(snapshot.num_tokens, dtype=np.int32)
            positions = [[everything] * num_heads for num_heads in self._owner().kv_heads()]
        return KeptTokens(self._ids, positions, snapshot.state.representatives)

    def __repr__(self) -> str:
        if self._snapshot is None:
            return f"Context({self.num_tokens} tokens, closed)"
        return f"Context({self.num_tokens} tokens, {self.kept_tokens} kept)"

    # -- what comes of it ----------------------------------------------------------------------------------------------

    def fork(self) -> Context:
        """Another one of the same bytes, with a life of its own."""
        snapshot = self._held()
        owner = self._owner()
        return Context(owner, self._ids, self._text, snapshot.fork(), self._policy, self._seconds, self._parts)

    def extend(self, text: str, *, policy: PolicyLike = None, progress: Progress | None = None) -> Context:
        """This context and more text behind it, which a policy compresses by itself.

        policy: None = the one that compressed this, if it can choose from a text that is read only once; else all of
        the new text stays, as with "none". Raises RequestError, also for a policy that reads a text twice.
        """
        chosen = as_policy(policy)
        if chosen is not None and chosen.inputs.replay:
            raise RequestError(f"policy must be one that reads a text once in extend(), got {name_of(chosen)!r}")
        if chosen is None and self._policy is not None and not self._policy.inputs.replay:
            chosen = self._policy
        return self._owner().extend(self, text, chosen, progress)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file that `load` reads, with all that must agree: model, tokenizer, precisions, tokens.

        Whatever happens meanwhile, `path` is the old file or the new one. Raises ContextFileError where it cannot be
        written.
        """
        self._owner().save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], pipeline: HasContexts) -> Context:
        """A context from its file. The time is that of copying its bytes.

        Raises ContextFileError for a file that is missing, damaged, newer, or was made with something else than
        `pipeline` has, naming what differs; OutOfMemory where the store has no room.
        """
        return pipeline.context_owner.load(path)

    def close(self) -> None:
        """Give its bytes back now. Using it afterwards is an error; requests and forks of it go on."""
        self._snapshot = None
        self._finalizer()

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- for the pipeline ----------------------------------------------------------------------------------------------

    @property
    def ids(self) -> np.ndarray:
        """int64 (num_tokens,)"""
        return self._ids

    @property
    def content(self) -> ContextText:
        """What it says."""
        return self._text

    @property
    def chosen_by(self) -> Policy | None:
        """The policy that compressed it."""
        return self._policy

    def snapshot_for(self, owner: ContextOwner) -> KVSnapshot:
        """Its KV, for a request of the pipeline that `owner` belongs to.

        Raises RequestError for another pipeline's context and for a closed one.
        """
        snapshot = self._held()
        if self._owner() is not owner:
            raise RequestError(
                "context must be of the pipeline that is asked, got another's; save it, and load it for this one"
            )
        return snapshot

    def _held(self) -> KVSnapshot:
        if self._snapshot is None:
            raise RequestError("context must be open, got one that was closed")
        return self._snapshot

    def _owner(self) -> ContextOwner:
        owner = self._owner_ref()
        if owner is None:
            raise RequestError("context must be used while its pipeline is there, got one whose pipeline is gone")
        return owner


def context_policy(policy: PolicyLike, kept: float | None) -> Policy:
    """What `compress` compresses by: KVzip by default, with a DefaultBudget where neither says how much stays.

    Raises CrushError if both do.
    """
    if policy is None:
        policy = DEFAULT_CONTEXT_POLICY
    if kept is None:
        chosen = as_policy(policy)
        assert chosen is not None
        return chosen
    if isinstance(policy, str):
        return build(policy, kept=kept)
    raise RequestError(f"kept must be left out where policy has its own settings, got {kept}")


def require_context(value: Any) -> Context | None:
    """Raise RequestError for what is no Context."""
    if value is None or isinstance(value, Context):
        return value
    raise RequestError(f"context must be a Context, as compress() makes them, got {type(value).__name__}")
