"""No adapter waits for ever: one that has waited too long for a slot drains one.

vLLM admits a waiting request if its adapter runs already or a slot is free. So while requests of the adapters that run
keep coming, no slot ever is, and a request of another adapter is passed by without end. Here, once such a request has
waited `wait_s`, one adapter that runs gets no further requests until those it has are done; its slot is then kept for
the one that waited. A request thus waits at most `wait_s` and as long as one adapter's running requests take, for each
slot's worth of adapters that waited before it. Requests without an adapter need no slot and are never held back.
"""

import functools
import importlib
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from flora_vllm.plugin.options import options_of
from flora_vllm.plugin.shares import FairQueue

# A request in one of these states could run now if it had a slot.
_READY = ("WAITING", "PREEMPTED")


class SlotTurns:
    """Whose turn it is in one scheduler, decided anew for each step. `slots`: adapters that may run at once.

    `drained`: how many slots were drained since the start.
    """

    def __init__(self, slots: int, wait_s: float) -> None:
        self._slots, self._wait_s = slots, wait_s
        self._running: set[int] = set()
        self._starved: list[int] = []
        self._draining: list[int] = []
        self.drained = 0

    @property
    def starved(self) -> int:
        """Adapters that have waited too long and have no slot yet, at most as many as there are slots."""
        return len(self._starved)

    def begin(self, running: Iterable[Any], waiting: Sequence[Iterable[Any]], now: float) -> None:
        """A step begins with these vLLM requests. `waiting`: those of each tenant, if there are any, in the order of
        their arrival, and those tenants first whose turn it is. `now`: Unix time.
        """
        left: dict[int, int] = {}  # adapter that runs -> the most tokens that a request of it may still make
        for request in running:
            if adapter := _adapter_of(request):
                left[adapter] = max(left.get(adapter, 0), request.max_tokens - request.num_output_tokens)
        self._running = set(left)
        self._starved = self._longest_waiting(waiting, now)
        free = self._slots - len(left)
        needed = max(len(self._starved) - free, 0)
        # One that drains already goes on, for what it has drained would be lost; then those that are done first.
        kept = [adapter for adapter in self._draining if adapter in left]
        others = sorted((adapter for adapter in left if adapter not in kept), key=lambda adapter: left[adapter])
        self._draining = [*kept, *others][:needed]
        self.drained += max(len(self._draining) - len(kept), 0)

    def holds(self, request: Any) -> bool:
        """Whether a waiting request must be passed by in this step, for others have waited longer."""
        adapter = _adapter_of(request)
        if not self._starved or not adapter or request.num_computed_tokens:  # what holds memory must go on
            return False
        if adapter in self._running:
            return adapter in self._draining
        return adapter not in self._starved and self._slots - len(self._running) <= len(self._starved)

    def _longest_waiting(self, waiting: Sequence[Iterable[Any]], now: float) -> list[int]:
        """Adapters without a slot that have waited `wait_s`, as many as there are slots: one of each tenant, then
        another of each, so that none has them all."""
        rounds = itertools.zip_longest(*(self._starved_among(requests, now) for requests in waiting))
        found = dict.fromkeys(adapter for one_each in rounds for adapter in one_each if adapter)
        return list(found)[: self._slots]

    def _starved_among(self, waiting: Iterable[Any], now: float) -> Iterator[int]:
        """Adapters, each once, that wait too long."""
        found: set[int] = set()
        for request in waiting:
            if now - request.arrival_time < self._wait_s or len(found) == self._slots:
                return
            adapter = _adapter_of(request)
            is_new = adapter and adapter not in self._running and adapter not in found
            if is_new and request.status.name in _READY:
                found.add(adapter)
                yield adapter


def _adapter_of(request: Any) -> int:
    """The id of its adapter, 0 if it has none."""
    return 0 if request.lora_request is None else request.lora_request.lora_int_id


def install() -> None:
    """Have vLLM's scheduler give each adapter its turn; inert without FLoRA, and where requests have priorities."""
    scheduler: Any = importlib.import_module("vllm.v1.core.sched.scheduler").Scheduler
    schedule, is_ready = scheduler.schedule, scheduler._handle_blocked_waiting_request

    @functools.wraps(schedule)
    def schedule_in_turn(self: Any, *args: Any, **kwargs: Any) -> Any:
        turns = _turns_of(self)
        if turns is not None:
            in_turn = self.waiting.in_turn() if isinstance(self.waiting, FairQueue) else [self.waiting]
            turns.begin(self.running, in_turn, time.time())
        return schedule(self, *args, **kwargs)

    @functools.wraps(is_ready)
    def is_ready_in_turn(self: Any, request: Any) -> bool:
        if not is_ready(self, request):
            return False
        turns = _turns_of(self)
        return turns is None or not turns.holds(request)

    scheduler.schedule, scheduler._handle_blocked_waiting_request = schedule_in_turn, is_ready_in_turn


def holds(scheduler: Any, request: Any) -> bool:
    """Whether a waiting request was passed by in the last step for others that have waited longer."""
    turns = scheduler.__dict__.get("_flora_turns")
    return turns is not None and turns.holds(request)


def counts(scheduler: Any) -> dict[str, int]:
    """For the report of an engine (loads.py)."""
    turns = scheduler.__dict__.get("_flora_turns")
    return {"starved": 0 if turns is None else turns.starved, "drained": 0 if turns is None else turns.drained}


def _turns_of(scheduler: Any) -> SlotTurns | None:
    made = scheduler.__dict__.get("_flora_turns", ...)
    if made is ...:
        made = scheduler._flora_turns = _make(scheduler)
    return made


def _make(scheduler: Any) -> SlotTurns | None:
    options = options_of(scheduler.vllm_config.additional_config)
    if options is None or scheduler.policy.name != "FCFS":  # who has set priorities wants them kept
        return None
    return SlotTurns(scheduler.vllm_config.lora_config.max_loras, options.adapter_wait)
