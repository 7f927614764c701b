"""--adapter-memory: adapters in host memory and in slots never take more, and what a step needs always fits."""

from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import engine_support as support
import pytest
from engine_support import Ask

from flora_vllm.errors import AdapterError
from flora_vllm.plugin.memory import MemoryBudget
from flora_vllm.plugin.refusals import is_passing

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that shares its layers with no other."""
    from flora_vllm.plugin import memory

    monkeypatch.setattr(memory, "most_of_ranks", lambda number: number)


class Caches:
    """vLLM's two caches as its manager wires them, without a model."""

    def __init__(self, slots: int) -> None:
        from vllm.lora.model_manager import AdapterLRUCache

        self._registered_adapters: Any = AdapterLRUCache(10**9, self.leave_slot)
        self._active_adapters: Any = AdapterLRUCache(slots, lambda _: None)

    def leave_slot(self, adapter: int) -> None:
        self._active_adapters.pop(adapter, None)

    def remove_adapter(self, adapter: int) -> None:
        self._registered_adapters.pop(adapter, None)

    def take(self, adapter: int) -> None:
        self._registered_adapters[adapter] = SimpleNamespace(id=adapter)
        if adapter not in self._active_adapters and len(self._active_adapters) == self._active_adapters.capacity:
            self._active_adapters.remove_oldest()
        self._active_adapters[adapter] = None
        self._registered_adapters.touch(adapter)

    def used(self, sizes: dict[int, int]) -> int:
        return sum(sizes[a] for a in self._registered_adapters.order) + sum(
            sizes[a] for a in self._active_adapters.order
        )


@pytest.mark.parametrize("seed", range(20))
def test_no_step_lacks_room_and_nothing_takes_more(seed: int) -> None:
    random, slots, most = Random(seed), 3, 4000
    memory, caches = MemoryBudget(most, slots), Caches(slots)
    sizes: dict[int, int] = {}
    refused = 0
    for adapter in range(1, 40):
        size = random.randrange(1, 900)
        try:
            memory.check(adapter, "any", size)
        except AdapterError:
            refused += 1
            continue
        sizes[adapter] = size
        memory.make_room(caches, adapter, size)
        caches.take(adapter)
        if adapter == 5:
            caches._registered_adapters.pin(5)
            caches._active_adapters.pin(5)
        assert caches.used(sizes) <= most
        step = {*random.sample(sorted(sizes), min(slots, len(sizes)))}
        step = {*sorted(step)[: slots - 1], 5} if 5 in sizes and adapter >= 5 else step
        for one in sorted(step):
            memory.make_room(caches, one, sizes[one], step)
            caches.take(one)
            assert caches.used(sizes) <= most
        assert step <= set(caches._active_adapters.order), "nothing of the step was evicted for the step"
        assert (5 in sizes and adapter >= 5) <= (5 in caches._registered_adapters)
    assert refused, "the largest do not fit with each other"
    assert len(sizes) > 2 * slots


def test_how_many_are_kept_follows_their_ranks() -> None:
    # As many as fit beside two slots, and room for one more slot's contents while they change.
    for size, kept in ((10, 97), (100, 7)):
        memory, caches = MemoryBudget(1000, 2), Caches(2)
        for adapter in range(200):
            memory.make_room(caches, adapter, size)
            caches.take(adapter)
        assert len(caches._registered_adapters) == kept


def test_the_refusal_has_the_numbers() -> None:
    memory = MemoryBudget(1000, 2)
    memory.check(1, "first", 300)
    memory.sizes |= {1: 300, 2: 150}
    with pytest.raises(AdapterError) as refusal:
        memory.check(3, "third", 250)
    assert str(refusal.value) == (
        "adapter 'third' cannot be served (1 fault):\n  - it takes 500 bytes (its slot contents, in memory and once "
        "more in a slot) and with the 1 largest that may run beside it 1100 bytes, above --adapter-memory 1000; use an "
        "adapter of lower rank, unload others, start with fewer --max-loras or with --adapter-memory 1100"
    )
    assert is_passing(str(refusal.value))
    memory.forget(1)
    memory.check(3, "third", 250)
    with pytest.raises(AdapterError) as refusal:
        MemoryBudget(1000, 1).check(4, "fourth", 501)
    assert not is_passing(str(refusal.value)), "it is too large alone"


def test_what_is_checked_counts_before_it_is_there() -> None:
    memory = MemoryBudget(1000, 2)
    memory.check(1, "first", 300)
    with pytest.raises(AdapterError, match="1 largest that may run beside it 1100 bytes"):
        memory.check(2, "second", 250)
    memory.arrive(1)
    assert memory.sizes == {1: 300}
    memory.check(1, "first again, refused for another reason", 400)
    memory.give_up(1)
    memory.check(2, "second", 200)
    memory.forget(2)
    memory.forget(1)
    memory.check(3, "third", 500)


def test_without_the_option_nothing_is_counted() -> None:
    memory = MemoryBudget(None, 2)
    memory.check(1, "huge", 10**15)
    assert memory.make_room(Caches(2), 1, 10**15) == ()


@pytest.mark.engine
def test_an_engine_keeps_within_the_bytes_and_answers_as_alone(tiny_model, tmp_path: Path) -> None:
    """Six adapters of other ranks in two slots, most of which have gone when they are asked for again."""
    adapters = support.write_every_family(tiny_model("llama"), tmp_path)
    files = {name: (path / "adapter_model.safetensors").stat().st_size for name, path in adapters.items()}
    used = ["flora-1", "lora", "flora-2", "ia3", "flora-3", "hira"]
    assert files["flora-8"] > 2 * max(files[name] for name in used)
    budget = 2 * 2 * max(files[name] for name in used)
    with support.running(tiny_model("llama"), max_loras=2, adapter_memory=budget) as engine:
        manager = engine.manager()

        def taken() -> int:
            loaded = manager.report(None)["adapters"]
            return sum(adapter["bytes"] * (1 + (adapter["level"] == "gpu")) for adapter in loaded)

        asks = [Ask(support.prompt(6 + i, seed=i), adapters[name]) for i, name in enumerate(used)]
        alone = []
        for ask in asks:
            alone += engine.ask([ask])
            assert taken() <= budget
        with pytest.raises(ValueError, match=rf"above --adapter-memory {budget}; use an adapter of lower rank"):
            engine.ask([Ask(support.prompt(5, seed=99), adapters["flora-8"])])
        for answer, wanted in zip(engine.ask(asks[::-1])[::-1], alone, strict=True):
            assert support.difference(answer, wanted) < support.LOGPROB_TOLERANCE
        assert taken() <= budget
        assert 2 < manager.report(None)["on_cpu"] < len(used)
        assert manager.loads.evictions["cpu"] > 2
