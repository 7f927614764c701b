"""The adapters one engine has in memory: loads, pins, awaited unloads. Knows neither Ray nor vLLM.

Rules: never more than `slots` adapters in the engine; one in use is never unloaded; one that the plan wants gives way
only if nothing else can; the engine has let go of a slot before it is filled again; one id means one content for ever.
One load at a time, because each one pauses the engine; who waits for running requests lets others go on.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from flora_vllm.cluster.store import Cache, Entry, StaleVersionError, StoreError
from flora_vllm.errors import AdapterError, FloraError

# A version that left the catalogue is refused for this long: ample for every ingress to hear of it.
RETIRED_S = 60.0
# Who waits for a slot looks again after this: what becomes free while it lines up to wait wakes others only.
LOOK_AGAIN_S = 1.0
# After an engine could not load an adapter it is asked to again no sooner: each try reads the whole file.
RETRY_S = 5.0
# Who wants an adapter waits no longer for its store to send it; the fetch goes on for who comes later.
FETCH_S = 30.0
# At a time from one source.
MOST_FETCHES = 4


class NoRoomError(FloraError, RuntimeError):
    """Every slot is in use by running requests."""


class NotLoadedError(FloraError, RuntimeError):
    """The engine could not load the adapter now, for no fault of the adapter's."""


class Engine(Protocol):
    """What an engine must offer. `load` may be called again for an id that was unloaded; ids are permanent."""

    async def load(self, entry: Entry, path: Path) -> None:
        """Raises AdapterError if the adapter cannot be served, NotLoadedError if not now."""
        ...

    async def unload(self, adapter_id: str) -> None:
        """Returns once the engine holds it no more."""
        ...


@dataclass
class _Held:
    entry: Entry
    path: Path
    users: int = 0
    used_s: float = field(default_factory=time.monotonic)
    since_s: float = field(default_factory=time.monotonic)


