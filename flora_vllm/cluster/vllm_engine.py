"""The engine's side of adapter memory, for vLLM inside ray.serve.llm: load, unload, dead or alive.

An adapter's engine name is name@content-digest and its integer id belongs to that identity for ever: the same name with
two live ids ends vLLM's engine. Two catalogue versions with equal content share one identity.
"""

import asyncio
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

from flora_vllm.cluster.memory import NotLoadedError
from flora_vllm.cluster.store import Entry
from flora_vllm.errors import AdapterError, ConfigError, HookError
from flora_vllm.plugin.digests import check_digest
from flora_vllm.plugin.identity import identity, plain_name
from flora_vllm.plugin.listing import Reports, added, entries
from flora_vllm.plugin.options import options_of_engine
from flora_vllm.plugin.traffic import FAMILIES, MOST_NAMED


def lora_limit(max_rank: int) -> int:
    """The least of the limits that vLLM knows for a LoRA's rank which allows `max_rank`. Raises ConfigError."""
    from vllm.config.lora import MaxLoRARanks

    limits = get_args(MaxLoRARanks)
    if max_rank > max(limits):
        raise ConfigError(f"max_rank is {max_rank}, vLLM allows at most {max(limits)}")
    return min(limit for limit in limits if limit >= max_rank)


class VllmEngineAdapters:
    """`engine` is ray.serve.llm's VLLMEngine, started."""

    def __init__(self, engine: Any) -> None:
        missing = [n for n in ("_engine_client", "_oai_models") if not hasattr(engine, n)]
        if missing:
            raise HookError(f"ray.serve.llm's engine has no {' and no '.join(missing)}; this is not the Ray we checked")
        self._client, self._models = engine._engine_client, engine._oai_models
        self._ids: dict[str, int] = {}
        # Identity -> catalogue ids that use it now.
        self._users: dict[str, set[str]] = {}
        self._reports = Reports(None), Reports(MOST_NAMED)

    async def adapters(self) -> list[dict[str, Any]]:
        """Entries as at /v1/flora/adapters, named by catalogue id; none if the engine takes too long."""
        report = await self._reports[0].ask(self._client)
        return [] if report is None else entries(SimpleNamespace(openai_serving_models=self._models), report)

    async def metrics(self) -> str:
        """vLLM's series of this process and ours, in Prometheus' text format."""
        client: Any = importlib.import_module("prometheus_client")
        requests = self._models.lora_requests.values()
        names = {request.lora_int_id: plain_name(request.lora_name) for request in requests}
        ours = await added(self._reports[1], self._client, names, set(names.values()).__contains__)
        return (client.generate_latest() + ours).decode()

    def is_dead(self) -> bool:
        return bool(self._client.errored)

    async def load(self, entry: Entry, path: Path) -> None:
        """Puts the adapter into the engine, where requests find it under `entry.id`. Raises as memory's Engine says."""
        from vllm.lora.request import LoRARequest

        from flora_vllm.formats import digest_and_family
        from flora_vllm.plugin.preload import identified
        from flora_vllm.plugin.refusals import is_passing, refusal

        digest, family = await asyncio.to_thread(digest_and_family, path)
        if (options := options_of_engine(self._client)) is not None:
            await asyncio.to_thread(check_digest, options.adapter_digests, entry.name, digest)
        known = identity(entry.name, digest)
        FAMILIES[known] = family
        if known not in self._ids:
            self._ids[known] = self._models.lora_id_counter.inc(1)
        request = LoRARequest(lora_name=known, lora_int_id=self._ids[known], lora_path=str(path))
        try:
            with identified():
                await self._client.add_lora(request)
        except Exception as error:
            # The engine's errors arrive as text, of whatever class its transport uses. What is not the adapter's
            # fault, a full disk say, must not be held against it.
            if self.is_dead():
                raise
            if known not in self._users:
                # With data parallelism another core may have it, or be loading it, and nobody else would let go of it.
                await self._client.remove_lora(self._ids[known])
            message = refusal(error)
            if message is None or is_passing(message):
                raise NotLoadedError(f"the engine could not load {entry.id}: {message or error}") from error
            raise AdapterError(message) from error
        self._users.setdefault(known, set()).add(entry.id)
        self._models.lora_requests[entry.id] = request

    async def unload(self, adapter_id: str) -> None:
        request = self._models.lora_requests.pop(adapter_id)
        users = self._users[request.lora_name]
        users.discard(adapter_id)
        if not users:
            del self._users[request.lora_name]
            await self._client.remove_lora(request.lora_int_id)
