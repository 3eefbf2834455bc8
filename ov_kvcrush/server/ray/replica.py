"""One server in a process of Ray's, on processors of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace

from ray import serve

from ov_kvcrush.pipelines.continuous_batching import ContinuousBatchingPipeline
from ov_kvcrush.server.app import create_app
from ov_kvcrush.server.ray.asgi import HttpRequest, ResponseStart, answer
from ov_kvcrush.server.ray.cores import cpus_by_core, cpus_of, pin
from ov_kvcrush.server.settings import ServerSettings
from ov_kvcrush.utils.process_memory import free_memory_bytes


class Replica:
    """Made by Serve; ready when its model is loaded."""

    async def __init__(self, server: ServerSettings, cores: int) -> None:  # type: ignore[misc]  # Serve awaits it
        context = serve.get_replica_context()
        self._name = context.replica_id.unique_id
        all_cpus = cpus_by_core(os.sched_getaffinity(0))
        pin(cpus_of(context.rank.local_rank, cores, all_cpus))
        if server.max_kv_mb is None:
            # Half of what is free, as for a server alone, divided by those that have room on this machine.
            server = replace(server, max_kv_mb=max(1, free_memory_bytes() // (len(all_cpus) // cores) // 2 >> 20))
        self._pipeline = await asyncio.to_thread(_load, server, cores)
        self._app = create_app(server, self._pipeline)
        self._life = AsyncExitStack()
        await self._life.enter_async_context(self._app.router.lifespan_context(self._app))

    async def answer(self, request: HttpRequest) -> AsyncIterator[ResponseStart | bytes]:
        """Have the server answer, piece by piece."""
        async for piece in answer(self._app, request, self._name):
            yield piece

    def metrics(self) -> tuple[str, str]:
        """Its name, and its figures for Prometheus."""
        return self._name, self._app.state.metrics.text().decode()

    async def __del__(self) -> None:
        """Called by Serve when the replica has no requests any more."""
        if hasattr(self, "_life"):  # it was ready
            await self._life.aclose()


def _load(server: ServerSettings, cores: int) -> ContinuousBatchingPipeline:
    return ContinuousBatchingPipeline(
        server.model,
        server.scheduler_config(),
        cache_config=server.cache_config(),
        # Where threads run is said by the process's mask; the plugin's own pinning would begin at processor 0.
        INFERENCE_NUM_THREADS=cores,
        ENABLE_CPU_PINNING=False,
    )
