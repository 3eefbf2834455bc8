"""The application of Ray Serve: gateways in front of replicas."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from ov_kvcrush.server.ray.gateway import Gateway
from ov_kvcrush.server.ray.replica import Replica
from ov_kvcrush.server.ray.settings import parse_settings

_ROUTER = "ov_kvcrush.server.ray.router:AffinityRouter"
_MANY = 10_000  # requests of a gateway: it waits for replicas, which have a limit


def app(args: dict[str, Any]) -> Application:
    """Build the application; `serve run ov_kvcrush.server.ray:app model=FOLDER replicas=2 cores=8`.

    args: fields of RaySettings and of ServerSettings. Raises CrushError for what is neither.
    """
    settings, server = parse_settings(args)
    replicas = serve.deployment(
        Replica,
        name="replica",
        ray_actor_options={"num_cpus": settings.cores},
        max_ongoing_requests=settings.max_ongoing,
        max_queued_requests=settings.max_queued,
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas,
            target_ongoing_requests=settings.target_ongoing,
            upscale_delay_s=settings.upscale_delay_s,
            downscale_delay_s=settings.downscale_delay_s,
        ),
        request_router_config=RequestRouterConfig(
            request_router_class=_ROUTER, request_router_kwargs={"slack": settings.slack}
        ),
        graceful_shutdown_timeout_s=server.drain_timeout_s,
    )
    gateways = serve.deployment(
        Gateway,
        name="gateway",
        num_replicas=settings.gateways,
        ray_actor_options={"num_cpus": 0},  # it computes next to nothing, and processors are counted whole for replicas
        max_ongoing_requests=_MANY,
        graceful_shutdown_timeout_s=server.drain_timeout_s,
    )
    return gateways.bind(settings, server, replicas.bind(server, settings.cores))
