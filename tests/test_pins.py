"""Where pinned adapters leave too little room, requests fail or loads are refused, and the engine goes on."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flora_vllm.compact import CompactLayers
from flora_vllm.errors import AdapterError
from flora_vllm.plugin.refusals import is_passing


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that shares its layers with no other."""
    from flora_vllm.plugin import probe

    monkeypatch.setattr(probe, "get_tensor_model_parallel_world_size", lambda: 1)


def _manager(slots: int, places: int) -> Any:
    """A worker's manager whose adapters have no content."""
    from vllm.lora.model_manager import AdapterLRUCache

    from flora_vllm.plugin.loads import Loads
    from flora_vllm.plugin.manager import FloraModelManager, LoadedAdapter
    from flora_vllm.plugin.memory import MemoryBudget
    from flora_vllm.plugin.path_counts import PathCounts
    from flora_vllm.plugin.worker_manager import FloraWorkerManager

    manager: Any = object.__new__(FloraModelManager)
    manager.options, manager.device = SimpleNamespace(adapter_memory=None), torch.device("cpu")
    manager.lora_config = SimpleNamespace(max_loras=slots, max_cpu_loras=places)
    manager.attached = SimpleNamespace(write_slot=lambda *_: {})
    manager.loads, manager._left_out, manager._in_slots, manager.gone = Loads(), {}, {}, set()
    manager._paths = PathCounts()
    manager.lora_index_to_id = [None] * slots
    manager._registered_adapters = AdapterLRUCache(places, manager.deactivate_adapter)
    manager._active_adapters = AdapterLRUCache(slots, manager._deactivate_adapter)
    worker: Any = object.__new__(FloraWorkerManager)
    worker._adapter_manager, worker._memory = manager, MemoryBudget(None, slots)
    worker._ran = set()
    worker._loader = SimpleNamespace(retire=lambda _: None, is_of=lambda number, name: name == f"a{number}")
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
    with pytest.raises(AdapterError, match="pinned adapters have all 1 slots") as refused:
        worker.add_adapter(*_requests(2))
    assert is_passing(str(refused.value))
    with pytest.raises(AdapterError, match="pinned adapters have all 1 slots"):
        worker.let_in(LoadedAdapter(2, 1, {}), (), again=True)
    assert worker.add_adapter(*_requests(1))
    assert worker.remove_adapter(1)
    assert worker.let_in(LoadedAdapter(2, 1, {}), (), again=True) == ()


def test_an_id_that_has_other_content_is_loaded_anew():
    from vllm.lora.request import LoRARequest

    worker, loaded = _manager(2, 2), []
    load = worker._load_adapter
    worker._load_adapter = lambda request, **how: (loaded.append(request.lora_name), load(request, **how))[1]
    for name in ("a1", "a1", "other"):
        worker.add_adapter(LoRARequest(name, 1, "/nowhere"))
    assert loaded == ["a1", "other"]


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


def test_a_step_leaves_out_what_it_has_no_memory_for():
    worker, written = _manager(2, 4), []
    manager = worker._adapter_manager
    contents: Any = {"layer": ()}

    def write_slot(slot: int, layers: Any) -> dict[int, int]:
        written.append((slot, bool(layers)))
        if layers is contents:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {}

    manager.attached = SimpleNamespace(write_slot=write_slot)
    worker._apply_adapters(_requests(1, 2))
    manager._registered_adapters[2].layers = contents
    worker._apply_adapters(_requests(1))
    manager._deactivate_adapter(2)
    manager._active_adapters.pop(2)
    del written[:]
    worker._apply_adapters(_requests(1, 2))
    assert {*manager._left_out} == {2}
    assert written == [(2, True), (2, False)], "nothing of it stays"
    assert manager.lora_index_to_id == [1, None]
    manager._left_out.clear()
    worker._apply_adapters(_requests(1, 3))
    assert manager.lora_index_to_id == [1, 3]
    assert not manager._left_out


