"""What workers answer where they cannot load an adapter, and what their engine makes of it."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest

from flora_vllm.errors import adapter_error
from flora_vllm.plugin import refusals

# vLLM's imports warn about others' deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")


class Ranks:
    """An executor and its workers; `faults`: what each meets when it loads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *faults: Exception | None) -> None:
        from vllm.v1.executor.abstract import Executor
        from vllm.v1.worker.gpu_worker import Worker

        monkeypatch.setattr(Worker, "add_lora", lambda self, _: self.model_runner())
        monkeypatch.setattr(Executor, "add_lora", inspect.unwrap(Executor.add_lora))
        refusals.answer_with_refusals()
        self._add_on_worker, self._add = Worker.add_lora, Executor.add_lora
        self._faults, self.removed = faults, []

    def collective_rpc(self, _method: str, args: tuple) -> list[Any]:
        return [self._add_on_worker(self._worker(fault), *args) for fault in self._faults]

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


def test_an_only_rank_raises_what_it_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryError):
        Ranks(monkeypatch, MemoryError()).load()
