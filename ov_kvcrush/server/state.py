"""What all requests of one app share: the pipeline, its texts, its contexts, its figures, and who is being answered."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from fastapi import Request

from ov_kvcrush.errors import CrushError
from ov_kvcrush.model.adapters import AdapterConfig
from ov_kvcrush.pipelines.continuous_batching import ContinuousBatchingPipeline
from ov_kvcrush.server.contexts.store import ContextStore
from ov_kvcrush.server.detokenizer import TokenTexts
from ov_kvcrush.server.errors import ApiError
from ov_kvcrush.server.keys import Owners
from ov_kvcrush.server.metrics import Metrics
from ov_kvcrush.server.settings import ServerSettings
from ov_kvcrush.server.tools.formats import ToolFormat, tool_format

P = ParamSpec("P")
T = TypeVar("T")
_ENCODERS = 2  # threads that tokenize and compile grammars beside the engine


class ServerState:
    """Made when the app starts, closed when it ends. owner names come from `owners`."""

    def __init__(self, settings: ServerSettings, pipeline: ContinuousBatchingPipeline, owners: Owners) -> None:
        if pipeline.engine != "crush":
            raise CrushError(f"engine must be 'crush' to be served, got {pipeline.engine!r}")
        self.settings = settings
        self.pipeline = pipeline
        self.owners = owners
        self.name = settings.model_name
        self.adapters = _named_adapters(settings, pipeline)
        self.created = int(time.time())
        self.texts = TokenTexts(pipeline.get_tokenizer())
        self.metrics = Metrics()
        self.contexts = ContextStore(pipeline, settings, self.metrics)
        self.metrics.watch(pipeline.get_metrics, self.contexts.figures)
        self.tools: ToolFormat = tool_format(settings.tool_format, pipeline.get_tokenizer().chat_template)
        self._encoders = ThreadPoolExecutor(_ENCODERS, "ov_kvcrush encoder")
        self._numbers = itertools.count(1)

    def next_number(self) -> int:
        """An id for a request of the engine."""
        return next(self._numbers)

    async def encode(self, function: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Run what takes the processor for milliseconds beside the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._encoders, partial(function, *args, **named))

    def check_model(self, name: str) -> None:
        """Raise 404 for what is neither the model that is there nor one of its adapters."""
        known = (self.name, *self.adapters)
        if name not in known:
            rule = f"one of {', '.join(known)}" if self.adapters else self.name
            raise ApiError(404, f"model must be {rule}, got {name!r}", "model", "model_not_found")

    def close(self) -> None:
        """Give back what it holds; requests have ended."""
        self._encoders.shutdown(cancel_futures=True)
        self.contexts.close()


def _named_adapters(settings: ServerSettings, pipeline: ContinuousBatchingPipeline) -> dict[str, AdapterConfig]:
    """What requests for each adapter's name run with: the adapter as PEFT itself runs it. Raises CrushError."""
    names, loaded = list(settings.adapter_paths), pipeline.adapters
    if len(names) != len(loaded):
        raise CrushError(f"adapters must be those of the pipeline, got {len(names)} names for {len(loaded)}")
    return {name: AdapterConfig(adapter, adapter.scaling) for name, adapter in zip(names, loaded, strict=True)}


def state_of(request: Request) -> ServerState:
    """The state of the app that answers a request."""
    state: ServerState = request.app.state.server
    return state


def owner_of(request: Request) -> str:
    """Who asks."""
    owner: str = request.scope["state"]["owner"]
    return owner