def test_an_idle_step_keeps_what_is_loaded():
    """Of a data-parallel rank without requests, for which vLLM makes up adapters with the ids that there are."""
    from vllm.lora.layers import LoRAMapping

    from flora_vllm.pacing import Turns

    worker, mappings = _manager(2, 4), []
    manager = worker._adapter_manager
    manager.turns, manager.set_adapter_mapping = Turns(), mappings.append
    worker.add_adapter(*_requests(1))
    worker.pin_adapter(1)
    with worker.idle_step():
        for request in _requests(1, 2):
            assert worker.add_dummy_lora(request, rank=8)
        worker.set_active_adapters(_requests(1, 2), LoRAMapping((1, 2, 1), (1, 2)))
        assert manager.turns.steps_run()
        worker.remove_all_adapters()
    assert [(one.index_mapping, one.prompt_mapping) for one in mappings] == [((0, 0, 0), (0, 0))]
    assert {*manager._registered_adapters.order} == {*manager._active_adapters.order} == {1}
    assert 1 in manager._registered_adapters.pinned_items


def test_a_load_without_memory_for_a_slot_is_a_load(monkeypatch: pytest.MonkeyPatch):
    from flora_vllm.plugin.manager import LoadedAdapter

    def write_slot(slot: int, layers: Any) -> dict[int, int]:
        if layers:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {}

    worker = _manager(2, 4)
    manager = worker._adapter_manager
    manager.attached = SimpleNamespace(write_slot=write_slot)
    contents: Any = {"layer": ()}
    worker._load_adapter = lambda request, **_: LoadedAdapter(request.lora_int_id, 1, contents)
    assert worker.let_in(LoadedAdapter(1, 1, contents), (), again=False) == ()
    assert worker.add_adapter(*_requests(2))
    assert {*manager._registered_adapters.order} == {1, 2}
    assert manager.lora_index_to_id == [None, None]
    manager.attached = SimpleNamespace(write_slot=lambda *_: {})
    worker._apply_adapters(_requests(1, 2))
    assert {*manager.lora_index_to_id} == {1, 2}


def test_a_slot_that_another_rank_has_no_memory_for_is_given_by_none(monkeypatch: pytest.MonkeyPatch):
    from flora_vllm.plugin import worker_manager

    def together(name: str, device: Any, act: Any) -> None:
        act()
        raise AdapterError("another rank could not")

    worker = _manager(2, 4)
    manager = worker._adapter_manager
    worker.add_adapter(*_requests(1))
    manager.deactivate_adapter(1)
    monkeypatch.setattr(worker_manager, "together", together)
    worker._apply_adapters(_requests(1))
    assert {*manager._left_out} == {1}
    assert manager.lora_index_to_id == [None, None], "the next step finds all ranks alike"


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


def test_ranks_that_differ_in_what_they_have_of_an_adapter_agree_on_what_replays_a_graph(monkeypatch):
    """Experts or rows of a vocabulary may all be one rank's; stages of a pipeline run eager what one of them does."""
    from vllm.lora.layers import LoRAMapping

    from flora_vllm.ops.dispatch import NEVER
    from flora_vllm.plugin import worker_manager
    from flora_vllm.plugin.encoder_rows import row_spaces
    from flora_vllm.plugin.loader import CutAdapter
    from flora_vllm.plugin.manager import LoadedAdapter

    worker = _manager(2, 2)
    manager = worker._adapter_manager
    manager.rows, manager.head_rows = row_spaces(SimpleNamespace()), None
    manager.attached.graph_rows = lambda name, _: {"q": 2, "expert": NEVER}[name]
    stages = SimpleNamespace(world_size=1)
    monkeypatch.setattr(worker_manager, "get_pp_group", lambda: stages)

    def rows(*names: str, others: int) -> int:
        monkeypatch.setattr(worker_manager, "most_of_ranks", lambda number: max(number, others))
        return worker._rows_of(CutAdapter("LORA", 1, CompactLayers(dict.fromkeys(names, (None,))), None))

    assert [rows(others=0), rows(others=1), rows("q", others=0)] == [0, 1, 1]
    manager.rows.tokens.graphs = SimpleNamespace(serves=lambda _: True, row_budget=8)
    assert [rows(others=0), rows("q", others=0), rows(others=NEVER), rows("q", "expert", others=2)] == [0, 2] + [
        NEVER
    ] * 2
    for found, is_eager in ((0, None), (2, False), (NEVER, True)):
        manager._in_slots = {1: LoadedAdapter(7, 1, {}, found)}
        manager._set_adapter_mapping(LoRAMapping((7, 7), (7,)))
        assert (None if manager.rows.tokens.segments is None else not manager.step_fits_graph()) is is_eager
    stages.world_size = 2
    assert rows(others=0) == 1
