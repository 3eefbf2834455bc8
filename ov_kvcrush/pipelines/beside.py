"""A second engine on a loaded model: another store, in other precisions, for what either of them reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ov_kvcrush.config import CacheConfig
from ov_kvcrush.errors import CrushError, RequestError
from ov_kvcrush.pipelines.backend import Backend, FanOut

if TYPE_CHECKING:
    from ov_kvcrush.pipelines.base import PipelineBase
    from ov_kvcrush.policies.base import Policy


def backend_beside(backend: Backend, cache_config: Any) -> Backend:
    """An engine on the same model and staging blocks with the store that `cache_config` asks for.

    Raises CrushError for an engine without a store, and for settings that the two cannot differ in.
    """
    from ov_kvcrush.engine.engine import Engine

    settings = CacheConfig.from_options(cache_config)
    if not isinstance(backend, Engine):
        raise CrushError("engine must be 'crush' for a pipeline beside another, got 'genai', which has no store")
    if not backend.memory.can_evict:
        raise CrushError("attention must be 'crush' for a pipeline beside another, got 'paged', which has no store")
    if settings.attention == "paged":
        raise CrushError("attention must be 'crush' or 'auto' beside another pipeline, got 'paged'")
    if settings.staging_bytes:
        raise CrushError(
            "staging_bytes must be left out beside another pipeline, whose staging blocks are shared, "
            f"got {settings.staging_bytes}"
        )
    return backend.make_beside(settings)


def others_for(policies: Sequence[Policy], pipelines: Sequence[PipelineBase]) -> tuple[FanOut, ...]:
    """Each policy with the engine of the pipeline that takes what it chose. Raises RequestError for another number."""
    if len(pipelines) != len(policies):
        raise RequestError(f"pipelines must be one for each of {len(policies)} policies, got {len(pipelines)}")
    homes = []
    for pipeline in pipelines:
        home = getattr(pipeline, "_backend", None)
        if home is None:
            raise RequestError(f"pipelines must be pipelines, got {type(pipeline).__name__}")
        homes.append(home)
    return tuple(FanOut(policy, home) for policy, home in zip(policies, homes, strict=True))
