"""The placement controller of one base model: a Serve deployment actor that keeps catalogue and plan.

All state is soft. Replicas tell everything with every sync, so a new controller knows the fleet after one round; what
was resident stays where it is, because the policy adopts what it finds. Routers and ingresses never wait for it.
"""

import asyncio
import logging
import math
import os
import time
import uuid
from dataclasses import asdict
from typing import Any

from flora_vllm.cluster.config import ModelConfig, StoreConfig, TimingConfig, parse
from flora_vllm.cluster.messages import CatalogueNews, Orders, Report
from flora_vllm.cluster.rules.placement import AdapterSpec, ReplicaSpec
from flora_vllm.cluster.rules.policy import Planner
from flora_vllm.cluster.store import Catalogue, Entry
from flora_vllm.errors import ConfigError

log = logging.getLogger("ray.serve")

# Exit code of a controller with a broken loop; Serve starts another one.
BROKEN = 18

# An adapter used at least this much (mean requests in flight) counts when replicas are scaled.
ACTIVE = 0.02


def _exit_if_broken(loop: "asyncio.Task[None]") -> None:
    """A controller that answers but plans or scans no more would never be replaced; all its state is soft."""
    if not loop.cancelled() and loop.exception() is not None:
        log.critical("placement controller: a loop broke; the controller exits", exc_info=loop.exception())
        os._exit(BROKEN)


