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
from flora_vllm.plugin import turns

# Upper bounds of the load histogram, seconds; one more counts what took longer.
LOAD_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
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

    def counts(self) -> dict[str, Any]:
        return {
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
    return core.collective_rpc(_report_of, args=(most,))[0] | turns.counts(core.scheduler)


def _report_of(worker: Any, most: int | None) -> dict[str, Any]:
    """Runs in a worker."""
    return worker.model_runner.lora_manager.report(most)
