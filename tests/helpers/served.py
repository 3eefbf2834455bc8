"""A server in this process, on a free port, for tests that speak to it as clients do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ov_kvcrush import ContinuousBatchingPipeline
from ov_kvcrush.server.app import create_app
from ov_kvcrush.server.process import DrainingServer, make_server
from ov_kvcrush.server.settings import ServerSettings
from ov_kvcrush.server.state import ServerState


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    url: str
    state: ServerState
    server: DrainingServer

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def model(self) -> str:
        """Its name in the API."""
        return self.state.name


@contextmanager
def served(settings: ServerSettings, pipeline: ContinuousBatchingPipeline | None = None) -> Iterator[Served]:
    app = create_app(settings, pipeline)
    server = make_server(app, settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 120
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < deadline, "the server took too long to start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Served(f"http://127.0.0.1:{port}", app.state.server, server)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def until(is_so: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for what a server does by itself. Raises AssertionError where it does not come."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "the server did not come to it"
        time.sleep(0.02)


def metric(state: ServerState, name: str, **labels: str) -> float:
    """A figure of an app, 0 where it was never counted."""
    found: Any = state.metrics.registry.get_sample_value(f"ov_kvcrush_{name}", labels)
    return float(found or 0)
