"""The agent of a replica: warm before it takes traffic, heard all the while, cold rather than never."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster_support import make_memory

from flora_vllm.cluster import agent as agents
from flora_vllm.cluster.agent import ReplicaAgent
from flora_vllm.cluster.messages import Orders, Report


@dataclass
class Controller:
    """Answers reports by `orders(report)`; keeps the reports."""

    orders: Callable[[Report], Orders | Exception]
    reports: list[Report] = field(default_factory=list)

    async def sync(self, report):
        self.reports.append(report)
        answer = self.orders(report)
        if isinstance(answer, Exception):
            raise answer
        return answer


def make_agent(memory, controller, sync_s=0.02, tell=lambda _: None):
    def describe():
        warming = agent.is_warming
        return Report("r0", "n0", 4, 10**9, 16, warming, tuple(memory.resident()), retired=tuple(memory.retired()))

    agent = ReplicaAgent(describe, memory, controller.sync, tell, lambda: False, sync_s)
    return agent


def wanted(*entries):
    return Orders(tuple(entries), (), 1)


def test_a_replica_is_warm_and_has_said_so_before_it_takes_traffic(tmp_path):
    async def run():
        memory, _, e = make_memory(tmp_path, "ab", 4)
        # While it loads the first one, another replica's copy is given to it.
        controller = Controller(lambda r: wanted(e["a"], e["b"]) if r.resident else wanted(e["a"]))
        agent = make_agent(memory, controller)
        await agent.start(patience_s=30)
        assert set(memory.resident()) == {e["a"].id, e["b"].id}
        last = controller.reports[-1]
        assert not last.is_warming
        assert set(last.resident) == {e["a"].id, e["b"].id}
        assert all(r.is_warming for r in controller.reports[:-1])
        agent.stop()

    asyncio.run(run())


def test_a_replica_reports_while_it_loads(tmp_path):
    """A long load must not look like a dead replica."""

    async def run():
        memory, engine, e = make_memory(tmp_path, "a", 4)
        controller = Controller(lambda _: wanted(e["a"]))
        agent = make_agent(memory, controller)
        engine.gate.clear()
        start = asyncio.create_task(agent.start(patience_s=30))
        while len(controller.reports) < 5:
            await asyncio.sleep(0.01)
        assert not start.done()
        engine.gate.set()
        await start
        assert memory.resident() == [e["a"].id]
        agent.stop()

    asyncio.run(run())


def test_a_replica_starts_cold_when_nothing_moves(tmp_path):
    async def run():
        memory, engine, e = make_memory(tmp_path, "ab", 4)
        for orders in (ConnectionError("gone"), Orders(None, (), 1)):
            agent = make_agent(memory, Controller(lambda _, orders=orders: orders))
            await asyncio.wait_for(agent.start(patience_s=0.1), 10)
            assert not agent.is_warming
            agent.stop()
        # A store or an engine that hangs on one adapter holds up the others only for so long.
        engine.gate.clear()
        agent = make_agent(memory, Controller(lambda _: wanted(e["a"], e["b"])))
        await asyncio.wait_for(agent.start(patience_s=0.1), 10)
        assert memory.resident() == []
        engine.gate.set()
        while len(memory.resident()) < 2:
            await asyncio.sleep(0.01)
        agent.stop()

    asyncio.run(run())


def test_an_adapter_that_cannot_be_had_holds_up_nobody(tmp_path):
    async def run():
        memory, engine, e = make_memory(tmp_path, "abc", 4, max_rank=4)
        engine.refuse = {"a"}
        (tmp_path / "src" / "b" / "adapter_config.json").unlink()
        agent = make_agent(memory, Controller(lambda _: wanted(e["a"], e["b"], e["c"])))
        await asyncio.wait_for(agent.start(patience_s=1000), 20)
        assert memory.resident() == [e["c"].id]
        assert memory.faults.keys() == {e["a"].id}
        assert memory.troubles.keys() == {e["b"].id}
        agent.stop()

    asyncio.run(run())


def test_a_controller_that_fails_is_asked_again(tmp_path):
    async def run():
        memory, _, e = make_memory(tmp_path, "a", 4)
        answers = iter([wanted(), wanted(), ConnectionError("gone"), TimeoutError("late")])
        controller = Controller(lambda _: next(answers, wanted(e["a"])))
        agent = make_agent(memory, controller)
        await agent.start(patience_s=30)
        while not memory.resident():
            await asyncio.sleep(0.01)
        agent.stop()

    asyncio.run(run())


def test_routers_are_told_again_and_again(tmp_path, monkeypatch):
    """Serve's controller passes it on, and knows nothing after it started anew."""
    monkeypatch.setattr(agents, "TELL_AGAIN_S", 0.1)

    async def run():
        memory, _, e = make_memory(tmp_path, "a", 4)
        told = []
        agent = make_agent(memory, Controller(lambda _: wanted(e["a"])), tell=told.append)
        await agent.start(patience_s=30)
        deadline = asyncio.get_running_loop().time() + 20
        while told[-3:] != [[e["a"].id]] * 3:
            assert asyncio.get_running_loop().time() < deadline, told
            await asyncio.sleep(0.01)
        agent.stop()

    asyncio.run(run())