class PlacementController:
    """Async actor. The arguments are plain data, as Serve wants them; see config.py for their meaning."""

    def __init__(self, model: dict[str, Any], store: dict[str, Any], timing: dict[str, Any]) -> None:
        self._model = parse(ModelConfig, model, "model")
        self._timing = parse(TimingConfig, timing, "timing")
        self._scan_s = parse(StoreConfig, store, "store").scan_s
        self._planner = Planner(self._model.policy)
        self._catalogue = Catalogue(self._model.adapters)
        self._by_id: dict[str, Entry] = {}
        self._names: dict[str, str] = {}
        self._reports: dict[str, Report] = {}
        self._seen_s: dict[str, float] = {}
        self._born, self._born_s = uuid.uuid4().hex, time.monotonic()
        self._changes: list[tuple[int, Entry | None, str]] = []
        self._number = 0
        self._has_scanned, self._was_listed, self._has_planned = False, False, False
        self._unread: dict[str, str] = {}
        self._joined_s = self._born_s
        self._moves = self._plans = self._syncs = 0
        self._plan_ms = 0.0
        self._tasks: list[asyncio.Task[None]] = []
        self._scanning = asyncio.Lock()
        self._metrics: Any = None

    def _ensure_running(self) -> None:
        """Starts the loops with the first call: an actor's constructor has no event loop of its own."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._scan_loop()), asyncio.create_task(self._plan_loop())]
            for task in self._tasks:
                task.add_done_callback(_exit_if_broken)

    async def _scan_loop(self) -> None:
        while True:
            await self._scan()
            await asyncio.sleep(self._scan_s)

    async def _plan_loop(self) -> None:
        while True:
            await asyncio.sleep(self._timing.plan_s)
            self._expire()
            self._plan()

    async def _scan(self) -> None:
        async with self._scanning:
            added, removed = await asyncio.to_thread(self._catalogue.scan)
            self._number += 1 if added or removed else 0
            for entry in added:
                self._put(entry)
            if added:
                # The planner knew nothing of what replicas told of these, and would move what is in its place.
                for report in self._reports.values():
                    self._put_replica(report)
            for entry in removed:
                self._by_id.pop(entry.id, None)
                self._names.pop(entry.name, None)
                self._planner.remove_adapter(entry.id)
                self._changes.append((self._number, None, entry.name))
            if len(self._changes) > 2 * len(self._by_id) + 1000:
                # Askers that are further behind get everything.
                del self._changes[: len(self._changes) // 2]
            for uri, fault in self._catalogue.store_faults.items():
                log.warning("adapter source %s: %s", uri, fault)
            was_complete = self._is_complete() or not self._has_scanned
            # Here, because the catalogue is ahead of the rest while a scan runs.
            self._was_listed, self._unread = self._catalogue.is_listed(), self._catalogue.unread
            if not was_complete and self._is_complete():
                # Who asked before got a part; under a new sign everybody gets the whole.
                self._born = uuid.uuid4().hex
            self._has_scanned = True

    def _is_complete(self) -> bool:
        """What the sources have was all read at least once."""
        return self._was_listed and not self._unread

    def _may_be_there(self, name: str) -> bool:
        """Whether a source may have an adapter of this name that was never read."""
        return not self._was_listed or name in self._unread

    def _put(self, entry: Entry) -> None:
        old = self._by_id.get(self._names.get(entry.name, ""))
        asked = self._model.options_for(entry.name)
        spec = AdapterSpec(entry.id, entry.nbytes, entry.rank, asked.tenant, asked.min_copies, asked.max_copies)
        self._planner.put_adapters([spec])
        self._by_id[entry.id] = entry
        self._names[entry.name] = entry.id
        self._changes.append((self._number, entry, entry.name))
        if old is not None and old.id != entry.id:
            del self._by_id[old.id]
            self._planner.remove_adapter(old.id, heir=entry.id)

    def _expire(self) -> None:
        now = time.monotonic()
        for replica in [r for r, t in self._seen_s.items() if now - t > self._timing.lost_s]:
            self._forget(replica)

    def _forget(self, replica: str) -> None:
        del self._seen_s[replica], self._reports[replica]
        self._planner.remove_replica(replica)

    def _plan(self) -> None:
        now = time.monotonic()
        is_settled = now - self._joined_s > self._timing.settle_s or len(self._reports) >= self._expected()
        if not self._has_scanned or not self._reports or not (self._has_planned or is_settled):
            return
        self._planner.refresh_load(now)
        plan = self._planner.plan()
        self._has_planned = True
        self._plan_ms = 1e3 * (time.monotonic() - now)
        self._plans += 1
        self._moves += plan.moves
        self._export(plan.moves)

    def _expected(self) -> int:
        scale = self._model.autoscale
        return scale.min_replicas if scale is not None else self._model.replicas

    async def sync(self, report: Report) -> Orders:
        """A replica reports and learns what it should hold."""
        self._ensure_running()
        self._syncs += 1
        is_new = report.replica not in self._reports
        self._reports[report.replica], self._seen_s[report.replica] = report, time.monotonic()
        self._put_replica(report)
        self._planner.observe(report.busy_s)
        if is_new:
            self._joined_s = time.monotonic()
        if (is_new or report.is_warming) and not self._planner.wanted(report.replica):
            # Whoever joins gets its set at once: it takes no traffic before it has it.
            self._plan()
        refused = set(report.faults)
        wanted = [self._by_id[i] for i in self._planner.wanted(report.replica) if i in self._by_id and i not in refused]
        told = [i for i in dict.fromkeys((*report.resident, *report.retired, *report.faults)) if i not in self._by_id]
        stale = tuple(i for i in told if i in report.retired or not self._may_be_there(i.rpartition("@")[0]))
        return Orders(tuple(wanted) if self._has_planned else None, stale, self._replicas_wanted())

    def _put_replica(self, report: Report) -> None:
        spec = ReplicaSpec(report.replica, report.node, report.slots, report.nbytes, report.max_rank, report.is_warming)
        self._planner.put_replica(spec, report.resident)

    async def leave(self, replica: str) -> None:
        """The replica stops on purpose; its adapters are placed elsewhere at once."""
        if replica in self._reports:
            self._forget(replica)
            self._plan()

    def _replicas_wanted(self) -> int:
        """Replicas that the adapters need room on: all guaranteed copies and every adapter in use once."""
        p = self._planner.placement
        per_replica = max(1, self._model.slots - self._model.policy.reserve_slots)
        wanted = int(((p.load > ACTIVE).astype(int).clip(p.low) * p.alive).sum()) if len(p.load) else 0
        return math.ceil(wanted / per_replica)

    async def news(self, born: str, number: int) -> CatalogueNews:
        """Changes of the catalogue after (`born`, `number`), which the asker got with its last news."""
        self._ensure_running()
        if not self._has_scanned:
            await self._scan()
        oldest = self._changes[0][0] if self._changes else self._number
        # Of the oldest number a part may be left only.
        if born != self._born or number < oldest:
            entries = tuple(self._by_id.values())
            return CatalogueNews(self._born, self._number, True, entries, (), self._is_complete())
        last: dict[str, Entry | None] = {name: entry for n, entry, name in self._changes if n > number}
        return CatalogueNews(
            self._born,
            self._number,
            False,
            tuple(e for e in last.values() if e is not None),
            tuple(name for name, e in last.items() if e is None),
        )

    async def rescan(self, born: str, number: int) -> CatalogueNews:
        """Looks at the sources now, then tells the news: somebody asked for a name nobody knows."""
        await self._scan()
        return await self.news(born, number)

    async def status(self) -> dict[str, Any]:
        """Everything `flora-vllm cluster status` shows, as plain data."""
        faults = dict(self._catalogue.faults)
        for report in self._reports.values():
            faults.update({i: f for i, f in {**report.troubles, **report.faults}.items() if i in self._by_id})
        faults.update(self._planner.faults())
        if self._is_complete():
            unknown = self._model.adapter_options.keys() - self._names.keys() - faults.keys()
            faults.update(dict.fromkeys(unknown, "named in adapter_options, but no source has it"))
        return {
            "model": self._model.name,
            "uptime_s": round(time.monotonic() - self._born_s, 1),
            "adapters": len(self._by_id),
            "plans": self._plans,
            "moves": self._moves,
            "plan_ms": round(self._plan_ms, 2),
            "syncs": self._syncs,
            "replicas_wanted": self._replicas_wanted(),
            "replicas": {
                r: {**asdict(report), "wanted": self._planner.wanted(r)} for r, report in sorted(self._reports.items())
            },
            "pending": self._pending(),
            "faults": faults,
            "store_faults": dict(self._catalogue.store_faults),
        }

    def _pending(self) -> list[str]:
        """What is under way and will show as it should be, or as a fault, soon."""
        out = [] if self._has_planned else ["no plan yet"]
        if len(self._reports) < self._expected():
            out.append(f"{len(self._reports)} of {self._expected()} replicas report")
        out += [f"{r} loads its adapters" for r, report in sorted(self._reports.items()) if report.is_warming]
        for name in self._planner.guaranteed():
            for replica, _ in self._planner.holders(name):
                report = self._reports[replica]
                if not any(name in ids for ids in (report.resident, report.faults, report.troubles)):
                    out.append(f"{name} is not yet in memory on {replica}")
        return out

    async def explain(self, name: str) -> dict[str, Any]:
        """Why the adapter is where it is; `name` may begin with `base:`. Raises ConfigError for an unknown one."""
        base = self._model.name
        name = name.removeprefix(f"{base}:")
        faults = {**self._unread, **self._catalogue.faults}
        if name not in self._names and name in faults:
            raise ConfigError(f"adapter {name} of {base} is not served: {faults[name]}")
        if name not in self._names and name not in self._by_id:
            raise ConfigError(f"{base} has no adapter {name!r}; it has {', '.join(sorted(self._names)[:20]) or 'none'}")
        explanation = asdict(self._planner.explain(self._names.get(name, name)))
        known = self._names.get(name, name)
        explanation["resident"] = sorted(r for r, report in self._reports.items() if known in report.resident)
        explanation["refused"] = {r: rep.faults[known] for r, rep in self._reports.items() if known in rep.faults}
        return explanation

    def _export(self, moves: int) -> None:
        """Gauges and counters through Ray, made with the first plan: the policy tests need no Ray."""
        if self._metrics is None:
            from flora_vllm.cluster.ray_hooks import ControllerMetrics

            self._metrics = ControllerMetrics(self._model.name)
        p = self._planner.placement
        self._metrics.record(
            copies=int(p.count.sum()),
            adapters=len(self._by_id),
            replicas=len(self._reports),
            moves=moves,
            plan_ms=self._plan_ms,
            short=len(self._planner.faults()),
        )