class AdapterMemory:
    """Owns the table of what this replica's engine holds."""

    def __init__(
        self,
        engine: Engine,
        cache: Cache,
        slots: int,
        changed: Callable[[], None],
        wait_s: float = 30.0,
        limit_bytes: int | None = None,
        max_rank: int | None = None,
    ) -> None:
        self._engine, self._cache, self._slots, self._changed = engine, cache, slots, changed
        self._wait_s, self._limit_bytes, self._max_rank = wait_s, limit_bytes, max_rank
        self._held: dict[str, _Held] = {}
        self._loading: str | None = None
        self._fetches: dict[Entry, tuple[asyncio.Future[Path], float]] = {}  # and since when
        self._pools: dict[str, ThreadPoolExecutor] = {}  # of each source, so that one that hangs holds up no other's
        self._failed: dict[str, tuple[float, str]] = {}  # id -> when the engine could not load it, and why
        self._turn = asyncio.Lock()
        self._freed = asyncio.Condition()
        self._busy_s: dict[str, float] = {}
        self.wanted: tuple[str, ...] = ()
        # Adapters the engine refused, for good, and wanted ones that could not be had the last time.
        self.faults: dict[str, str] = {}
        self.troubles: dict[str, str] = {}
        self.loads = self.unloads = 0
        self._retired_s: dict[str, float] = {}

    def resident(self) -> list[str]:
        """Ids in the engine now."""
        return list(self._held)

    def announced(self) -> list[str]:
        """Ids that routers may send here: in the engine, or about to be."""
        return [*self._held, *([self._loading] if self._loading else [])]

    def in_use(self) -> int:
        return sum(held.users for held in self._held.values())

    def paths(self) -> list[Path]:
        return [held.path for held in self._held.values()]

    @contextlib.asynccontextmanager
    async def using(self, entry: Entry) -> AsyncIterator[None]:
        """Holds the adapter in the engine while a request runs; loads it first if need be.

        Raises AdapterError if it cannot be served; StaleVersionError, StoreError, NoRoomError or NotLoadedError if not
        now.
        """
        if entry.id in self._retired_s:
            raise StaleVersionError(f"{entry.name} has a newer version than {entry.version}, or is gone")
        held = self._held.get(entry.id)
        if held is None:
            held = await self._place(entry, await self._fetch(entry), reserve=True)
        else:
            self._count(held, 1)
        try:
            yield
        finally:
            self._count(held, -1)
            if not held.users:
                async with self._freed:
                    self._freed.notify_all()

    def _count(self, held: _Held, step: int) -> None:
        now = time.monotonic()
        key = held.entry.id
        self._busy_s[key] = self._busy_s.get(key, 0.0) + held.users * (now - held.since_s)
        held.users += step
        held.used_s = held.since_s = now

    def take_busy_s(self) -> dict[str, float]:
        """Request-seconds per adapter since the last call."""
        for held in self._held.values():
            if held.users:
                self._count(held, 0)
        busy, self._busy_s = self._busy_s, {}
        return {k: v for k, v in busy.items() if v > 0}

    def lacking(self, entries: Iterable[Entry]) -> list[str]:
        """Ids that are not in the engine though nothing is known to keep them out."""
        known = (self._held, self.faults, self.troubles)
        return [e.id for e in entries if not any(e.id in table for table in known)]

    async def prewarm(self, entries: Iterable[Entry]) -> None:
        """Loads what is missing of all that is wanted, as it is fetched; one that fails is noted and passed over."""
        entries = tuple(entries)
        wanted = {entry.id for entry in entries}
        self.troubles = {i: trouble for i, trouble in self.troubles.items() if i in wanted}
        turn = asyncio.Lock()
        async with asyncio.TaskGroup() as group:
            for entry in entries:
                if entry.id not in self._held and entry.id not in self.faults:
                    group.create_task(self._prewarm(entry, turn))

    async def _prewarm(self, entry: Entry, turn: asyncio.Lock) -> None:
        try:
            path = await self._fetch(entry)
            async with turn:  # else requests would line up behind all of them
                await self._place(entry, path, reserve=False)
        except AdapterError as error:
            self.faults.setdefault(entry.id, str(error))
        except FloraError as error:
            # Not held against the adapter: the next sync asks again.
            self.troubles[entry.id] = str(error)

    async def _place(self, entry: Entry, path: Path, reserve: bool) -> _Held:
        """Brings it into the engine; with `reserve` it is counted as in use before anyone can evict it."""
        deadline = time.monotonic() + (self._wait_s if reserve else 0.0)
        while True:
            async with self._turn:
                held = self._held.get(entry.id)
                if held is None:
                    self._check(entry)  # as it was tried for another request meanwhile
                    if await self._make_room(entry, patient=reserve):
                        held = await _whole(self._fill(entry, path))
                if held is not None:
                    if reserve:
                        self._count(held, 1)
                    return held
            # Without the turn: others find what they want in memory, or leave and make room.
            left = deadline - time.monotonic()
            if left <= 0:
                raise NoRoomError(f"all {self._slots} adapter slots are in use; {entry.name} has to wait")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, LOOK_AGAIN_S)), self._freed:
                    await self._freed.wait()

    def _check(self, entry: Entry) -> None:
        """Raises what is known to keep it out of the engine."""
        if entry.id in self.faults:
            raise AdapterError(self.faults[entry.id])
        if self._max_rank is not None and entry.rank > self._max_rank:
            raise AdapterError(
                f"adapter {entry.name} has rank {entry.rank}, a replica allows max_rank {self._max_rank}"
            )
        if entry.id in self._failed and time.monotonic() - self._failed[entry.id][0] < RETRY_S:
            raise NotLoadedError(self._failed[entry.id][1])

    async def _fetch(self, entry: Entry) -> Path:
        """Where its copy is; one download for all who wait for it, which goes on if one of them leaves."""
        self._check(entry)
        copy = await asyncio.to_thread(self._cache.copy_of, entry)
        if copy is not None:
            return copy
        if entry not in self._fetches:
            source = entry.uri.rpartition("/")[0]
            if source not in self._pools:
                self._pools[source] = ThreadPoolExecutor(MOST_FETCHES, thread_name_prefix="flora-fetch")
            began = asyncio.get_running_loop().run_in_executor(self._pools[source], self._cache.fetch, entry)
            self._fetches[entry] = began, time.monotonic()

            def end(fetch: asyncio.Future[Path]) -> None:
                del self._fetches[entry]
                if not fetch.cancelled():
                    fetch.exception()  # whoever asked may have left

            began.add_done_callback(end)
        fetch, since_s = self._fetches[entry]
        await asyncio.wait([fetch], timeout=since_s + FETCH_S - time.monotonic())
        if not fetch.done():
            raise StoreError(f"{entry.uri} has not come within {FETCH_S:g} s; its fetch goes on")
        return fetch.result()

    async def _fill(self, entry: Entry, path: Path) -> _Held:
        self._loading = entry.id
        self._changed()
        try:
            await self._engine.load(entry, path)
        except AdapterError as error:
            self.faults[entry.id] = str(error)
            raise
        except NotLoadedError as error:
            now = time.monotonic()
            self._failed = {i: failed for i, failed in self._failed.items() if now - failed[0] < RETRY_S}
            self._failed[entry.id] = (now, str(error))
            raise
        finally:
            self._loading = None
            self._changed()
        held = self._held[entry.id] = _Held(entry, path)
        self.loads += 1
        self.troubles.pop(entry.id, None)
        return held

    async def _make_room(self, entry: Entry, patient: bool) -> bool:
        """Unloads until the adapter fits, wanted ones only if `patient`; whether it does."""
        limit = self._limit_bytes
        if limit is not None and entry.nbytes > limit:
            raise AdapterError(f"adapter {entry.name} has {entry.nbytes} bytes, a replica allows adapter_bytes {limit}")
        while len(self._held) >= self._slots or (
            limit is not None and sum(h.entry.nbytes for h in self._held.values()) + entry.nbytes > limit
        ):
            wanted = set(self.wanted)
            idle = [h for h in self._held.values() if not h.users and (patient or h.entry.id not in wanted)]
            if not idle:
                return False
            await self._evict(min(idle, key=lambda h: (h.entry.id in wanted, h.used_s)))
        return True

    async def _evict(self, held: _Held) -> None:
        # Out of the table first: a request that comes meanwhile waits for its turn and loads it again.
        del self._held[held.entry.id]
        self._changed()
        await _whole(self._engine.unload(held.entry.id))
        self.unloads += 1

    def retired(self) -> list[str]:
        """Ids refused because they left the catalogue lately."""
        return list(self._retired_s)

    async def retire(self, stale: Collection[str]) -> None:
        """Serves the ids no more, which are all that left the catalogue; unloads those that no request runs on."""
        self.faults = {i: fault for i, fault in self.faults.items() if i not in stale}
        now = time.monotonic()
        since = {i: self._retired_s.get(i, now) for i in stale}
        self._retired_s = {i: s for i, s in since.items() if i in self._held or now - s < RETIRED_S}
        if not self._retired_s.keys() & self._held.keys():
            return
        async with self._turn:
            for held in [h for h in self._held.values() if h.entry.id in self._retired_s]:
                if not held.users:
                    await self._evict(held)


async def _whole(work: Coroutine[Any, Any, Any]) -> Any:
    """Lets `work` end even if its caller is cancelled (its client left): else engine and table would differ."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
