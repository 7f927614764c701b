"""How a thread that prepares adapters leaves the time to the steps that run beside it.

Python runs one thread at a time, and a thread that wants its turn waits until the other lets go: a load in pure Python
would take all its time from the steps, 5 ms at a go. So its loops say `pace()`, which rests after a millisecond of work
while steps run, and costs a tenth of a microsecond otherwise. A lower priority would make it worse: whoever is
not scheduled while it holds the interpreter holds up everybody.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

# A load may take a quarter of a core from the steps.
WORK_S, REST_S = 0.001, 0.003
# So long after a step the next one is expected.
_BETWEEN_STEPS_S = 0.1

_this_thread = threading.local()
_cores: set[int] = set()


def note_cores() -> None:
    """Called before an engine binds this process's threads to cores of their own."""
    _cores.update(os.sched_getaffinity(0))


def leave_bound_core() -> None:
    """This thread may run wherever the process could; it had inherited its maker's one core."""
    with contextlib.suppress(OSError):  # the machine has taken cores away since
        os.sched_setaffinity(0, _cores or os.sched_getaffinity(0))


class NotBesideStepsError(Exception):
    """What a thread beside the steps was asked for has to be done between them: it needs the other ranks' base."""


class Turns:
    """Steps and what must not run while a step does, one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_stepping = False
        self._last_step = float("-inf")

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A step of the model runs within."""
        with self._lock:
            self._is_stepping = True
            try:
                yield
            finally:
                self._is_stepping, self._last_step = False, time.monotonic()

    def between_steps(self) -> threading.Lock:
        """Held by something short that no step may run beside."""
        return self._lock

    def steps_run(self) -> bool:
        return self._is_stepping or time.monotonic() - self._last_step < _BETWEEN_STEPS_S


def pace_while(busy: Callable[[], bool]) -> None:
    """This thread rests at each `pace()` after WORK_S of work, while `busy()`."""
    _this_thread.busy, _this_thread.until = busy, time.perf_counter() + WORK_S


def pace() -> None:
    """Called in the loops of a load; does nothing in other threads."""
    until = getattr(_this_thread, "until", None)
    if until is None or time.perf_counter() < until:
        return
    if _this_thread.busy():
        time.sleep(REST_S)
    _this_thread.until = time.perf_counter() + WORK_S
