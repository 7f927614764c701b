"""What a replica has in memory: room, order, turns, versions; and what a client that leaves must not break."""

import asyncio
import random
import threading
import time

import pytest
from cluster_support import make_memory

from flora_vllm.cluster import memory as memories
from flora_vllm.cluster.memory import NoRoomError, NotLoadedError
from flora_vllm.cluster.store import Cache, Entry, StaleVersionError, StoreError
from flora_vllm.errors import AdapterError


def test_memory_evicts_least_used_unwanted_first_and_never_what_runs(tmp_path):
    async def run():
        memory, engine, e = make_memory(tmp_path, "abcd", 3)
        memory.wanted = (e["a"].id,)
        await memory.prewarm([e["a"]])
        async with memory.using(e["b"]):
            async with memory.using(e["c"]):
                pass
            async with memory.using(e["d"]):
                assert engine.held == {e["a"].id, e["b"].id, e["d"].id}
        assert engine.log == ["+a", "+b", "+c", "-c", "+d"]

    asyncio.run(run())


def test_memory_waits_for_a_slot_and_gives_up_aloud(tmp_path):
    async def run():
        memory, engine, e = make_memory(tmp_path, "ab", 1, wait_s=0.3)
        async with memory.using(e["a"]):
            with pytest.raises(NoRoomError):
                await memory.using(e["b"]).__aenter__()
            waiter = asyncio.create_task(memory.using(e["b"]).__aenter__())
            await asyncio.sleep(0.05)
            assert not waiter.done()
        await waiter
        assert engine.held == {e["b"].id}

    asyncio.run(run())


def test_memory_prewarm_takes_no_slot_from_wanted_or_running(tmp_path):
    async def run():
        memory, engine, e = make_memory(tmp_path, "abc", 2)
        memory.wanted = tuple(e[n].id for n in "ab")
        await memory.prewarm([e["a"], e["b"]])
        await memory.prewarm([e["a"], e["b"], e["c"]])
        assert engine.held == {e["a"].id, e["b"].id}
        assert e["c"].id in memory.troubles

    asyncio.run(run())


def test_memory_many_requests_at_once_load_once(tmp_path):
    async def run():
        memory, engine, e = make_memory(tmp_path, "abcdef", 3)
        rng = random.Random(0)

        async def request():
            entry = e[rng.choice("abcdef")]
            async with memory.using(entry):
                assert entry.id in engine.held
                await asyncio.sleep(rng.random() / 100)
                assert entry.id in engine.held
                assert len(engine.held) <= 3

        await asyncio.gather(*(request() for _ in range(200)))
        assert memory.in_use() == 0
        busy = memory.take_busy_s()
        assert 0.5 < sum(busy.values()) < 10
        assert memory.take_busy_s() == {}

    asyncio.run(run())


def test_memory_remembers_faults_and_respects_bytes(tmp_path):
    async def run():
        memory, engine, e = make_memory(tmp_path, "ab", 4, limit_bytes=15)
        engine.refuse = {"a"}
        for _ in range(2):
            with pytest.raises(AdapterError, match="faulty"):
                await memory.using(e["a"]).__aenter__()
        assert memory.faults.keys() == {e["a"].id}
        engine.refuse = set()
        async with memory.using(e["b"]):
            pass
        big = Entry("big", "v", e["b"].uri, 99, 1)
        with pytest.raises((AdapterError, StaleVersionError)):
            await memory.using(big).__aenter__()

    asyncio.run(run())


def test_a_version_that_left_the_catalogue_is_refused_and_goes_when_idle(tmp_path):
    async def run():
        memory, engine, e = make_memory(tmp_path, "ab", 4)
        async with memory.using(e["a"]):
            await memory.retire([e["a"].id])
            # Who runs keeps its weights; who comes is told.
            assert engine.held == {e["a"].id}
            with pytest.raises(StaleVersionError, match="newer version"):
                await memory.using(e["a"]).__aenter__()
        await memory.retire([e["a"].id])
        assert engine.held == set()
        # Not even from the node's cache, where it still is.
        with pytest.raises(StaleVersionError):
            await memory.using(e["a"]).__aenter__()
        assert memory.retired() == [e["a"].id]
        # The old content was put back.
        await memory.retire([])
        async with memory.using(e["a"]):
            assert engine.held == {e["a"].id}

    asyncio.run(run())


@pytest.mark.parametrize("full", [False, True])
def test_a_client_that_leaves_during_a_load_leaves_engine_and_table_equal(tmp_path, full):
    async def run():
        memory, engine, e = make_memory(tmp_path, "ab", 1)
        if full:
            await memory.prewarm([e["b"]])
        else:
            engine.gate.clear()
        client = asyncio.create_task(memory.using(e["a"]).__aenter__())
        # In the middle of the engine's load, or of the unload that makes room for it.
        while not (memory._loading if not full else not memory.resident()):
            await asyncio.sleep(0)
        client.cancel()
        await asyncio.sleep(0.001)
        engine.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await client
        assert engine.held == set(memory.resident())
        assert memory.in_use() == 0
        async with memory.using(e["a"]):
            assert engine.held == {e["a"].id}

    asyncio.run(run())


