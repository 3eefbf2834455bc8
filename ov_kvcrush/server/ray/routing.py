"""Who gets a request: the replica that holds its context or conversation, else the least loaded one. Nothing of Ray."""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_CONTEXT_PATH = re.compile(r"/v1/contexts/([^/]+)")
_PREFIX_CHARS = 1024  # of a prompt without messages: prompts that begin so share their cached prefix
_MOST_HOLDERS = 65536


@dataclass(frozen=True)
class Affinity:
    """What ties requests to a replica.

    key: the same for requests that one replica should answer. is_new: nobody can hold anything of it yet, unless it was
    seen before.
    """

    key: str
    is_new: bool = False


def affinity_of(path: str, body: Any, caller: str) -> Affinity | None:
    """What ties a request: its context, `prompt_cache_key`, conversation, prompt or `user`, the first that it has.

    body: the parsed JSON, whatever it is. caller: who asks; keys of different callers have nothing in common.
    """
    in_path = _CONTEXT_PATH.match(path)
    if in_path:
        return Affinity(context_key(in_path[1], caller))
    if not isinstance(body, Mapping):
        return None
    if isinstance(body.get("context"), str):
        return Affinity(context_key(body["context"], caller))
    if isinstance(body.get("prompt_cache_key"), str):
        return Affinity(_digest("cache key", body["prompt_cache_key"], caller))
    messages = body.get("messages", body.get("input"))
    if isinstance(messages, list) and messages:
        return Affinity(_digest("conversation", _beginning(messages), caller), is_new=not _has_answers(messages))
    prompt = messages if isinstance(messages, str) else body.get("prompt")
    if isinstance(prompt, str) and len(prompt) >= _PREFIX_CHARS:
        return Affinity(_digest("prompt", prompt[:_PREFIX_CHARS], caller), is_new=True)
    if isinstance(body.get("user"), str):
        return Affinity(_digest("user", body["user"], caller))
    return None


def context_key(context_id: str, caller: str) -> str:
    """The key of all requests about one context."""
    return _digest("context", context_id, caller)


def _beginning(messages: list[Any]) -> list[Any]:
    """Messages up to the first of the user: later turns begin with the same."""
    for i, message in enumerate(messages):
        if isinstance(message, Mapping) and message.get("role") == "user":
            return messages[: i + 1]
    return messages[:1]


def _has_answers(messages: list[Any]) -> bool:
    return any(isinstance(message, Mapping) and message.get("role") == "assistant" for message in messages)


def _digest(kind: str, value: Any, caller: str) -> str:
    text = json.dumps([kind, value, caller], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def rendezvous(key: str, replicas: Iterable[str]) -> list[str]:
    """Replicas in the order in which they are responsible for a key (highest random weight; Thaler and Ravishankar,
    1998).

    Every process finds the same order; when a replica comes or goes, only keys move that are or were its own.
    """

    def weight(replica: str) -> bytes:
        return hashlib.blake2b(f"{key}\0{replica}".encode(), digest_size=8).digest()

    return sorted(replicas, key=weight, reverse=True)


def ranked(loads: Mapping[str, int], affinity: Affinity | None, holder: str | None, slack: int) -> list[list[str]]:
    """Groups of replicas, the group to try first at the front; within a group the least loaded is meant.

    loads: requests at each replica. holder: the one that answered last under this key, if that is known.
    Whoever holds a key, or else is responsible for it, gets its requests unless it has more than `slack` requests more
    than the least loaded one. A key that is new and that nobody holds is a matter of load only.
    """
    if affinity is None or len(loads) < 2:
        return [list(loads)]
    order = rendezvous(affinity.key, loads)
    is_held = holder in loads
    if is_held:
        order.sort(key=lambda replica: replica != holder)
    most = min(loads.values()) + (slack if is_held or not affinity.is_new else 0)
    first = next(replica for replica in order if loads[replica] <= most)
    return [[first], [replica for replica in order if replica != first]]


class Holders:
    """Which replica answered last under a key; the least recently used are forgotten."""

    def __init__(self, most: int = _MOST_HOLDERS) -> None:
        self._most = most
        self._of_key: OrderedDict[str, str] = OrderedDict()

    def of(self, key: str) -> str | None:
        """The replica that holds a key; None if that is not known."""
        return self._of_key.get(key)

    def note(self, key: str, replica: str) -> None:
        """A replica has answered under a key."""
        self._of_key[key] = replica
        self._of_key.move_to_end(key)
        if len(self._of_key) > self._most:
            self._of_key.popitem(last=False)
