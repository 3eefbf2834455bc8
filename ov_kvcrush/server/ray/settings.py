"""What `serve run ov_kvcrush.server.ray:app name=value ...` and `args` of a Serve config file may say."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ov_kvcrush.errors import CrushError
from ov_kvcrush.server.settings import ServerSettings
from ov_kvcrush.utils.checks import check_integer, check_number, known_options


@dataclass(frozen=True)
class RaySettings:
    """How many replicas there are, and who gets which request. Raises CrushError naming the first field that is wrong.

    min_replicas, max_replicas: as many as the queue asks for, within these.
    cores: processors that a replica has for itself, and threads of its inference.
    target_ongoing: requests a replica that Ray's autoscaling aims at, those that wait for a replica included.
    max_ongoing: requests that a replica is sent at a time. More wait in the gateway.
    max_queued: requests that wait in a gateway; one more is answered with 429.
    slack: how many more requests than the least loaded one the replica may have that holds a conversation or a context,
        and be sent its requests all the same.
    tries: replicas that a request is sent to, one after the other, while they die before its first token.
    gateways: processes that take requests and route them.
    upscale_delay_s, downscale_delay_s: how long there must be more or less to do before replicas start or end.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    cores: int = 1
    target_ongoing: float = 8
    max_ongoing: int = 64
    max_queued: int = 256
    slack: int = 4
    tries: int = 3
    gateways: int = 1
    upscale_delay_s: float = 10
    downscale_delay_s: float = 300

    def __post_init__(self) -> None:
        minima = {"min_replicas": 1, "max_replicas": 1, "cores": 1, "max_ongoing": 1, "max_queued": 1, "slack": 0}
        for name, minimum in (minima | {"tries": 1, "gateways": 1}).items():
            check_integer(name, getattr(self, name), minimum)
        check_number("target_ongoing", self.target_ongoing, 1)
        check_number("upscale_delay_s", self.upscale_delay_s, 0)
        check_number("downscale_delay_s", self.downscale_delay_s, 0)
        if self.max_replicas < self.min_replicas:
            raise CrushError(f"max_replicas must be at least min_replicas={self.min_replicas}, got {self.max_replicas}")


def parse_settings(args: Mapping[str, Any]) -> tuple[RaySettings, ServerSettings]:
    """The settings of replicas and of the server on each, from one mapping; the command line gives texts.

    `replicas` stands for min_replicas and max_replicas. api_keys and adapters may be one; api_keys_env names an
    environment variable that has keys, with blanks between: Ray shows the arguments of an application to whoever asks
    it.
    Raises CrushError.
    """
    given = dict(args)
    if "api_keys_env" in given:
        variable = given.pop("api_keys_env")
        given["api_keys"] = os.environ.get(str(variable), "").split()
        if not given["api_keys"]:
            raise CrushError(f"api_keys_env must name an environment variable with at least one key, got {variable!r}")
    if "replicas" in given:
        count = given.pop("replicas")
        given = {"min_replicas": count, "max_replicas": count} | given
    for name in ("api_keys", "adapters"):
        if isinstance(given.get(name), str):
            given[name] = [given[name]]
    own = {f.name for f in fields(RaySettings)}
    of_server = {name: value for name, value in given.items() if name not in own}
    for name in ("host", "port", "idle_timeout_s"):
        if name in of_server:
            raise CrushError(f"{name} must be left out: it is of Serve's own http_options")
    known_options(of_server, ServerSettings, "option of the server")
    return (
        _validated(RaySettings, {name: value for name, value in given.items() if name in own}),
        _validated(ServerSettings, of_server),
    )


def _validated(cls: type[Any], values: dict[str, Any]) -> Any:
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = first["loc"][0] if first["loc"] else cls.__name__
        raise CrushError(f"{name}: {first['msg']}, got {first['input']!r}") from None
