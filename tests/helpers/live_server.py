"""The server on a socket of this machine, in a thread of the test process, over a pipeline that is there."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from ov_kvcrush import ContinuousBatchingPipeline
from ov_kvcrush.server.app import create_app
from ov_kvcrush.server.settings import ServerSettings


@dataclass(frozen=True)
class LiveServer:
    """url: without a slash at its end. model: the model's name in the API."""

    url: str
    model: str


@contextmanager
def live_server(pipeline: ContinuousBatchingPipeline, settings: ServerSettings) -> Iterator[LiveServer]:
    """Listens on a free port until the block ends. Raises RuntimeError if it does not come up."""
    app = create_app(settings, pipeline)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not server.started:
            if not thread.is_alive() or time.monotonic() > end:
                raise RuntimeError("the server must come up")
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield LiveServer(f"http://127.0.0.1:{port}", settings.model_name)
    finally:
        server.should_exit = True
        thread.join(60)
