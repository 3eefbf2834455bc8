"""From a context to its file and back: what must agree, and what the file holds beside the tiles."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_kvcrush.contexts.file import load_context, save_context
from ov_kvcrush.contexts.record import LAYOUT_VERSION, ContextRecord
from ov_kvcrush.errors import ContextFileError, CrushError
from ov_kvcrush.model.fingerprints import model_fingerprint, token_ids_fingerprint, tokenizer_fingerprint
from ov_kvcrush.policies.base import Policy
from ov_kvcrush.policies.registry import as_policy, settings_of
from ov_kvcrush.prompts.context import ContextText

if TYPE_CHECKING:
    from ov_kvcrush.contexts.context import Context
    from ov_kvcrush.pipelines.base import PipelineBase

_PROBE = "The quick brown fox, 12345: naïve 東京 \t\n"  # a tokenizer that is not the model folder's is known by this


def save(context: Context, pipeline: PipelineBase, path: str | os.PathLike[str]) -> None:
    """Write a context. Raises ContextFileError where it cannot be written; an old file stays then."""
    kv = context.of(pipeline)
    held = pipeline._backend.dump_held(kv)
    policy = _settings(context.chosen_by)
    text = context.content
    extra = {
        "rendered": text.rendered,
        "messages": [dict(message) for message in text.messages],
        "is_open": text.is_open,
        "base": kv.base,
        "base_kept": kv.base_kept,
        "seconds": context.seconds,
    }
    fingerprint = {
        **_made_with(pipeline),
        "policy": json.dumps(policy),
        "token_ids": token_ids_fingerprint(context.ids),
    }
    record = ContextRecord(
        ids=context.ids, heads=held.heads, tiles=held.tiles, fingerprint=fingerprint, policy=policy,
        num_evicted=kv.kept.num_evicted, num_choices=kv.kept.num_choices, carried=held.carried,
        representatives=held.representatives, extra=extra,
    )  # fmt: skip
    save_context(path, record)


def load(pipeline: PipelineBase, path: str | os.PathLike[str]) -> Context:
    """Read a context for a pipeline. Raises ContextFileError for a file that is none, is damaged or does not fit."""
    from ov_kvcrush.contexts.context import Context

    record = load_context(path, _made_with(pipeline))
    extra, ids = record.extra, np.array(record.ids, np.int64)
    try:
        messages = tuple({"role": str(x["role"]), "content": str(x["content"])} for x in extra["messages"])
        text = ContextText(str(extra["rendered"]), messages, bool(extra["is_open"]))
        base, base_kept, seconds = int(extra["base"]), int(extra["base_kept"]), float(extra["seconds"])
        policy = as_policy(dict(record.policy)) if record.policy else None
    except (KeyError, TypeError, CrushError) as error:
        raise ContextFileError(f"{path} must say what its context is, got {error!r}") from None
    kv = pipeline._backend.load_held(record, policy, base, base_kept)
    if kv.num_tokens > len(ids):
        pipeline._backend.drop_held(kv)
        raise ContextFileError(f"{path} must hold KV of its {len(ids)} tokens, got that of {kv.num_tokens}")
    return Context(pipeline, ids, text, kv, policy, seconds)


def _settings(policy: Policy | None) -> dict[str, Any]:
    return {} if policy is None else dict(settings_of(policy))


def _made_with(pipeline: PipelineBase) -> dict[str, str]:
    """What a file must agree with a pipeline in."""
    return {
        "layout_version": str(LAYOUT_VERSION),
        "model": model_fingerprint(pipeline._folder),
        "tokenizer": _tokenizer(pipeline),
        **pipeline._backend.storage(),
    }


def _tokenizer(pipeline: PipelineBase) -> str:
    if not pipeline._has_own_tokenizer:
        return tokenizer_fingerprint(pipeline._folder)
    ids = np.array(pipeline._tokenizer.encode(_PROBE).input_ids.data, np.int64).tobytes()
    return hashlib.sha256(ids + pipeline._tokenizer.chat_template.encode()).hexdigest()
