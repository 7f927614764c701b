"""While adapters load, an engine's processes wait for each other asleep.

Who reads vLLM's shared memory looks again and again, for a second after the last message: for the whole of a step the
core's process keeps a core of the machine, and without requests the worker's thread takes turns at Python from the
thread that loads. A load beside steps needs that core where there are few.
"""

import functools
import importlib
import weakref
from typing import Any, Protocol

# A sleeper is woken by a message, and looks for itself in case that was lost.
LOOK_MS = 2


class Loads(Protocol):
    """What knows of loads in this process."""

    @property
    def is_busy(self) -> bool: ...


_loads: "weakref.WeakSet[Loads]" = weakref.WeakSet()


def while_busy(loads: Loads) -> None:
    """From now on this process waits asleep while `loads.is_busy`, too."""
    _loads.add(loads)


def install() -> None:
    """Inert while nothing loads."""
    condition: Any = importlib.import_module("vllm.distributed.device_communicators.shm_broadcast").SpinCondition
    original = condition.wait

    @functools.wraps(original)
    def wait(self: Any, timeout_ms: int | None = None) -> None:
        if not any(loads.is_busy for loads in _loads):
            return original(self, timeout_ms)
        spins_s, self.busy_loop_s = self.busy_loop_s, 0.0
        try:
            original(self, LOOK_MS if timeout_ms is None else min(timeout_ms, LOOK_MS))
        finally:
            self.busy_loop_s = spins_s

    condition.wait = wait
