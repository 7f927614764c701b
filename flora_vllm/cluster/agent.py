"""The part of a replica that carries out the plan: reports, prewarms, tells the routers, ends with its engine."""

import asyncio
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable

from flora_vllm.cluster.memory import AdapterMemory
from flora_vllm.cluster.messages import Orders, Report
from flora_vllm.cluster.store import Entry

log = logging.getLogger("ray.serve")

# Exit code of a replica whose engine died; Serve starts another one.
ENGINE_DIED = 17
# At most this often routers are told of changes.
TELL_S = 0.05
# This often they are told without one: Serve's controller forgets it when it starts anew.
TELL_AGAIN_S = 5.0


class ReplicaAgent:
    """sync: reports to the controller and returns its orders; raises ConnectionError while there is none.

    tell: gives the routers the ids in memory. is_dead: whether the engine can never serve again.
    """

    def __init__(
        self,
        describe: Callable[[], Report],
        memory: AdapterMemory,
        sync: Callable[[Report], Awaitable[Orders]],
        tell: Callable[[list[str]], None],
        is_dead: Callable[[], bool],
        sync_s: float,
    ) -> None:
        self._describe, self._memory, self._sync, self._tell = describe, memory, sync, tell
        self._is_dead, self._sync_s = is_dead, sync_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._told: list[str] | None = None
        self._told_s = 0.0
        self._telling: asyncio.Task[None] | None = None
        self._warming: asyncio.Task[None] | None = None
        self.is_warming = True
        self.replicas_wanted = 0

    def changed(self) -> None:
        """The set in memory changed, or may have: routers hear of it soon."""
        if self._telling is None or self._telling.done():
            self._telling = self._spawn(self._tell_soon())

    def _spawn(self, work: Awaitable[None]) -> "asyncio.Task[None]":
        task: asyncio.Task[None] = asyncio.ensure_future(work)  # type: ignore[assignment]  # a coroutine gives a Task
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("replica agent: a task failed", exc_info=task.exception())

    async def _tell_soon(self) -> None:
        await asyncio.sleep(TELL_S)
        now = sorted(self._memory.announced())
        if now != self._told or time.monotonic() - self._told_s >= TELL_AGAIN_S:
            self._told, self._told_s = now, time.monotonic()
            self._tell(now)

    async def start(self, patience_s: float) -> None:
        """Loads the wanted set before the replica takes traffic, then keeps in step in the background.

        It reports all the while: a silent replica is taken off the plan, and the wanted set may change meanwhile. When
        it returns, the controller knows that the replica is warm. If nothing was loaded for `patience_s`, because there
        is no controller, no plan or no answer from a store, the replica starts with what it has: serving late is worse
        than serving cold.
        """
        self._spawn(self._watch())
        deadline, loads = time.monotonic() + patience_s, 0
        while time.monotonic() < deadline:
            orders = await self._exchange()
            if orders is not None and orders.wanted is not None:
                if not self._memory.lacking(orders.wanted):
                    break
                self._warm(orders.wanted)
            await self._pause()
            if self._memory.loads > loads:
                deadline, loads = time.monotonic() + patience_s, self._memory.loads
        else:
            log.warning("replica starts cold: nothing was loaded for %g s", patience_s)
        self.is_warming = False
        await self._exchange()
        self._spawn(self._follow())

    def _warm(self, entries: tuple[Entry, ...]) -> None:
        """Loads what is missing, in the background; one round at a time."""
        if self._warming is None or self._warming.done():
            self._warming = self._spawn(self._memory.prewarm(entries))

    async def _pause(self) -> None:
        """Until the next report is due; while warming, at most until the round of loads is over."""
        # Spread out, so that replicas started together do not report together.
        seconds = self._sync_s * random.uniform(0.8, 1.2)
        if not self.is_warming:
            await asyncio.sleep(seconds)
        elif self._warming is None or self._warming.done():
            await asyncio.sleep(min(0.2, seconds))
        else:
            await asyncio.wait([self._warming], timeout=seconds)

    async def _watch(self) -> None:
        """Ends the process when the engine died: a dead engine with a live actor would answer errors at once and look
        idle, so routers would prefer it until enough health checks failed."""
        while True:
            self.exit_if_dead()
            await asyncio.sleep(min(0.25, self._sync_s))

    def exit_if_dead(self) -> None:
        if self._is_dead():
            log.error("engine died; replica exits")
            os._exit(ENGINE_DIED)

    async def _follow(self) -> None:
        while True:
            await self._pause()
            self.changed()
            orders = await self._exchange()
            if orders is None:
                continue
            await self._memory.retire(orders.stale)
            if orders.wanted is not None:
                self._warm(orders.wanted)

    def stop(self) -> None:
        """Ends the background work: the replica is about to go."""
        for task in self._tasks:
            task.cancel()

    async def _exchange(self) -> Orders | None:
        try:
            orders = await self._sync(self._describe())
        except (ConnectionError, TimeoutError) as error:
            log.info("no placement controller now: %s", error)
            return None
        self.replicas_wanted = orders.replicas_wanted
        if orders.wanted is not None:
            self._memory.wanted = tuple(e.id for e in orders.wanted)
        return orders
