"""What every replica runs beside its engine, whatever the engine is: memory, agent, link to the controller."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from flora_vllm.cluster.agent import ReplicaAgent
from flora_vllm.cluster.config import ModelConfig, StoreConfig, TimingConfig, parse
from flora_vllm.cluster.memory import AdapterMemory, Engine
from flora_vllm.cluster.messages import Report
from flora_vllm.cluster.ray_hooks import own_controller, replica_identity, tell_routers
from flora_vllm.cluster.store import Cache

log = logging.getLogger("ray.serve")

# No limit but the slots.
AMPLE = 2**62
# How long a replica waits for a plan before it serves cold.
PATIENCE_S = 30.0
CLEAN_S = 60.0


class ReplicaRuntime:
    """Start it once the engine runs and before the replica takes traffic."""

    def __init__(self, settings: dict[str, Any], engine: Engine, is_dead: Callable[[], bool]) -> None:
        """settings: plain data with keys model, store and timing."""
        self._model = parse(ModelConfig, settings["model"], "model")
        timing = parse(TimingConfig, settings["timing"], "timing")
        self._store = parse(StoreConfig, settings["store"], "store")
        self._cache = Cache(self._store.cache_dir, self._store.cache_bytes)
        self.replica, self.node = replica_identity()
        self._controller = own_controller()
        self.memory = AdapterMemory(
            engine,
            self._cache,
            self._model.slots,
            lambda: self.agent.changed(),
            limit_bytes=self._model.adapter_bytes,
            max_rank=self._model.max_rank,
        )
        self.agent = ReplicaAgent(
            self.describe, self.memory, self._controller.sync, tell_routers, is_dead, timing.sync_s
        )

    async def start(self) -> None:
        await self.agent.start(PATIENCE_S)
        self._cleaner = asyncio.create_task(self._clean_loop())

    async def stop(self) -> None:
        """The replica goes on purpose: the controller places its adapters elsewhere without waiting for its silence."""
        self._cleaner.cancel()
        self.agent.stop()
        try:
            await self._controller.leave(self.replica)
        except (ConnectionError, TimeoutError) as error:
            log.info("no placement controller to leave: %s", error)

    async def _clean_loop(self) -> None:
        while True:
            await asyncio.to_thread(self._cache.clean, self.memory.paths())
            await asyncio.sleep(CLEAN_S)

    def describe(self) -> Report:
        """The state to report; takes the time counted since the last report."""
        return Report(
            self.replica,
            self.node,
            self._model.slots,
            AMPLE if self._model.adapter_bytes is None else self._model.adapter_bytes,
            self._model.max_rank,
            self.agent.is_warming,
            tuple(self.memory.resident()),
            self.memory.take_busy_s(),
            dict(self.memory.faults),
            dict(self.memory.troubles),
            tuple(self.memory.retired()),
            self.memory.in_use(),
            self.memory.loads,
        )

    def signals(self) -> dict[str, float]:
        """For Serve's autoscaling."""
        return {"flora_replicas_wanted": float(self.agent.replicas_wanted)}
