"""What a worker did with adapters, and how the engine tells a server that asks (listing.py).

Counted where an adapter is loaded or makes room; told on demand only, by one of the engine's utility calls, which it
answers between steps.
"""

import contextlib
import importlib
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flora_vllm.pacing import NotBesideStepsError
from flora_vllm.plugin import prefetch, turns, waiting

# Upper bounds of the load histogram, seconds; one more counts what took longer.
LOAD_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# What a load spends its time on: files are read, checked, cut to slot contents and kept as a copy on disk; the contents
# are written into a slot, each time there is one for it.
PHASES = ("read", "check", "cut", "keep", "write")
# The engine's utility call.
REPORT = "flora_adapters"


@dataclass(frozen=True)
class Finished:
    """What came of a load. `is_held`: the adapter is in host memory now; `evicted`: ids that made room for it."""

    is_held: bool
    evicted: tuple[int, ...] = ()
    error: Exception | None = None


class Loads:
    """Counts of one worker since its start."""

    def __init__(self) -> None:
        self.results: Counter[str] = Counter(loaded=0, reloaded=0, refused=0)
        self.evictions: Counter[str] = Counter(gpu=0, cpu=0)
        self._by_bound = [0] * (len(LOAD_BOUNDS_S) + 1)
        self._sum_s = 0.0
        self._phase_s: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        # Of adapters that began to run: whether they had a slot, and were in host memory.
        self.lookups = {level: {"hit": 0, "miss": 0} for level in ("gpu", "cpu")}
        self._lock = threading.Lock()  # a step may load while the thread beside it does

    @contextlib.contextmanager
    def counted(self, *, again: bool) -> Iterator[None]:
        """Around one load. `again`: of an adapter that had been evicted."""
        begin = time.perf_counter()
        try:
            yield
        except NotBesideStepsError:
            raise  # it is loaded between steps, and counted there
        except BaseException:
            with self._lock:
                self.results["refused"] += 1
            raise
        took_s = time.perf_counter() - begin
        with self._lock:
            self.results["reloaded" if again else "loaded"] += 1
            self._by_bound[bisect_left(LOAD_BOUNDS_S, took_s)] += 1
            self._sum_s += took_s

    def look_up(self, level: str, found: bool) -> None:
        """An adapter that did not run in the step before begins to: whether it is in a slot (gpu), in memory (cpu)."""
        self.lookups[level]["hit" if found else "miss"] += 1

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around one of PHASES."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            took_s = time.perf_counter() - begin
            with self._lock:
                self._phase_s[name] += took_s

    def counts(self) -> dict[str, Any]:
        return {
            "phase_s": dict(self._phase_s),
            "lookups": {level: dict(found) for level, found in self.lookups.items()},
            "results": dict(self.results),
            "evictions": dict(self.evictions),
            "load_s": self._sum_s,
            "loads_by_bound": list(self._by_bound),
        }


def offer_report() -> None:
    """The engine core gets one more utility call."""
    core: Any = importlib.import_module("vllm.v1.engine.core").EngineCore
    setattr(core, REPORT, _report)


def _report(core: Any, most: int | None = None) -> dict[str, Any]:
    """What the first worker and the scheduler say; all ranks hold the same adapters. Plain values: it crosses a
    process border."""
    report = core.collective_rpc(_report_of, args=(most,))[0]
    report |= turns.counts(core.scheduler) | {"waiting": waiting.counts(core.scheduler, report["slots"])}
    if (loading := prefetch.loading_in(core.scheduler)) is not None:  # then steps find what requests had to wait for
        report["lookups"]["cpu"] = dict(loading.lookups)
    return report


def _report_of(worker: Any, most: int | None) -> dict[str, Any]:
    """Runs in a worker."""
    return worker.model_runner.lora_manager.report(most)