def test_an_adapter_above_the_rank_limit_never_reaches_the_engine(tmp_path):
    async def run():
        memory, engine, e = make_memory(tmp_path, "a", 4, max_rank=3)
        with pytest.raises(AdapterError, match="rank 4, a replica allows max_rank 3"):
            await memory.using(e["a"]).__aenter__()
        await memory.prewarm([e["a"]])
        assert memory.lacking([e["a"]]) == []
        assert engine.log == []

    asyncio.run(run())


def test_all_who_wait_for_an_adapter_share_one_download(tmp_path, monkeypatch):
    fetched, may_end = [], threading.Event()
    fetch = Cache.fetch

    def slow(self, entry):
        fetched.append(entry.name)
        may_end.wait(30)
        return fetch(self, entry)

    monkeypatch.setattr(Cache, "fetch", slow)

    async def run():
        memory, engine, e = make_memory(tmp_path, "a", 4)
        waiting = [asyncio.create_task(memory.using(e["a"]).__aenter__()) for _ in range(5)]
        await asyncio.sleep(0.05)
        # The one who began it leaves.
        waiting[0].cancel()
        await asyncio.sleep(0.05)
        may_end.set()
        await asyncio.gather(*waiting[1:])
        assert fetched == ["a"]
        assert engine.log == ["+a"]
        # One that failed is not kept.
        memory, _, e = make_memory(tmp_path / "other", "b", 4)
        (tmp_path / "other" / "src" / "b" / "adapter_config.json").unlink()
        for _ in range(2):
            with pytest.raises(StaleVersionError):
                await memory.using(e["b"]).__aenter__()
        assert fetched == ["a", "b", "b"]

    asyncio.run(run())


def test_a_store_that_does_not_answer_holds_up_no_other(tmp_path, monkeypatch):
    answers, fetch = threading.Event(), Cache.fetch

    def hang(self, entry):
        if entry.uri.startswith("dead://"):
            answers.wait(30)
        return fetch(self, entry)

    monkeypatch.setattr(Cache, "fetch", hang)
    dead = [Entry(f"dead{i}", "v", f"dead://bucket/dead{i}", 1, 1) for i in range(64)]

    async def run():
        memory, engine, e = make_memory(tmp_path, "abc", 4)
        # More than any pool has threads; their clients leave, the threads stay.
        waiting = [asyncio.create_task(memory.using(entry).__aenter__()) for entry in dead]
        await asyncio.sleep(0.3)
        for task in waiting:
            task.cancel()
        began = time.monotonic()
        async with memory.using(e["a"]):
            pass
        monkeypatch.setattr(memories, "FETCH_S", 2.0)
        await memory.prewarm([dead[0], e["b"], e["c"]])
        assert time.monotonic() - began < 20
        assert sorted(engine.log) == ["+a", "+b", "+c"]
        with pytest.raises(StoreError, match="dead://bucket/dead1 has not come within 2 s"):
            await memory.using(dead[1]).__aenter__()
        assert memory.troubles.keys() == {dead[0].id}
        answers.set()

    asyncio.run(run())


def test_who_waits_for_a_slot_waits_no_longer_for_others_who_do_and_holds_nobody_up(tmp_path):
    async def run():
        memory, _, e = make_memory(tmp_path, "abcdef", 1, wait_s=4.0)
        async with memory.using(e["a"]):
            began = time.monotonic()
            waiting = [asyncio.create_task(memory.using(e[name]).__aenter__()) for name in "bcde"]
            await asyncio.sleep(0.3)
            # What the plan and the catalogue ask for does not wait with them: the replica would be silent meanwhile.
            await asyncio.wait_for(memory.prewarm([e["f"]]), 2)
            assert e["f"].id in memory.troubles
            await asyncio.wait_for(memory.retire([e["a"].id]), 2)
            found = await asyncio.gather(*waiting, return_exceptions=True)
            assert all(isinstance(one, NoRoomError) for one in found)
            assert time.monotonic() - began < 10, "one after another they would have waited for 16 s"

    asyncio.run(run())


def test_what_the_engine_could_not_load_is_tried_again_after_a_while(tmp_path, monkeypatch):
    async def run():
        memory, engine, e = make_memory(tmp_path, "ab", 4)
        engine.fail = {"a"}
        clients = [asyncio.create_task(memory.using(e["a"]).__aenter__()) for _ in range(5)]
        found = await asyncio.gather(*clients, return_exceptions=True)
        assert all(isinstance(one, NotLoadedError) for one in found)
        await memory.prewarm([e["a"], e["b"]])
        assert engine.log == ["?a", "+b"], "each try pauses the engine"
        assert memory.faults == {}
        assert memory.troubles == {e["a"].id: "no space for a"}
        monkeypatch.setattr(memories, "RETRY_S", 0.0)
        engine.fail = set()
        async with memory.using(e["a"]):
            assert memory.troubles == {}

    asyncio.run(run())


def test_what_is_known_of_an_adapter_goes_with_it(tmp_path):
    async def run():
        memory, engine, e = make_memory(tmp_path, "ab", 4)
        engine.refuse, engine.fail = {"a"}, {"b"}
        await memory.prewarm([e["a"], e["b"]])
        assert (memory.faults.keys(), memory.troubles.keys()) == ({e["a"].id}, {e["b"].id})
        await memory.retire([e["a"].id])
        await memory.prewarm([])
        assert (memory.faults, memory.troubles) == ({}, {})
        # Whoever asks all the same hears that there is a newer one.
        with pytest.raises(StaleVersionError):
            await memory.using(e["a"]).__aenter__()

    asyncio.run(run())
