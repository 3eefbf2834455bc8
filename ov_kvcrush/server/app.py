"""The app: its paths, its limits, and the model that is loaded when it starts and closed when it ends."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from ov_kvcrush.errors import CrushError
from ov_kvcrush.model.adapters import Adapter, AdapterConfig
from ov_kvcrush.pipelines.continuous_batching import ContinuousBatchingPipeline
from ov_kvcrush.server.edge import Drain, Edge
from ov_kvcrush.server.errors import ApiError, answer_error
from ov_kvcrush.server.keys import make_owners
from ov_kvcrush.server.logs import tell
from ov_kvcrush.server.routes import chat, completions, contexts, health, metrics, models, responses
from ov_kvcrush.server.settings import ServerSettings
from ov_kvcrush.server.state import ServerState


def create_app(settings: ServerSettings, pipeline: ContinuousBatchingPipeline | None = None) -> FastAPI:
    """The server as an ASGI app.

    pipeline: one that is loaded already, with engine="crush", which stays its caller's; None = the app loads
    `settings.model` when it starts. `app.state.drain` says that it is to end.
    Raises CrushError when it starts for what cannot be served.
    """
    drain = Drain()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        pipe = pipeline if pipeline is not None else await asyncio.to_thread(load_pipeline, settings)
        owners = make_owners(settings.api_keys, _folder(settings))
        state = await asyncio.to_thread(ServerState, settings, pipe, owners)
        app.state.server, app.state.owners, app.state.metrics = state, owners, state.metrics
        tell("ready", model=state.name)
        yield
        drain.is_draining = True
        await drain.wait_idle()
        state.close()
        del app.state.server, pipe, state
        gc.collect()
        tell("closed")

    # Its own pages of documentation load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.settings, app.state.drain, app.state.owners, app.state.metrics = settings, drain, None, None
    app.add_middleware(Edge, settings=settings, drain=drain)
    for kind in (ApiError, CrushError, ValidationError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer_error)
    for part in (models, chat, completions, responses, contexts, health, metrics):
        app.include_router(part.router)
    # The page at /, where it is there.
    if importlib.util.find_spec("ov_kvcrush.server.routes.page") is not None:
        app.include_router(importlib.import_module("ov_kvcrush.server.routes.page").router)
    return app


def load_pipeline(settings: ServerSettings) -> ContinuousBatchingPipeline:
    """The model, loaded as the settings say. Raises CrushError."""
    loaded = [Adapter(path) for path in settings.adapter_paths.values()]
    properties = {"adapters": AdapterConfig([(adapter, 0.0) for adapter in loaded])} if loaded else {}
    return ContinuousBatchingPipeline(
        settings.model, settings.scheduler_config(), properties=properties, cache_config=settings.cache_config()
    )


def _folder(settings: ServerSettings) -> Path | None:
    return Path(settings.contexts_dir) if settings.contexts_dir is not None else None
