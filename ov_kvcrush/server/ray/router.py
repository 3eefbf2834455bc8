"""Ray Serve's request router, by what ties a request to a replica."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from ov_kvcrush.server.ray.asgi import HttpRequest
from ov_kvcrush.server.ray.routing import ranked


class AffinityRouter(RequestRouter):  # type: ignore[misc]
    """Asks `ranked` for each request."""

    def initialize_state(self, slack: int = 0, **kwargs: Any) -> None:
        """Called by Serve with request_router_kwargs."""
        self._slack = slack
        self._ongoing: defaultdict[ReplicaID, set[str]] = defaultdict(set)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Called by Serve: groups of replicas, of which it takes the least loaded that has room."""
        request = pending_request.args[0] if pending_request is not None and pending_request.args else None
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        if not isinstance(request, HttpRequest):
            return [candidate_replicas]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        names = list(by_name)
        random.shuffle(names)  # of several that have as little to do Serve takes the first
        loads = {name: self._load(by_name[name].replica_id) for name in names}
        groups = ranked(loads, request.affinity, request.holder, self._slack)
        return [[by_name[name] for name in group] for group in groups]

    def _load(self, replica: ReplicaID) -> int:
        """Requests at a replica: ours, or all of them where it told how many not long ago."""
        return max(len(self._ongoing[replica]), self.replica_queue_len_cache.get(replica) or 0)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Serve when a replica has taken a request."""
        self._ongoing[replica_id].add(pending_request.metadata.internal_request_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve when a request has ended, in whatever way."""
        self._ongoing[replica_id].discard(internal_request_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve when replicas have come or gone."""
        super().update_replicas(replicas)
        for gone in self._ongoing.keys() - {replica.replica_id for replica in replicas}:
            del self._ongoing[gone]
