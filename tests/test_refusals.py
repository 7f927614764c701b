"""What workers answer where they cannot load an adapter, and what their engine and a cluster's replica make of it."""

import asyncio
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cluster_support import write_adapter

from flora_vllm.cluster.memory import NotLoadedError
from flora_vllm.cluster.store import Entry
from flora_vllm.cluster.vllm_engine import VllmEngineAdapters
from flora_vllm.errors import AdapterError, adapter_error
from flora_vllm.formats import content_digest
from flora_vllm.plugin import refusals

# vLLM's imports warn about others' deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")


class Ranks:
    """An executor and its workers; `faults`: what each meets when it loads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *faults: Exception | None) -> None:
        from vllm.v1.executor.abstract import Executor
        from vllm.v1.worker.gpu_worker import Worker

        def add_lora(self: Any, _: Any) -> bool:
            return self.model_runner()

        def pin_lora(self: Any, _: int) -> bool:
            return self.model_runner()

        for act in (add_lora, pin_lora):
            name = act.__name__
            monkeypatch.setattr(Worker, name, act)
            monkeypatch.setattr(Executor, name, inspect.unwrap(getattr(Executor, name)))
        refusals.answer_with_refusals()
        self._on_worker = {"add_lora": Worker.add_lora, "pin_lora": Worker.pin_lora}
        self._add, self._pin = Executor.add_lora, Executor.pin_lora
        self._faults, self.removed = faults, []

    def collective_rpc(self, method: str, args: tuple) -> list[Any]:
        return [self._on_worker[method](self._worker(fault), *args) for fault in self._faults]

    def _worker(self, fault: Exception | None) -> Any:
        def load() -> bool:
            if fault is not None:
                raise fault
            return True

        config = SimpleNamespace(additional_config={"flora": {}})
        parallel = SimpleNamespace(world_size=len(self._faults))
        return SimpleNamespace(model_runner=load, vllm_config=config, parallel_config=parallel)

    def remove_lora(self, adapter: int) -> None:
        self.removed.append(adapter)

    def load(self) -> bool:
        return self._add(self, SimpleNamespace(lora_int_id=7, lora_name="a"))  # pyright: ignore[reportArgumentType]

    def pin(self) -> bool:
        return self._pin(self, 7)  # pyright: ignore[reportArgumentType]


def test_every_rank_answers_and_none_holds_alone_what_one_could_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Ranks(monkeypatch, None, None).load()
    refused = adapter_error("'a'", ["no"])
    for fault, kind in ((refused, "no"), (MemoryError("none left"), "MemoryError: none left")):
        ranks = Ranks(monkeypatch, None, fault)
        with pytest.raises(Exception, match=kind):
            ranks.load()
        assert ranks.removed == [7]
        ranks = Ranks(monkeypatch, fault, fault)
        with pytest.raises(Exception, match=kind):
            ranks.load()
        assert ranks.removed == []


def test_every_rank_answers_a_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Ranks(monkeypatch, None, None).pin()
    unknown = ValueError("Pinning failed. LoRA 7 is not registered.")
    ranks = Ranks(monkeypatch, unknown, unknown)
    with pytest.raises(RuntimeError, match=r"ValueError: Pinning failed\. LoRA 7 is not registered"):
        ranks.pin()
    assert ranks.removed == []


def test_an_only_rank_raises_what_it_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryError):
        Ranks(monkeypatch, MemoryError()).load()
    with pytest.raises(ValueError, match="not registered"):
        Ranks(monkeypatch, ValueError("not registered")).pin()


def _replica(models: Any, meets: list[Exception | None], removed: list[int], errored: bool = False) -> Any:
    """A replica's engine; `meets`: what becomes of its loads, `removed`: ids it was told to let go of."""

    async def add_lora(_request: Any) -> None:
        if (met := meets.pop(0)) is not None:
            raise met

    async def remove_lora(adapter: int) -> bool:
        removed.append(adapter)
        return True

    client = SimpleNamespace(errored=errored, add_lora=add_lora, remove_lora=remove_lora)
    return VllmEngineAdapters(SimpleNamespace(_engine_client=client, _oai_models=models))


def test_what_one_version_failed_to_load_another_of_equal_content_keeps(tmp_path: Path) -> None:
    path = write_adapter(tmp_path, "a")
    models = SimpleNamespace(lora_requests={}, lora_id_counter=SimpleNamespace(inc=lambda _: 1))
    removed: list[int] = []
    engine = _replica(models, [None, OSError("disk")], removed)
    asyncio.run(engine.load(Entry("a", "v", "/a", 1, 4), path))
    with pytest.raises(NotLoadedError):
        asyncio.run(engine.load(Entry("a", "w", "/a", 1, 4), path))
    assert removed == []
    asyncio.run(engine.unload("a@v"))
    assert removed == [1]


def test_a_replica_holds_against_an_adapter_what_is_wrong_with_it_only(tmp_path: Path) -> None:
    from flora_vllm.plugin.probe import ANOTHER_RANK

    path = write_adapter(tmp_path, "a")
    models = SimpleNamespace(lora_requests={}, lora_id_counter=SimpleNamespace(inc=lambda _: 1))

    removed: list[int] = []

    def load(met: Exception | None, errored: bool = False) -> None:
        asyncio.run(_replica(models, [met], removed, errored).load(Entry("a", "v", "/a", 1, 4), path))

    def said(*faults: str) -> Exception:
        text = str(adapter_error("'a'", faults)).replace("\n", "\\n")
        return Exception(f"Call to add_lora method failed: {text}', please check the stack trace above")

    with pytest.raises(AdapterError, match=r"no such layer$"):
        load(said("no such layer"))
    for passing in (said(ANOTHER_RANK), said("pinned adapters have all 2 slots"), OSError("disk"), MemoryError()):
        with pytest.raises(NotLoadedError, match="the engine could not load a@v: "):
            load(passing)
    assert len(removed) == 5  # another core of the engine may have taken it
    with pytest.raises(OSError, match="engine died"):
        load(OSError("engine died"), errored=True)
    assert len(removed) == 5
    assert models.lora_requests == {}
    load(None)
    assert models.lora_requests.keys() == {"a@v"}


def test_a_replica_loads_what_is_on_the_operators_list(tmp_path: Path) -> None:
    path, listed = write_adapter(tmp_path, "a"), tmp_path / "list"
    models = SimpleNamespace(lora_requests={}, lora_id_counter=SimpleNamespace(inc=lambda _: 1))
    config = SimpleNamespace(additional_config={"flora": {"adapter_digests": str(listed)}})
    client = SimpleNamespace(errored=False, add_lora=lambda _: asyncio.sleep(0), vllm_config=config)
    engine = VllmEngineAdapters(SimpleNamespace(_engine_client=client, _oai_models=models))
    listed.write_text(f"{'0' * 64}\n")
    with pytest.raises(AdapterError, match="is not on the operator's list"):
        asyncio.run(engine.load(Entry("a", "v", "/a", 1, 4), path))
    listed.write_text(f"{content_digest(path)}\n")
    asyncio.run(engine.load(Entry("a", "v", "/a", 1, 4), path))
    assert models.lora_requests.keys() == {"a@v"}
