"""Where pinned adapters leave too little room, requests fail or loads are refused, and the engine goes on."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flora_vllm.errors import AdapterError


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no engine that has made vLLM's groups of ranks."""
    monkeypatch.setattr("flora_vllm.plugin.probe.get_tensor_model_parallel_world_size", lambda: 1)


def _manager(slots: int, places: int) -> Any:
    """A worker's manager whose adapters have no content."""
    from vllm.lora.model_manager import AdapterLRUCache

    from flora_vllm.plugin.loads import Loads
    from flora_vllm.plugin.manager import FloraModelManager, LoadedAdapter
    from flora_vllm.plugin.memory import MemoryBudget
    from flora_vllm.plugin.path_counts import PathCounts
    from flora_vllm.plugin.worker_manager import FloraWorkerManager

    manager: Any = object.__new__(FloraModelManager)
    manager.options = SimpleNamespace(adapter_memory=None)
    manager.lora_config = SimpleNamespace(max_loras=slots, max_cpu_loras=places)
    manager.attached, manager.device = SimpleNamespace(write_slot=lambda *_: {}), torch.device("cpu")
    manager.loads, manager._left_out, manager._in_slots = Loads(), {}, {}
    manager._paths = PathCounts()
    manager.lora_index_to_id = [None] * slots
    manager._registered_adapters = AdapterLRUCache(places, manager.deactivate_adapter)
    manager._active_adapters = AdapterLRUCache(slots, manager._deactivate_adapter)
    worker: Any = object.__new__(FloraWorkerManager)
    worker._adapter_manager, worker._memory = manager, MemoryBudget(None, slots)
    worker._ran = set()
    worker._load_adapter = lambda request, **_: LoadedAdapter(request.lora_int_id, 1, {})
    return worker


def _requests(*adapters: int) -> set[Any]:
    from vllm.lora.request import LoRARequest

    return {LoRARequest(f"a{adapter}", adapter, "/nowhere") for adapter in adapters}


@pytest.mark.parametrize(("slots", "places"), [(2, 2), (2, 3), (3, 3), (3, 4)])
def test_a_step_leaves_out_what_pins_leave_no_room(slots: int, places: int):
    worker = _manager(slots, places)
    pinned = range(90, 90 + slots - 1)
    for adapter in (*pinned, 5):
        worker.add_adapter(*_requests(adapter))
    for adapter in pinned:
        worker.pin_adapter(adapter)
    manager = worker._adapter_manager
    worker._apply_adapters(_requests(3, 5))
    assert {*manager._left_out} == {5}
    assert {*manager._active_adapters.order} == {*pinned, 3}, "what the step was told it has"
    assert manager.loads.lookups["gpu"] == {"hit": 0, "miss": 2}, "3 had no slot, and took that of 5"
    worker._apply_adapters(_requests(3, 5))
    assert sum(manager.loads.lookups["gpu"].values()) == 2, "they go on running"
    manager._left_out.clear()
    worker.add_adapter(*_requests(6))
    worker.pin_adapter(6)
    manager._left_out.clear()
    worker._apply_adapters(_requests(5, 90))
    assert {*manager._left_out} == {5}


@pytest.mark.parametrize(("slots", "places"), [(1, 1), (1, 2)])
def test_a_load_is_refused_where_pins_leave_no_room(slots: int, places: int):
    from flora_vllm.plugin.manager import LoadedAdapter

    worker = _manager(slots, places)
    worker.add_adapter(*_requests(1))
    worker.pin_adapter(1)
    with pytest.raises(AdapterError, match="pinned adapters have all 1 slots"):
        worker.add_adapter(*_requests(2))
    with pytest.raises(AdapterError, match="pinned adapters have all 1 slots"):
        worker.let_in(LoadedAdapter(2, 1, {}), (), again=True)
    assert worker.add_adapter(*_requests(1))
    worker._loader = SimpleNamespace(retire=lambda _: None)
    assert worker.remove_adapter(1)
    assert worker.let_in(LoadedAdapter(2, 1, {}), (), again=True) == ()


def test_who_only_loads_takes_no_adapters_slot():
    from flora_vllm.plugin.manager import LoadedAdapter

    worker, written = _manager(2, 8), []
    manager = worker._adapter_manager
    manager.attached = SimpleNamespace(write_slot=lambda slot, layers: written.append((slot, bool(layers))))
    contents: Any = {"layer": ()}
    for adapter in (1, 2, 3):
        assert worker.let_in(LoadedAdapter(adapter, 1, contents), (), again=False) == ()
    assert written == [(1, True), (2, True)], "empty slots are filled, and none is written for the third"
    assert {*manager._registered_adapters.order} == {1, 2, 3}
    # For a request that waits it is another matter: the slot is written over, not cleared first.
    assert worker.let_in(LoadedAdapter(4, 1, contents), (2,), again=True) == ()
    worker._apply_adapters(_requests(3))
    assert written[2:] == [(1, True), (2, True)]
    assert manager.lora_index_to_id == [4, 3]
    assert {slot: adapter.id for slot, adapter in manager._in_slots.items()} == {1: 4, 2: 3}
    assert manager.loads.evictions["gpu"] == 2


def test_images_of_an_adapter_that_a_step_leaves_out_take_no_other_adapters_slot():
    from vllm.lora.layers import LoRAMapping, LoRAMappingType

    worker = _manager(2, 2)
    worker.add_adapter(*_requests(90))
    worker.pin_adapter(90)
    manager = worker._adapter_manager
    manager.set_adapter_mapping = lambda _: None
    worker._apply_adapters(_requests(3, 5))
    assert {*manager._left_out} == {5}
    worker.set_active_adapters(_requests(5), LoRAMapping((), (5,), type=LoRAMappingType.TOWER))
    assert {*manager._active_adapters.order} == {90, 3}, "the step's tokens use them"
    assert worker._ran == {3, 5}, "the next step's are no newcomers"
