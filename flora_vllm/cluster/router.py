"""Serve's request router with adapter affinity: flora_vllm.cluster.rules.routing on Serve's view of the replicas."""

import random
from typing import Any

import numpy as np

from flora_vllm.cluster.ray_hooks import PendingRequest, RequestRouter, RunningReplica
from flora_vllm.cluster.rules.routing import RoutingOptions, choose, key_of


class AdapterAffinityRouter(RequestRouter):
    """Warm replicas by queue, spill, rendezvous for the rest; requests for the base model by queue alone.

    Without Serve's FIFO mixin: it may hand the replica chosen for one request to another that waits longer.
    """

    def initialize_state(self, **options: Any) -> None:
        """`options` are the fields of RoutingOptions."""
        self._options = RoutingOptions(**options)
        self._random = random.Random()
        self._order: list[RunningReplica] = []
        self._keys = np.zeros(0, dtype=np.uint64)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        ids = [key_of(r.replica_id.unique_id) for r in replicas]
        self._order, self._keys = list(replicas), np.array(ids, dtype=np.uint64)

    def _queue(self, replica: RunningReplica) -> int:
        return self.replica_queue_len_cache.get(replica.replica_id) or 0

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One replica per rank, best first; every candidate is in the list once."""
        adapter = ""
        if pending_request is not None:
            # Without this a full fleet is asked again in a busy loop.
            pending_request.routing_context.should_backoff = True
            adapter = pending_request.metadata.multiplexed_model_id
        order = self._order if len(self._order) == len(candidate_replicas) else list(candidate_replicas)
        keys = self._keys
        if order is not self._order:
            keys = np.array([key_of(r.replica_id.unique_id) for r in order], dtype=np.uint64)
        if not adapter:
            return [[r] for r in sorted(order, key=lambda r: (self._queue(r), self._random.random()))]
        warm = [i for i, r in enumerate(order) if adapter in r.multiplexed_model_ids]
        best = choose(
            key_of(adapter),
            warm,
            keys,
            lambda i: self._queue(order[i]),
            lambda i: len(order[i].multiplexed_model_ids),
            self._options,
            self._random,
        )
        chosen = set(best)
        rest = [i for i in warm if i not in chosen] + [i for i in range(len(order)) if i not in chosen | set(warm)]
        return [[order[i]] for i in [*best, *rest]]
