"""From a context to its file and back: what must agree, and what the file holds beside the tiles."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.contexts.file import LAYOUT_VERSION, ContextRecord, load_context, save_context
from ov_kvcrush.core.snapshot import KVSnapshot, SnapshotArrays
from ov_kvcrush.errors import ContextFileError
from ov_kvcrush.model.adapters import AdapterParams
from ov_kvcrush.model.fingerprints import NO_ADAPTER, model_fingerprint, token_ids_fingerprint, tokenizer_fingerprint
from ov_kvcrush.model.source import ModelSource, ModelText
from ov_kvcrush.policies.base import Policy
from ov_kvcrush.policies.registry import as_policy, settings_of
from ov_kvcrush.prompts.context import ContextText, check_messages

_PROBE = "The quick brown fox, 12345: naïve 東京 \t\n"  # a tokenizer that is not the model folder's is known by this
_FIELDS: dict[str, tuple[type, ...]] = {
    "rendered": (str,),
    "messages": (list,),
    "is_open": (bool,),
    "base": (int,),
    "base_kept": (int,),
    "seconds": (float, int),
}

AdaptersOf = Callable[[str], AdapterParams]
LoadSnapshot = Callable[[SnapshotArrays, Policy | None, int, int], KVSnapshot]


@dataclass(frozen=True, eq=False)
class LoadedContext:
    """What a file says of its context. ids: int64 (S,). policy: None = all tokens stay."""

    ids: np.ndarray
    content: ContextText
    snapshot: KVSnapshot
    policy: Policy | None
    seconds: float


def save(
    path: str | os.PathLike[str],
    snapshot: KVSnapshot,
    ids: np.ndarray,
    content: ContextText,
    policy: Policy | None,
    seconds: float,
    made_with: Mapping[str, str],
) -> None:
    """Write a context. Raises ContextFileError where it cannot be written; an old file stays then."""
    arrays = snapshot.to_arrays()
    settings = _settings(policy)
    extra = {
        "rendered": content.rendered,
        "messages": [dict(message) for message in content.messages],
        "is_open": content.is_open,
        "base": snapshot.base,
        "base_kept": snapshot.base_kept,
        "seconds": seconds,
        **({"tools": list(content.tools)} if content.tools else {}),  # older files and most conversations have none
        **({"extra_context": content.extra_context} if content.extra_context else {}),
    }
    fingerprint = {
        **made_with,
        "adapters": snapshot.adapters.key or NO_ADAPTER,
        "policy": json.dumps(settings),
        "token_ids": token_ids_fingerprint(ids),
    }
    record = ContextRecord(
        ids=ids, heads=arrays.heads, tiles=arrays.tiles, fingerprint=fingerprint, policy=settings,
        num_evicted=arrays.num_evicted, num_choices=arrays.num_choices, carried=arrays.policy_state,
        representatives=arrays.representatives, extra=extra,
    )  # fmt: skip
    save_context(path, record)


def load(
    path: str | os.PathLike[str], made_with: Mapping[str, str], load_snapshot: LoadSnapshot, adapters_of: AdaptersOf
) -> LoadedContext:
    """Read a context. Raises ContextFileError for a file that is none, is damaged or does not fit."""
    record = load_context(path, made_with)
    extra, ids = record.extra, np.array(record.ids, np.int64)
    _check_fields(extra, path)
    try:
        messages = check_messages(extra["messages"]) if extra["messages"] else ()
        tools = tuple(dict(tool) for tool in extra.get("tools", ()))
        extra_context = dict(extra.get("extra_context", {}))
        content = ContextText(str(extra["rendered"]), messages, bool(extra["is_open"]), tools, extra_context)
        base, base_kept, seconds = int(extra["base"]), int(extra["base_kept"]), float(extra["seconds"])
        policy = as_policy(dict(record.policy)) if record.policy else None
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ContextFileError(f"{path} must say what its context is, got {error!r}") from None
    arrays = SnapshotArrays(
        record.heads, record.tiles, record.num_evicted, record.num_choices, record.carried, record.representatives
    )
    key = record.fingerprint["adapters"]
    adapters = adapters_of("" if key == NO_ADAPTER else key)
    snapshot = replace(load_snapshot(arrays, policy, base, base_kept), adapters=adapters)
    if snapshot.num_tokens > len(ids):
        snapshot.release()
        raise ContextFileError(f"{path} must hold KV of its {len(ids)} tokens, got that of {snapshot.num_tokens}")
    return LoadedContext(ids, content, snapshot, policy, seconds)


def _check_fields(extra: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Raise ContextFileError for a field that is missing or of another type than `save` writes."""
    for name, kinds in _FIELDS.items():
        if type(extra.get(name)) not in kinds:
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ContextFileError(f"{name} must be of type {expected} in {path}, got {extra.get(name)!r}")


def _settings(policy: Policy | None) -> dict[str, Any]:
    return {} if policy is None else dict(settings_of(policy))


def made_with(
    source: ModelSource, own_tokenizer: ov_genai.Tokenizer | None, storage: Mapping[str, str]
) -> dict[str, str]:
    """What a file must agree with a pipeline in. own_tokenizer: one that is not the model folder's."""
    if own_tokenizer is None:
        assert not isinstance(source, ModelText), "a text without a tokenizer"
        tokenizer = tokenizer_fingerprint(source)
    else:
        tokenizer = _probe(own_tokenizer)
    return {
        "layout_version": str(LAYOUT_VERSION),
        "model": model_fingerprint(source),
        "tokenizer": tokenizer,
        **storage,
    }


def _probe(tokenizer: ov_genai.Tokenizer) -> str:
    ids = np.array(tokenizer.encode(_PROBE).input_ids.data, np.int64).tobytes()
    return hashlib.sha256(ids + tokenizer.chat_template.encode()).hexdigest()
