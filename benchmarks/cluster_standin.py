"""A replica without a model, for questions of scale and faults: the product's memory, agent, controller, router and
ingress rules around an engine that only waits. Never used to show that serving works; that needs real engines.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cluster_fleet as fleets
import ray
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from ray import serve

from flora_vllm.cluster.app import deployment_options, settings_for
from flora_vllm.cluster.config import ClusterConfig
from flora_vllm.cluster.ingress import Directory, UnknownModelError, answer
from flora_vllm.cluster.replica import ReplicaRuntime
from flora_vllm.cluster.store import Entry
from flora_vllm.cluster.streams import LostError

CHUNKS = 5
STAND_IN, STOCK = "StandIn", "Stock"


@dataclass(frozen=True)
class EngineSize:
    """A request takes `service_s` on one of `lanes`; an adapter takes `load_s` to load."""

    service_s: float = 0.4
    load_s: float = 0.3
    lanes: int = 4


class WaitingEngine:
    """Loads by waiting; knows what it holds, and refuses what real engines must never see."""

    def __init__(self, load_s: float, lanes: int) -> None:
        self._load_s = load_s
        self.held: set[str] = set()
        self.is_dead = False
        self.lanes = asyncio.Semaphore(lanes)
        self._node = ray.get_runtime_context().get_node_id()

    async def load(self, entry: Entry, path: Path) -> None:
        assert entry.id not in self.held, f"{entry.id} loaded twice"
        assert path.is_dir(), path
        await asyncio.sleep(self._load_s)
        self.held.add(entry.id)

    async def unload(self, adapter_id: str) -> None:
        self.held.remove(adapter_id)

    async def generate(self, adapter: str | None, service_s: float) -> AsyncIterator[str]:
        """CHUNKS events and the end mark, `service_s` on one lane."""
        async with self.lanes:
            for i in range(CHUNKS):
                assert adapter is None or adapter in self.held, f"{adapter} is not in the engine"
                await asyncio.sleep(service_s / CHUNKS)
                yield f"data: {json.dumps({'index': i, 'adapter': adapter, 'node': self._node})}\n\n"
        yield "data: [DONE]\n\n"


class StandIn:
    """Same shape as the product's server: `completions(body, raw, adapter)` streams text chunks."""

    async def __init__(self, settings: dict[str, Any], engine: EngineSize) -> None:
        self._service_s = engine.service_s
        self._engine = WaitingEngine(engine.load_s, engine.lanes)
        self._runtime = ReplicaRuntime(settings, self._engine, lambda: self._engine.is_dead)
        await self._runtime.start()

    async def completions(self, _body: dict[str, Any], _raw: Any, adapter: Entry | None) -> AsyncIterator[str]:
        if adapter is None:
            async for chunk in self._engine.generate(None, self._service_s):
                yield chunk
            return
        async with self._runtime.memory.using(adapter):
            async for chunk in self._engine.generate(adapter.id, self._service_s):
                yield chunk

    async def die(self) -> int:
        """Lets the engine die inside a live replica."""
        self._engine.is_dead = True
        return os.getpid()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return self._runtime.signals()

    async def __del__(self) -> None:
        await self._runtime.stop()


class StockStandIn:
    """The same engine behind Serve's own multiplexing and router, as ray.serve.llm uses them."""

    def __init__(self, slots: int, engine: EngineSize) -> None:
        self._service_s = engine.service_s
        self._engine = WaitingEngine(engine.load_s, engine.lanes)

        async def load(adapter: str) -> str:
            await asyncio.sleep(engine.load_s)
            return adapter

        self._load: Any = serve.multiplexed(max_num_models_per_replica=slots)(load)

    async def completions(self, _body: dict[str, Any], _raw: Any, adapter: Entry | None) -> AsyncIterator[str]:
        if adapter is not None:
            await self._load(adapter.id)
        async for chunk in self._engine.generate(None, self._service_s):
            yield chunk


api = FastAPI()


@serve.ingress(api)
class Front:
    """The product's request rules behind a plain HTTP route."""

    def __init__(self, handle: Any, base: str, retry_s: float) -> None:
        self._handle, self._base, self._retry_s = handle, base, retry_s
        self._directory: Directory | None = None

    @api.post("/v1/completions")
    async def completions(self, request: Request) -> Any:
        if self._directory is None:
            self._directory = Directory({self._base: self._handle}, refresh_s=1.0)
        body = await request.json()
        chunks = answer(
            self._directory,
            body.get("model"),
            lambda handle, target: handle.completions.remote(body, None, target.adapter),
            lambda _chunk: None,
            self._retry_s,
        )
        try:
            first = await anext(chunks)
        except UnknownModelError as error:
            return JSONResponse({"error": {"message": str(error)}}, 404)
        except LostError as error:
            return JSONResponse({"error": {"message": str(error)}}, 503)

        async def whole() -> AsyncIterator[str]:
            yield first
            async for chunk in chunks:
                yield chunk

        return StreamingResponse(whole(), media_type="text/event-stream")

    @api.get("/pid")
    async def pid(self) -> int:
        return os.getpid()


def stand_in_app(config: ClusterConfig, engine: EngineSize, bundle: dict[str, float]) -> Any:
    """Replicas of the first model as stand-ins, one placement group of `bundle` each, and the front."""
    model = config.models[0]
    options = deployment_options(config, model)
    options |= {"health_check_period_s": 1, "health_check_timeout_s": 5, "graceful_shutdown_timeout_s": 1}
    options |= {"placement_group_bundles": [bundle], "placement_group_strategy": "STRICT_PACK"}
    replicas = serve.deployment(StandIn, name=STAND_IN, **options).bind(settings_for(config, model), engine)
    front = serve.deployment(
        Front,
        num_replicas=config.ingress.replicas,
        max_ongoing_requests=10_000,
        # On the head, as in a cluster whose engines take all CPUs elsewhere: a node that dies takes no ingress along.
        ray_actor_options={"num_cpus": 0, "resources": {fleets.HEAD: 0.001}},
        health_check_period_s=1,
    )
    return front.bind(replicas, model.name, config.ingress.retry_s)


def stock_app(replicas: int, slots: int, engine: EngineSize, bundle: dict[str, float]) -> Any:
    """The same fleet as Serve ships it; max_ongoing_requests as in ray.serve.llm."""
    return serve.deployment(
        StockStandIn,
        name=STOCK,
        num_replicas=replicas,
        max_ongoing_requests=1_000_000_000,
        ray_actor_options={"num_cpus": bundle["CPU"]},
        placement_group_bundles=[bundle],
        placement_group_strategy="STRICT_PACK",
    ).bind(slots, engine)


def make_adapters(root: Path, names: list[str], nbytes: int = 1024) -> None:
    """Directories that look like adapters to the catalogue; the waiting engine never reads them."""
    for name in names:
        directory = root / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "FLORA", "r": 4}))
        (directory / "adapter_model.safetensors").write_bytes(name.encode().ljust(nbytes, b"\0"))
